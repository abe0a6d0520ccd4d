"""PruneSparse over a whole model: weight by weight, each on the inputs that calibration samples give it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ...compiler.base import Feeds, PassContext
from ...compiler.graph import Array, is_op
from ..gptq import Inputs, asymmetric_target
from ..linear_layers import LinearLayer, watch
from ..streams import MASK, Stream, same_values, stage_order
from .sparse_layers import Prunable
from .sparse_solvers import Goal, Second, loss

_MEMORY = 192 << 20  # bytes of activations kept in memory per stream

Solve = Callable[[Array, Second, Goal], Array]


@dataclasses.dataclass
class Moments:
    """Sums over the rows that a layer's outputs see, for each group.

    Attributes:
        hessian: Xq Xq^T, float64 [groups, K, K], of the pruned prefix's inputs.
        cross: (Xf - Xq) Xq^T, Xf being the original's inputs; None without.
        rows: how many.
    """

    hessian: Array | None = None
    cross: Array | None = None
    rows: int = 0

    def add(self, rows: Array, original: Array | None) -> None:
        """Takes in the rows of one sample, [groups, rows, K]."""
        turned = rows.transpose(0, 2, 1)
        self.hessian = _sum(self.hessian, turned @ rows)
        if original is not None:
            self.cross = _sum(self.cross, (original - rows).transpose(0, 2, 1) @ rows)
        self.rows += rows.shape[1]


def _sum(total: Array | None, part: Array) -> Array:
    return part.astype(np.float64) if total is None else total + part


@dataclasses.dataclass
class Found:
    """What came out.

    Attributes:
        weights: weight -> W' [groups, N, K].
        errors: weight name -> the layer's loss, as a share of the sum of its squared outputs.
        thin: names of weights with fewer calibration rows than inputs.
    """

    weights: dict[Prunable, Array] = dataclasses.field(default_factory=lambda: dict[Prunable, Array]())
    errors: dict[str, float] = dataclasses.field(default_factory=lambda: dict[str, float]())
    thin: list[str] = dataclasses.field(default_factory=lambda: list[str]())


def prune_in_order(
    model: ir.Model,
    goals: Mapping[Prunable, Sequence[Goal]],
    solve: Solve,
    context: PassContext,
    target: float,
) -> Found:
    """Prunes in the order in which the graph runs: inputs come from the prefix as it is after pruning.

    Weights that are used with several inputs come first, on the original's inputs.

    Args:
        model: the model; not changed.
        goals: weight -> how sparse each of its groups shall be.
        solve: makes W [N, K] sparse.
        context: samples, threads, progress.
        target: 0 aims at ``W x'`` on the pruned prefix, 1 at the original's ``W x``.
    """
    found = Found()
    work = model.clone()
    several = [weight for weight in goals if len(weight.inputs) > 1]
    if several:
        for weight, moments in zip(several, _watched(model, several, context), strict=True):
            _solve(weight, goals[weight], moments, solve, 0.0, found)
            work.graph.initializers[weight.name].const_value = weight.stored(found.weights[weight])
    for stage, moments in walk(model, work, [weight for weight in goals if weight not in several], context, target > 0):
        for weight, sums in moments.items():
            context.progress(f"pruning {stage}: {weight.name}")
            _solve(weight, goals[weight], sums, solve, target, found)
            work.graph.initializers[weight.name].const_value = weight.stored(found.weights[weight])
    return found


def walk(
    model: ir.Model, work: ir.Model, weights: Sequence[Prunable], context: PassContext, both: bool
) -> Iterator[tuple[str, dict[Prunable, Moments]]]:
    """For each input of ``weights``, in the order of the graph: which one it is, and the moments of its weights.

    Args:
        model: the original.
        work: a clone of it, whose weights may be replaced between stages.
        weights: each of one input.
        context: samples and threads.
        both: whether the original's inputs are wanted beside those of ``work``.
    """
    groups: dict[ir.Value, list[Prunable]] = {}
    for weight in weights:
        groups.setdefault(weight.inputs[0], []).append(weight)
    stages = stage_order(model, groups)
    masks = [{name: sample[name] for name in sample if name == MASK} for sample in context.feeds]
    pruned = Stream(work, same_values(work, stages), context.feeds, _MEMORY, context.threads)
    original = Stream(model, stages, context.feeds, _MEMORY, context.threads) if both else None
    for number, x in enumerate(stages):
        arrays, others = pruned.advance(number), original.advance(number) if original is not None else None
        yield f"{number + 1}/{len(stages)}", _moments(groups[x], arrays, others, masks)


def _moments(
    weights: Sequence[Prunable], arrays: Iterable[Array], originals: Iterator[Array] | None, masks: Sequence[Feeds]
) -> dict[Prunable, Moments]:
    """Summed sample by sample, once for all weights that see the input in the same way."""
    views: dict[Any, Moments] = {}
    sums = {weight: views.setdefault(_view(weight.layers[0]), Moments()) for weight in weights}
    first = {id(moments): weight for weight, moments in reversed(sums.items())}
    for mask, array in zip(masks, arrays, strict=True):
        other = next(originals) if originals is not None else None
        for moments in views.values():
            weight = first[id(moments)]
            layer = weight.layers[0]
            exact = weight.rows(layer, other, mask) if other is not None else None
            moments.add(weight.rows(layer, array, mask), exact)
    return sums


def _view(layer: LinearLayer) -> Any:
    """Equal for layers of one input whose outputs see the same rows of it."""
    if not is_op(layer.node, "Conv"):
        return None
    attributes = {name: item.value for name, item in layer.node.attributes.items()}
    return str(layer.weight.shape), str(sorted(attributes.items()))


class _Watcher:
    """Collects the moments of one weight from all its layers."""

    def __init__(self, weight: Prunable, layer: LinearLayer, moments: Moments) -> None:
        self._weight, self._layer, self._moments = weight, layer, moments

    def update(self, array: Array) -> None:
        self._moments.add(self._weight.rows(self._layer, array, {}), None)


def _watched(model: ir.Model, weights: Sequence[Prunable], context: PassContext) -> list[Moments]:
    sums = [Moments() for _ in weights]
    watchers = {
        layer: _Watcher(weight, layer, moments)
        for weight, moments in zip(weights, sums, strict=True)
        for layer in weight.layers
    }
    watch(model, watchers, context)
    return sums


def _solve(
    weight: Prunable, goals: Sequence[Goal], moments: Moments, solve: Solve, target: float, found: Found
) -> None:
    if moments.hessian is None:
        raise ValueError("no samples")
    matrix = weight.matrix()
    result = np.empty_like(matrix)
    lost = total = 0.0
    for group, goal in enumerate(goals):
        second = Second(moments.hessian[group])
        wanted = matrix[group]
        if moments.cross is not None and target > 0:
            wanted = asymmetric_target(wanted, Inputs(second.hessian), moments.cross[group], target)
        result[group] = solve(wanted, second, goal)
        lost += loss(wanted, result[group], second)
        total += loss(wanted, np.zeros_like(wanted), second)
    found.weights[weight] = result
    found.errors[weight.name] = lost / total if total > 0 else 0.0
    if moments.rows < matrix.shape[-1]:
        found.thin.append(weight.name)

