"""PruneSparse over a whole model: weight by weight, each on the inputs that calibration samples give it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ...compiler.base import PassContext
from ...compiler.graph import Array, dims, is_op, only_consumer
from ..linear_layers import LinearLayer, result_of, watch
from ..low_bit.streams import MASK, Stream, ancestors, same_values, stage_order
from .sparse_bias import shifted
from .sparse_layers import Prunable
from .sparse_solvers import Goal, Second, loss
from .statistics import require_finite

_MEMORY = 192 << 20  # bytes of activations kept in memory per stream

Solve = Callable[[Array, Second, Goal], Array]


@dataclasses.dataclass
class Moments:
    """Sums over the rows that a layer's outputs see, for each group.

    Attributes:
        hessian: Xq Xq^T, float64 [groups, K, K], of the pruned prefix's inputs.
        total: the sum of Xq's columns, float64 [groups, K].
        cross: (Xf - Xq) Xq^T, Xf being the original's inputs; None without.
        drift: the sum of the columns of Xf - Xq; None without.
        pull: (Rf - Rq) Xq^T, float64 [groups, N, K], of what the output is added to (a residual stream); None without.
        lift: the sum of the columns of Rf - Rq; None without.
        rows: how many.
    """

    hessian: Array | None = None
    total: Array | None = None
    cross: Array | None = None
    drift: Array | None = None
    pull: Array | None = None
    lift: Array | None = None
    rows: int = 0

    def add(self, rows: Array, original: Array | None = None, residual: Array | None = None) -> None:
        """Takes in one sample: rows of Xq and Xf, [groups, rows, K], and of Rf - Rq, [groups, rows, N]."""
        self.hessian = _sum(self.hessian, rows.transpose(0, 2, 1) @ rows)
        self.total = _sum(self.total, rows.sum(axis=1, dtype=np.float64))
        if original is not None:
            difference = original - rows
            self.cross = _sum(self.cross, difference.transpose(0, 2, 1) @ rows)
            self.drift = _sum(self.drift, difference.sum(axis=1, dtype=np.float64))
        if residual is not None:
            self.pull = _sum(self.pull, residual.transpose(0, 2, 1) @ rows)
            self.lift = _sum(self.lift, residual.sum(axis=1, dtype=np.float64))
        self.rows += rows.shape[1]

    def toward(self, matrix: Array, group: int, centred: bool) -> tuple[Array, Array]:
        """How the original's output differs from W times the pruned prefix's inputs.

        Returns:
            ``(Yf - W Xq) Xq^T`` [N, K], of the centred inputs if ``centred``, and the mean of ``Yf - W Xq`` [N].
        """
        count = max(self.rows, 1)
        moment, mean = np.zeros(matrix.shape), np.zeros(len(matrix))
        if self.cross is not None and self.drift is not None:
            moment, mean = moment + matrix @ self.cross[group], mean + matrix @ self.drift[group] / count
        if self.pull is not None and self.lift is not None:
            moment, mean = moment + self.pull[group], mean + self.lift[group] / count
        if centred and self.total is not None:
            moment -= np.outer(mean, self.total[group])
        return moment, mean


def _sum(total: Array | None, part: Array) -> Array:
    return part.astype(np.float64) if total is None else total + part


@dataclasses.dataclass(frozen=True)
class Solution:
    """A weight made sparse.

    Attributes:
        matrix: W', float32 [groups, N, K].
        shift: what the bias gains, [groups * N]; zeros for a weight without one.
        lost: the layer's loss.
        whole: what the loss would be without the weight.
        rows: calibration rows.
    """

    matrix: Array
    shift: Array
    lost: float
    whole: float
    rows: int

    def tensors(self, weight: Prunable) -> dict[ir.Value, ir.TensorProtocol]:
        """The new content of the weight and of its bias."""
        found: dict[ir.Value, ir.TensorProtocol] = {weight.value: weight.stored(self.matrix)}
        if weight.bias is not None:
            found[weight.bias] = shifted(weight.bias, self.shift)
        return found


def prune_in_order(
    model: ir.Model,
    goals: Mapping[Prunable, Sequence[Goal]],
    solve: Solve,
    context: PassContext,
    target: float,
) -> dict[Prunable, Solution]:
    """Prunes in the order in which the graph runs: inputs come from the prefix as it is after pruning.

    Weights that are used with several inputs come first, on the original's inputs.

    Args:
        model: the model; not changed.
        goals: weight -> how sparse each of its groups shall be.
        solve: makes W [N, K] sparse.
        context: samples, threads, progress.
        target: 0 aims at ``W x'`` on the pruned prefix, 1 at the original's ``W x``.
    """
    found: dict[Prunable, Solution] = {}
    work = model.clone()
    single, several = _split(goals)

    def add(weight: Prunable, moments: Moments, toward: float) -> None:
        context.progress(f"pruning {len(found) + 1}/{len(goals)}: {weight.name}")
        found[weight] = solve_groups(weight, goals[weight], moments, solve, toward)
        for value, tensor in found[weight].tensors(weight).items():
            work.graph.initializers[value.name or ""].const_value = tensor

    for weight, moments in _watched(model, several, context):
        add(weight, moments, 0.0)
    for weight, moments in _walk(model, work, single, context, both=target > 0):
        add(weight, moments, target)
    return found


def original_moments(
    model: ir.Model, weights: Iterable[Prunable], context: PassContext
) -> Iterator[tuple[Prunable, Moments]]:
    """The moments of each weight's inputs in ``model`` as it is."""
    single, several = _split(weights)
    yield from _watched(model, several, context)
    yield from _walk(model, model.clone(), single, context, both=False)


def solve_groups(weight: Prunable, goals: Sequence[Goal], moments: Moments, solve: Solve, target: float) -> Solution:
    """``solve`` for each group.

    With a bias, moments are centred, as ``b' = b + E[W x - W' x']`` takes in the means whatever W' is.
    """
    if moments.hessian is None or moments.total is None:
        raise ValueError("no samples")
    require_finite(weight.name, moments.hessian, moments.cross, moments.pull)
    matrix, centred = weight.matrix(), weight.bias is not None
    result, shift = np.empty_like(matrix), np.zeros(matrix.shape[:2])
    lost = whole = 0.0
    for group, goal in enumerate(goals):
        hessian, mean = moments.hessian[group], moments.total[group] / max(moments.rows, 1)
        second = Second(hessian - moments.rows * np.outer(mean, mean) if centred else hessian)
        moment, difference = moments.toward(matrix[group], group, centred)
        wanted = matrix[group] + (target * np.linalg.solve(second.damped, moment.T).T).astype(np.float32)
        result[group] = solve(wanted, second, goal)
        lost += loss(wanted, result[group], second)
        whole += loss(wanted, np.zeros_like(wanted), second)
        shift[group] = (matrix[group] - result[group]) @ mean + target * difference
    return Solution(result, shift.reshape(-1), lost, whole, moments.rows)


def _split(weights: Iterable[Prunable]) -> tuple[list[Prunable], list[Prunable]]:
    """Those that are multiplied with one value, and those with several."""
    single: list[Prunable] = []
    several: list[Prunable] = []
    for weight in weights:
        (single if len(weight.inputs) == 1 else several).append(weight)
    return single, several


def _walk(
    model: ir.Model, work: ir.Model, weights: Sequence[Prunable], context: PassContext, *, both: bool
) -> Iterator[tuple[Prunable, Moments]]:
    """The weights in the order of the graph, each with the moments of its input.

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
    residuals = _residuals(weights) if both else {}
    stages = stage_order(model, groups)
    ends = [*stages, *(total for _, total in residuals.values())]  # so that what is added is kept until then
    masks = [{name: sample[name] for name in sample if name == MASK} for sample in context.feeds]
    pruned = Stream(work, same_values(work, ends), context.feeds, _MEMORY, context.threads)
    original = Stream(model, ends, context.feeds, _MEMORY, context.threads) if both else None
    for number, x in enumerate(stages):
        views: dict[Any, list[Prunable]] = {}
        for weight in groups[x]:
            views.setdefault(weight if weight in residuals else _view(weight.layers[0]), []).append(weight)
        sums = [Moments() for _ in views]
        others = original.advance(number) if original is not None else itertools.repeat(None)
        for index, (array, other) in enumerate(zip(pruned.advance(number), others, strict=False)):
            for moments, (weight, *_) in zip(sums, views.values(), strict=True):
                rows = weight.rows(weight.layers[0], array, masks[index])
                exact = weight.rows(weight.layers[0], other, masks[index]) if other is not None else None
                residual = None
                if original is not None and weight in residuals:
                    value, _ = residuals[weight]
                    change = original.beside(index, value) - pruned.beside(index, value)
                    residual = weight.output_rows(weight.layers[0], change, masks[index])
                moments.add(rows, exact, residual)
        for moments, together in zip(sums, views.values(), strict=True):
            yield from ((weight, moments) for weight in together)


def _residuals(weights: Iterable[Prunable]) -> dict[Prunable, tuple[ir.Value, ir.Value]]:
    """Weight -> what its layer's output is added to, made before its input, and the sum."""
    found: dict[Prunable, tuple[ir.Value, ir.Value]] = {}
    for weight in weights:
        result = result_of(weight.layers[0])
        add = only_consumer(result)
        if add is None or not is_op(add, "Add") or dims(result) is None:
            continue
        others = [value for value in add.inputs if value is not None and value is not result]
        if len(others) != 1 or dims(others[0]) != dims(result) or dims(add.outputs[0]) != dims(result):
            continue
        maker = others[0].producer()
        if maker is not None and maker in ancestors(weight.inputs, set()):
            found[weight] = others[0], add.outputs[0]
    return found


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
        self._moments.add(self._weight.rows(self._layer, array, {}))


def _watched(model: ir.Model, weights: Sequence[Prunable], context: PassContext) -> Iterator[tuple[Prunable, Moments]]:
    """The weights, each with the moments of all its inputs in ``model``."""
    if not weights:
        return
    sums = {weight: Moments() for weight in weights}
    watchers = {layer: _Watcher(weight, layer, sums[weight]) for weight in weights for layer in weight.layers}
    watch(model, watchers, context)
    yield from sums.items()
