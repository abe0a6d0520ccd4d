"""Statistics of the layers that sum over units, and the refit of their weights, with samples streaming through."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.base import Feeds, PassContext
from ...compiler.graph import MICROSOFT, PASS_KEY, Array, Names, add_initializer, constant, is_op, only_consumer
from ...runtime.errors import PassError
from ..linear_layers import LinearLayer, bias_of, result_of
from ..quantized_layers import store
from ..streams import MASK, ArrayStore, Stream, stage_order, token_rows
from ..symbolic import SymbolicShapes
from .coupling import Consumer
from .cut import drop_unused
from .obs import Problem, least_squares, squared_error

_MEMORY = 192 << 20
_SKIPS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


class Moments:
    """First and second moments of a layer's input x [K] and, if there is one, of a target t [N]."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Array = np.zeros(())
        self._target: Array = np.zeros(())
        self._square: Array = np.zeros(())
        self._cross: Array = np.zeros(())
        self._power = 0.0

    def update(self, x: Array, target: Array | None = None) -> None:
        """Takes in rows of x [rows, K] and of t [rows, N]."""
        self.count += len(x)
        self._sum = self._sum + x.sum(axis=0, dtype=np.float64)
        self._square = self._square + (x.T @ x).astype(np.float64)
        if target is not None:
            self._target = self._target + target.sum(axis=0, dtype=np.float64)
            self._cross = self._cross + (target.T @ x).astype(np.float64)
            self._power += float(np.square(target, dtype=np.float64).sum())

    def mean(self) -> Array:
        """E x."""
        return self._sum / self.count

    def target_mean(self) -> Array:
        """E t."""
        return self._target / self.count

    def covariance(self, centred: bool) -> Array:
        """E x x^T, about the mean where ``centred``."""
        square = self._square / self.count
        return square - np.outer(self.mean(), self.mean()) if centred else square

    def cross(self, centred: bool) -> Array:
        """E t x^T, likewise."""
        cross = self._cross / self.count
        return cross - np.outer(self.target_mean(), self.mean()) if centred else cross

    def power(self, centred: bool) -> float:
        """E |t|^2, likewise."""
        power = self._power / self.count
        return power - float(np.square(self.target_mean()).sum()) if centred else power


@dataclasses.dataclass(frozen=True)
class Refit:
    """What one layer lost, as shares of the energy of its output.

    Attributes:
        name: of the weight.
        dropped: with its other weights as they were.
        fitted: after the refit.
    """

    name: str
    dropped: float
    fitted: float


def needs_samples(context: PassContext, name: str) -> None:
    """Raises PassError where there are no calibration samples."""
    if next(iter(context.feeds), None) is None:
        raise PassError(f"{name} needs calibration samples.", "Give calibration=... (--calibration x.npz).")


def bias_place(layer: LinearLayer) -> tuple[ir.Node, int] | None:
    """Where the layer's bias is: its own, an Add behind it, or the residual normalization it runs into."""
    found = bias_of(layer)
    if found is not None:
        node, index = found
        return found if constant(node.inputs[index], limit=1 << 20) is not None else None
    reader = only_consumer(layer.node.outputs[0])
    if is_op(reader, *_SKIPS, domain=MICROSOFT) and reader is not None:
        index = 4 if reader.op_type == _SKIPS[0] else 3
        if index < len(reader.inputs) and constant(reader.inputs[index], limit=1 << 20) is not None:
            return reader, index
    return None


def skip_of(layer: LinearLayer, shapes: SymbolicShapes) -> ir.Value | None:
    """The residual stream that the layer's result is added to, None where it is not."""
    result = result_of(layer)
    reader = only_consumer(result)
    if reader is None:
        return None
    if is_op(reader, "Add") or is_op(reader, *_SKIPS, domain=MICROSOFT):
        other = reader.inputs[int(reader.inputs[0] is result)]
        computed = other is not None and other.producer() is not None
        return other if computed and shapes.dims(other) == shapes.dims(result) else None
    return None


def weight_matrix(layer: LinearLayer) -> Array:
    """W, float64 [N, K]."""
    array = constant(layer.weight)
    if array is None:
        raise PassError(f"The weight {layer.weight.name} cannot be read.", "Please report it.")
    return layer.matrix(array)[0].astype(np.float64)


def problem_of(consumer: Consumer, units: Array, covariance: Array) -> Problem:
    """The layer as a problem over ``units``."""
    weight = weight_matrix(consumer.layer)
    return Problem(weight, covariance, blocks_of(consumer, units, weight.shape[1]))


def blocks_of(consumer: Consumer, units: Array, width: int) -> Array:
    """The columns of the layer's weight that each unit feeds, [units, columns of a unit]."""
    kernel = width // len(consumer.units)
    order = np.argsort(consumer.units, kind="stable")
    starts = np.searchsorted(consumer.units[order], units)
    size = int((consumer.units == units[0]).sum())
    channels = order[starts[:, None] + np.arange(size)]
    return (channels[:, :, None] * kernel + np.arange(kernel)).reshape(len(units), -1)


def moments_of(
    model: ir.Model, consumers: Sequence[Consumer], context: PassContext
) -> Iterator[tuple[ir.Value, Moments]]:
    """The moments of the distinct inputs of ``consumers``, one after the other, in the order of the graph."""
    layers = {consumer.x: consumer.layer for consumer in consumers}
    stages = stage_order(model, layers)
    masks = [{name: sample[name] for name in sample if name == MASK} for sample in context.feeds]
    stream = Stream(model, stages, context.feeds, _MEMORY, context.threads)
    for number, x in enumerate(stages):
        context.progress(f"statistics {number + 1}/{len(stages)}: {x.name}")
        moments = Moments()
        for mask, array in zip(masks, stream.advance(number), strict=True):
            moments.update(_inputs(layers[x], array, mask))
        yield x, moments


def kept_columns(consumer: Consumer, gone: Array, width: int) -> Array:
    """The columns of the layer's weight that stay."""
    return np.flatnonzero(np.repeat(~np.isin(consumer.units, gone), width // len(consumer.units)))


def store_matrix(layer: LinearLayer, matrix: Array) -> None:
    """Gives the layer the weight W [N, K]."""
    array = constant(layer.weight)
    if array is not None:
        store(layer.weight, layer.unmatrix(matrix, array.shape))


def mask(consumers: Sequence[Consumer], gone: Array) -> None:
    """Sets the columns of the units ``gone`` to zero in the weights of ``consumers``: the model then ignores them."""
    for consumer in consumers:
        weight = weight_matrix(consumer.layer)
        kept = kept_columns(consumer, gone, weight.shape[1])
        masked = np.zeros_like(weight)
        masked[:, kept] = weight[:, kept]
        store_matrix(consumer.layer, masked)


def refit(model: ir.Model, consumers: Sequence[Consumer], gone: Array, context: PassContext, by: str) -> list[Refit]:
    """Zeroes the columns of the units ``gone`` in the weights of ``consumers`` and fits the other columns.

    In the order of the graph, each on the inputs that the layers before it now give. The target is what the original
    gives; where the result is added to a residual stream, what is wrong there already is part of it. A layer with a
    bias is fitted about the means, and its bias takes up the difference of these.

    Args:
        model: changed in place: weights and biases only.
        consumers: the layers.
        gone: labels of units.
        context: samples.
        by: name of the pass.
    """
    return list(_Refitter(model.clone(), model, consumers, context).run(gone, by))


class _Refitter:
    def __init__(
        self, original: ir.Model, model: ir.Model, consumers: Sequence[Consumer], context: PassContext
    ) -> None:
        self._model, self._context = model, context
        shapes = SymbolicShapes(model)
        position = {node: number for number, node in enumerate(model.graph)}
        self._consumers = sorted(consumers, key=lambda consumer: position[consumer.layer.node])
        self._skips = [skip_of(consumer.layer, shapes) for consumer in self._consumers]
        self._masks = [{name: sample[name] for name in sample if name == MASK} for sample in context.feeds]
        made = {value.name: value for value in original.graph.inputs}
        made.update({value.name: value for node in original.graph for value in node.outputs})
        pairs = list(zip(self._consumers, self._skips, strict=True))
        self._now = Walk(model, [[c.x] if skip is None else [skip, c.x] for c, skip in pairs], context)
        results = [[result_of(c.layer)] if skip is None else [skip, result_of(c.layer)] for c, skip in pairs]
        self._then = Walk(original, [[made[value.name] for value in values] for values in results], context)
        self._names = Names(model)

    def run(self, gone: Array, by: str) -> Iterator[Refit]:
        for number, (consumer, skip) in enumerate(zip(self._consumers, self._skips, strict=True)):
            layer = consumer.layer
            self._context.progress(f"fitting {number + 1}/{len(self._consumers)}: {layer.weight.name}")
            place = bias_place(layer)
            self._now.reach(number)
            self._then.reach(number)
            moments = Moments()
            bias = constant(place[0].inputs[place[1]]) if place is not None else None
            outside = bias if place is not None and is_op(place[0], *_SKIPS, domain=MICROSOFT) else None
            for sample, mask in enumerate(self._masks):
                x = _inputs(layer, self._now.get(sample, consumer.x), mask)
                target = _outputs(layer, self._then.get(sample, result_of(layer)), mask)
                if outside is not None:
                    target = target + outside
                if skip is not None:
                    before = _outputs(layer, self._then.get(sample, skip), mask)
                    target = target + (before - _outputs(layer, self._now.get(sample, skip), mask))
                moments.update(x, target)
            yield self._fit(consumer, gone, moments, place, by)

    def _fit(
        self,
        consumer: Consumer,
        gone: Array,
        moments: Moments,
        place: tuple[ir.Node, int] | None,
        by: str,
    ) -> Refit:
        layer, centred = consumer.layer, place is not None
        weight = weight_matrix(layer)
        kept = kept_columns(consumer, gone, weight.shape[1])
        dropped = np.zeros_like(weight)
        dropped[:, kept] = weight[:, kept]
        covariance, cross, power = moments.covariance(centred), moments.cross(centred), moments.power(centred)
        alone = len(layer.weight.uses()) == 1
        new = least_squares(weight, covariance, cross, kept) if alone else dropped
        errors = [squared_error(item, covariance, cross, power) / max(power, 1e-30) for item in (dropped, new)]
        store_matrix(layer, new)
        if place is not None and alone:
            self._set_bias(place, moments.target_mean() - new @ moments.mean(), by)
        return Refit(layer.weight.name or "", errors[0], errors[1])

    def _set_bias(self, place: tuple[ir.Node, int], bias: Array, by: str) -> None:
        node, index = place
        value = node.inputs[index]
        array, graph = constant(value), node.graph
        if value is None or array is None or not isinstance(graph, ir.Graph):
            return
        shape = np.broadcast_shapes(array.shape, bias.shape)
        new = add_initializer(
            graph, self._names, f"{value.name}_fitted", bias.reshape(shape).astype(array.dtype, copy=False)
        )
        node.replace_input_with(index, new)
        node.metadata_props[PASS_KEY] = by
        drop_unused(value)


class Walk:
    """Samples on their way through a model, of which the values that steps ask for are kept until their last step.

    Args:
        model: the model; its weights may change behind the point reached.
        needs: for each step the values it looks at.
        context: samples.
    """

    def __init__(self, model: ir.Model, needs: Sequence[Sequence[ir.Value]], context: PassContext) -> None:
        self._needs = [{value.name or "" for value in values} for values in needs]
        stages = stage_order(model, dict.fromkeys(value for values in needs for value in values))
        self._stages = [value.name or "" for value in stages]
        self._stream = Stream(model, stages, context.feeds, _MEMORY, context.threads)
        self._store = ArrayStore(_MEMORY)
        self._reached = 0

    def reach(self, step: int) -> None:
        """Goes on until everything that ``step`` looks at was seen."""
        ahead = set[str]().union(*self._needs[step:])
        self._store.keep_only(ahead)
        while not self._needs[step] <= set(self._stages[: self._reached]):
            name = self._stages[self._reached]
            for sample, array in enumerate(self._stream.advance(self._reached)):
                if name in ahead:
                    self._store.put(sample, name, array)
            self._reached += 1

    def get(self, sample: int, value: ir.Value) -> Array:
        """What ``value`` (of this model, or of one with the same names) is for a sample."""
        return self._store.get(sample, value.name or "")


def _inputs(layer: LinearLayer, array: Array, mask: Feeds) -> Array:
    return layer.rows(array)[0] if is_op(layer.node, "Conv") else token_rows(array, mask)


def _outputs(layer: LinearLayer, array: Array, mask: Feeds) -> Array:
    if is_op(layer.node, "Conv"):
        return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])
    return token_rows(array, mask)
