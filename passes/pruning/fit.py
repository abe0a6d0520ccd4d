"""The weights that are left, fitted by least squares to what the original computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.base import PassContext
from ...compiler.graph import MICROSOFT, PASS_KEY, Array, Names, add_initializer, constant, is_op, only_consumer
from ...runtime.errors import PassError
from ..linear_layers import LinearLayer, bias_of, result_of
from ..quantization.quantized_layers import store
from ..symbolic import SymbolicShapes
from .blocks import alike
from .cut import drop_unused
from .obs import Problem, least_squares, squared_error
from .statistics import Moments, Walk, input_rows, masks_of, output_rows, require_finite
from .units import Consumer

_SKIPS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_HELD_OUT = 5  # every fifth sample chooses the ridge


@dataclasses.dataclass(frozen=True)
class Task:
    """One layer to fit.

    Attributes:
        layer: the layer y = W x + b.
        x: its input.
        kept: the columns of W that may have weights.
        target: values of the original whose sum the layer is to give, together with ``skip``.
        skip: the residual stream that y is added to; what is wrong in it already is made up for.
        offset: a constant vector that belongs to the target.
    """

    layer: LinearLayer
    x: ir.Value
    kept: Array
    target: tuple[ir.Value, ...]
    skip: ir.Value | None = None
    offset: Array | None = None


@dataclasses.dataclass(frozen=True)
class Refit:
    """What one layer lost, as shares of the energy of its target.

    Attributes:
        name: of the weight.
        dropped: with its other weights as they were.
        fitted: after the refit.
    """

    name: str
    dropped: float
    fitted: float


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
        return other if computed and alike(shapes.dims(other), shapes.dims(result)) else None
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

    Args:
        model: changed in place: weights and biases only.
        consumers: the layers.
        gone: labels of units.
        context: samples.
        by: name of the pass.
    """
    shapes = SymbolicShapes(model)
    tasks: list[Task] = []
    for consumer in consumers:
        layer = consumer.layer
        kept = kept_columns(consumer, gone, weight_matrix(layer).shape[1])
        skip, result = skip_of(layer, shapes), result_of(layer)
        target = (result,) if skip is None else (skip, result)
        tasks.append(Task(layer, consumer.x, kept, target, skip, outside_bias(layer)))
    return fit(model.clone(), model, tasks, context, by)


def outside_bias(layer: LinearLayer) -> Array | None:
    """The layer's bias, if it is added by the residual normalization that the layer runs into."""
    place = bias_place(layer)
    return (
        constant(place[0].inputs[place[1]])
        if place is not None and is_op(place[0], *_SKIPS, domain=MICROSOFT)
        else None
    )


def fit(original: ir.Model, model: ir.Model, tasks: Sequence[Task], context: PassContext, by: str) -> list[Refit]:
    """Fits the layers of ``tasks`` in the order of the graph, each on the inputs that the layers before it now give.

    A layer with a bias is fitted about the means, and its bias takes up the difference of these. How far weights may
    move is decided by a fifth of the samples. A weight that others use too is only masked.

    Args:
        original: gives the targets.
        model: changed in place: weights and biases only.
        tasks: the layers, of ``model``.
        context: samples.
        by: name of the pass.
    """
    position = {node: number for number, node in enumerate(model.graph)}
    ordered = sorted(tasks, key=lambda task: position[task.layer.node])
    made = {value.name: value for value in original.graph.inputs}
    made.update({value.name: value for node in original.graph for value in node.outputs})
    now = Walk(model, [[task.x] if task.skip is None else [task.skip, task.x] for task in ordered], context)
    then = Walk(original, [[made[value.name] for value in task.target] for task in ordered], context)
    names, masks = Names(model), masks_of(context)
    fits: list[Refit] = []
    for number, task in enumerate(ordered):
        context.progress(f"fitting {number + 1}/{len(ordered)}: {task.layer.weight.name}")
        now.reach(number)
        then.reach(number)
        parts = (Moments(), Moments())
        for sample, mask in enumerate(masks):
            target = sum(output_rows(task.layer, then.get(sample, value), mask) for value in task.target)
            if task.offset is not None:
                target = target + task.offset
            if task.skip is not None:
                target = target - output_rows(task.layer, now.get(sample, task.skip), mask)
            rows = input_rows(task.layer, now.get(sample, task.x), mask)
            parts[sample % _HELD_OUT == _HELD_OUT - 1].update(rows, np.asarray(target))
        for part in (part for part in parts if part.count):
            require_finite(task.layer.weight.name, part.covariance(False), part.power(False))
        fits.append(_fit_one(task, parts, names, by))
    return fits


def _fit_one(task: Task, parts: tuple[Moments, Moments], names: Names, by: str) -> Refit:
    layer, place = task.layer, bias_place(task.layer)
    weight, centred = weight_matrix(layer), place is not None
    dropped = np.zeros_like(weight)
    dropped[:, task.kept] = weight[:, task.kept]
    moments = parts[0].plus(parts[1]) if parts[1].count else parts[0]
    alone = len(layer.weight.uses()) == 1
    new = _solve(weight, moments, centred, task.kept, _ridge(weight, parts, centred, task.kept)) if alone else dropped
    power = max(moments.power(centred), 1e-30)
    dropped_error, error = (_error(item, moments, centred) / power for item in (dropped, new))
    store_matrix(layer, new)
    if place is not None and alone:
        _set_bias(place, moments.target_mean() - new @ moments.mean(), names, by)
    return Refit(layer.weight.name or "", dropped_error, error)


def _solve(weight: Array, moments: Moments, centred: bool, kept: Array, ridge: float) -> Array:
    return least_squares(weight, moments.covariance(centred), moments.cross(centred), kept, ridge)


def _error(weight: Array, moments: Moments, centred: bool) -> float:
    return squared_error(weight, moments.covariance(centred), moments.cross(centred), moments.power(centred))


def _ridge(weight: Array, parts: tuple[Moments, Moments], centred: bool, kept: Array) -> float:
    """The ridge that is best on the samples held out; a middle one where there are none."""
    if not parts[1].count:
        return _RIDGES[2]
    errors = [_error(_solve(weight, parts[0], centred, kept, ridge), parts[1], centred) for ridge in _RIDGES]
    return _RIDGES[int(np.argmin(errors))]


def _set_bias(place: tuple[ir.Node, int], bias: Array, names: Names, by: str) -> None:
    node, index = place
    value = node.inputs[index]
    array, graph = constant(value), node.graph
    if value is None or array is None or not isinstance(graph, ir.Graph):
        return
    shape = np.broadcast_shapes(array.shape, bias.shape)
    new = add_initializer(graph, names, f"{value.name}_fitted", bias.reshape(shape).astype(array.dtype))
    node.replace_input_with(index, new)
    node.metadata_props[PASS_KEY] = by
    drop_unused(value)
