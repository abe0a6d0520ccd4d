"""What each part of a model may lose, and what that costs the output: measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.base import PassContext
from ...compiler.graph import PASS_KEY, Array, Names, constant, is_op, producer, rank, remove_dead
from ...runtime.inference import open_session, run_session, session_options
from ..low_bit.output_effect import OutputEffect
from ..low_bit.streams import PATIENT
from .blocks import Half, residual_stream, runs
from .bypass import bypass, forward
from .coupling_rules import coupling_of
from .cut import cut
from .fit import bias_place, kept_columns, problem_of, weight_matrix
from .obs import Ranking, least_squares, rank_by_obs
from .prune_width import removed
from .statistics import Moments, moments_of
from .units import Dimension

_RIDGE = 1e-2
_KEPT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A dimension and what may be left of it.

    Attributes:
        dimension: the units.
        half: the branch of the residual stream that gives nothing but a constant without them, None if it is not so.
        counts: for each option how many units go; from none on; all of them (with ``half``) last.
    """

    dimension: Dimension
    half: Half | None
    counts: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the first weight that makes the units."""
        return self.dimension.name


def modules_of(found: Sequence[Dimension], halves: Sequence[Half], multiple: int) -> list[Module]:
    """The dimensions with their options."""
    modules: list[Module] = []
    for item in found:
        layers = [consumer.layer.node for consumer in item.consumers]
        fitting = [h for h in halves if h.layer is not None and layers == [h.layer.node] and _can_be_silent(h)]
        half = fitting[0] if fitting else None
        count = len(item.units)
        if item.kind == "heads":
            counts = list(range(count))
        else:
            counts = sorted({0, *(removed(item, 1 - kept, multiple) for kept in _KEPT if count * kept >= 1)})
        modules.append(Module(item, half, tuple(counts if half is None else [*counts, count])))
    return modules


def _can_be_silent(half: Half) -> bool:
    """Whether the stream can be written without the branch but with its bias."""
    layer = half.layer
    if layer is None or is_op(layer.node, "Conv"):
        return False
    return is_op(half.add, "Add") or (half.norm is None and bias_place(layer) is None)


def shrunk(
    model: ir.Model, counts: Mapping[str, int], silent: Mapping[str, Half], by: str, caches: Collection[str] = ()
) -> ir.Model:
    """A copy of the model as small as with these choices; any units go.

    Args:
        model: the model, or a part of it.
        counts: name of a dimension -> how many units go.
        silent: of those of which all go, the branch.
        by: name of the pass.
        caches: names of inputs and outputs of a part that are caches of the whole model.
    """
    copy = model.clone()
    leave_bias(copy, list(silent.values()), by)
    remove_dead(copy)
    coupling = coupling_of(copy, caches)
    gone = [d.units[: counts[d.name]] for d in coupling.dimensions() if counts.get(d.name) and d.name not in silent]
    if gone:
        cut(coupling, np.concatenate(gone), by)
    return copy


def leave_bias(model: ir.Model, silent: Sequence[Half], by: str) -> None:
    """Leaves of branches only the constant that they give without their units, their bias.

    Args:
        model: changed in place; caches stay.
        silent: the branches, of this model or of another copy of it.
        by: name of the pass.
    """
    nodes = {node.name: node for node in model.graph}
    fused: set[str | None] = set()
    for half in silent:
        add = nodes.get(half.add.name)
        if add is None or not is_op(add, "Add"):
            fused.add(half.add.name)
            continue
        index = next(n for n, value in enumerate(add.inputs) if value is not None and value.name == half.branch.name)
        branch, stream = producer(add.inputs[index]), add.inputs[1 - index]
        bias = next((value for value in branch.inputs if rank(value) == 1), None) if branch is not None else None
        if bias is not None:
            add.replace_input_with(index, bias)
            add.metadata_props[PASS_KEY] = by
        elif stream is not None:
            forward(add.outputs[0], stream, Names(model), by)
    halves = residual_stream(model) if fused else []
    for run in list(runs(halves, {half for half in halves if half.add.name in fused})):
        bypass(model, run, by)


class Losses:
    """Measures what the output loses when one module loses units, its last layer fitted.

    One session, in which the weights and biases of the layers that sum over units are inputs, serves all.

    Args:
        model: the model.
        modules: what may lose units.
        effect: compares outputs.
        context: samples, threads.
    """

    def __init__(self, model: ir.Model, modules: Sequence[Module], effect: OutputEffect, context: PassContext) -> None:
        self._model, self._modules, self._effect, self._context = model, modules, effect, context
        self._arrays: dict[str, Array] = {}
        swapped = model.clone()
        for module in modules:
            for consumer in module.dimension.consumers:
                place = bias_place(consumer.layer)
                for value in (consumer.layer.weight, place[0].inputs[place[1]] if place is not None else None):
                    self._open(swapped, value)
        options = session_options(threads=context.threads, ort_config=PATIENT)
        self._session = open_session(swapped, options, context.device)

    def _open(self, swapped: ir.Model, value: ir.Value | None) -> None:
        array = constant(value)
        if value is None or array is None or len(value.uses()) != 1 or (value.name or "") in self._arrays:
            return
        inner = swapped.graph.initializers.pop(value.name or "")
        inner.const_value = None
        swapped.graph.inputs.append(inner)
        self._arrays[value.name or ""] = array

    def table(self) -> tuple[list[Array], list[Ranking]]:
        """For each module the effect of each option, and the order in which its units go."""
        effects: dict[str, Array] = {}
        rankings: dict[str, Ranking] = {}
        waiting: dict[ir.Value, Moments] = {}
        layers = [(c.x, c.layer) for module in self._modules for c in module.dimension.consumers]
        for x, moments in moments_of(self._model, layers, self._context):
            waiting[x] = moments
            for number, module in enumerate(self._modules):
                item = module.dimension
                if module.name in effects or not all(consumer.x in waiting for consumer in item.consumers):
                    continue
                self._context.progress(f"losses of {number + 1}/{len(self._modules)}: {module.name}")
                problems = [
                    problem_of(c, item.units, waiting[c.x].covariance(bias_place(c.layer) is not None))
                    for c in item.consumers
                ]
                rankings[module.name] = rank_by_obs(problems, len(item.units) - 1)
                effects[module.name] = np.array(
                    [self._option(module, count, rankings[module.name], waiting) for count in module.counts]
                )
            needed = {c.x for m in self._modules if m.name not in effects for c in m.dimension.consumers}
            waiting = {value: kept for value, kept in waiting.items() if value in needed}
        return [effects[m.name] for m in self._modules], [rankings[m.name] for m in self._modules]

    def _option(self, module: Module, count: int, ranking: Ranking, moments: Mapping[ir.Value, Moments]) -> float:
        if not count:
            return 0.0
        item = module.dimension
        gone = item.units if count == len(item.units) else item.units[ranking.order[:count]]
        changes: dict[str, Array] = {}
        for consumer in item.consumers:
            layer, seen = consumer.layer, moments[consumer.x]
            place = bias_place(layer)
            weight, covariance = weight_matrix(layer), seen.covariance(place is not None)
            kept = kept_columns(consumer, gone, weight.shape[1])
            new = least_squares(weight, covariance, weight @ covariance, kept, _RIDGE)
            old = self._arrays.get(layer.weight.name or "")
            if old is not None:
                changes[layer.weight.name or ""] = layer.unmatrix(new, old.shape).astype(old.dtype)
            bias = place[0].inputs[place[1]] if place is not None else None
            if bias is not None and (bias.name or "") in self._arrays:
                array = self._arrays[bias.name or ""]
                changes[bias.name or ""] = (array + (weight - new) @ seen.mean()).astype(array.dtype)
        arrays = {**self._arrays, **changes}
        output = self._effect.output
        return self._effect.of_outputs(
            run_session(self._session, {**sample, **arrays}, [output])[output] for sample in self._effect.samples
        )
