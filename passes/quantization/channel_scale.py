"""Dividing a value by one number per channel without a node for it: the constants in front take the factor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.graph import (
    FROM_KEY,
    MICROSOFT,
    PASS_KEY,
    Array,
    Names,
    add_initializer,
    attribute,
    constant,
    dims,
    is_op,
    rank,
    scalar,
)
from ..linear_layers import FLOATS, LinearLayer, linear_layer
from ..matching import NORMALIZATIONS, next_node, operands

# f(s x) = s f(x) for s > 0, channel by channel
_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Identity")
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")


class CannotFold(Exception):
    """The factor cannot go into the constants in front; the message says why."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A constant input of a node that takes the factor; ``layer`` where it is the weight of one."""

    node: ir.Node
    index: int
    layer: LinearLayer | None = None


def find_places(value: ir.Value, axis: int) -> list[Place]:
    """The constants that must be divided so that ``value`` is divided per channel.

    Args:
        value: the value; who reads it is the caller's business.
        axis: where its channels are: -1 behind MatMul, Gemm and normalizations, 1 behind Conv.

    Raises:
        CannotFold: something between is not proportional to any constant, is also used elsewhere, or is not float32.
    """
    node = value.producer()
    if node is None:
        raise CannotFold(f"{value.name} is an input of the graph")
    normal = NORMALIZATIONS.get((node.op_type, node.domain))
    if normal is not None and axis == -1:
        _check_normalization(node, value)
        return [_place(node, index) for index in normal if index < len(node.inputs) and node.inputs[index] is not None]
    layer = linear_layer(node)
    if layer is not None and layer.channel_axis == axis:
        return _layer_places(node, layer)
    if is_op(node, *_HOMOGENEOUS) or (axis == 1 and is_op(node, *_POOLS)) or _is_lower_bound(node):
        return _through(node, node.inputs[0], axis)
    if is_op(node, "Add", "Mul"):
        return _binary_places(node, value, axis)
    if is_op(node, "Attention") or is_op(node, "MultiHeadAttention", domain=MICROSOFT):
        _check_attention(node, value, axis)
        return _through(node, node.inputs[2], axis)
    raise CannotFold(f"{node.op_type} {node.name} in front of it does not pass a factor on")


def divide(places: Sequence[Place], factor: Array, axis: int, names: Names, by: str) -> None:
    """Divides the constants at ``places`` by ``factor``, one number per channel; other readers keep the old ones."""
    for place in places:
        value, graph = place.node.inputs[place.index], place.node.graph
        array = constant(value)
        if value is None or array is None or not isinstance(graph, ir.Graph):
            raise ValueError(f"input {place.index} of {place.node.name} is not constant")
        inverse = 1.0 / factor.astype(np.float64)
        if place.layer is not None:
            scaled = place.layer.times_outputs(array, inverse)
        elif array.size == 1:  # one number for all channels becomes one each
            after = (rank(place.node.outputs[0]) or 0) - 2 if axis == 1 and is_op(place.node, "Add", "Mul") else 0
            scaled = (array.reshape(-1) * inverse).reshape(-1, *[1] * after)
        else:
            scaled = array * inverse.reshape(array.shape)
        new = add_initializer(graph, names, f"{value.name}_scaled", scaled.astype(array.dtype))
        set_input(place.node, place.index, new, by)


def set_input(node: ir.Node, index: int, new: ir.Value, by: str) -> None:
    """Gives ``node`` another constant, says so in its metadata, and drops the old one if nobody reads it any more."""
    old = node.inputs[index]
    node.replace_input_with(index, new)
    node.metadata_props.setdefault(FROM_KEY, f"{node.op_type}:{node.name}")
    node.metadata_props[PASS_KEY] = by
    if old is not None and old.is_initializer() and not old.uses() and not old.is_graph_output() and old.graph:
        old.graph.initializers.pop(old.name or "", None)


def _through(node: ir.Node, value: ir.Value | None, axis: int) -> list[Place]:
    """The places in front of an operand that only ``node`` reads."""
    if value is None or next_node(value) is not node:
        raise CannotFold(f"{value.name if value else 'a missing input'} is also used elsewhere")
    return find_places(value, axis)


def _place(node: ir.Node, index: int) -> Place:
    value = node.inputs[index]
    if value is None or not value.is_initializer() or value.is_graph_input():
        raise CannotFold(f"{value.name if value else 'an input'} of {node.op_type} {node.name} is not constant")
    if value.dtype not in FLOATS:
        raise CannotFold(f"{value.name} is {value.dtype}: scaled, it would be rounded a second time")
    return Place(node, index)


def _check_normalization(node: ir.Node, value: ir.Value) -> None:
    width = rank(value)
    last = attribute(node, "axis", -1)
    if node.domain == "" and last != -1 and last != (width or 0) - 1:
        raise CannotFold(f"{node.op_type} {node.name} normalizes more than the last axis")
    if value is not node.outputs[0]:
        raise CannotFold(f"{value.name} is the sum inside {node.name}, not what it normalized")


def _check_attention(node: ir.Node, value: ir.Value, axis: int) -> None:
    """Each channel of the result is a mean over one channel of the values, if every head has values of its own."""
    packed = len(node.inputs) < 3 or node.inputs[2] is None
    if axis != -1 or rank(value) != 3 or packed or rank(node.inputs[2]) != 3 or value is not node.outputs[0]:
        raise CannotFold(f"{node.op_type} {node.name} does not lay its channels out along the last axis")
    if attribute(node, "q_num_heads", 0) != attribute(node, "kv_num_heads", 0):
        raise CannotFold(f"several heads of {node.op_type} {node.name} read the same values")
    # Standard: past_value, and present_value as an output. MultiHeadAttention: bias of q, k and v, past_value.
    more = [(*node.inputs, *[None] * 8)[index] for index in ((5,) if not node.domain else (3, 7))]
    if any(extra is not None for extra in more) or any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        raise CannotFold(f"{node.op_type} {node.name} has a cache or a bias of its own, which the factor would change")


def _layer_places(node: ir.Node, layer: LinearLayer) -> list[Place]:
    weight = _place(node, 1)
    if len(layer.weight.uses()) != 1:
        raise CannotFold(f"the weight {layer.weight.name} is also used elsewhere")
    places = [dataclasses.replace(weight, layer=layer)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = _place(node, 2)
        if (rank(node.inputs[2]) or 0) > 1:
            raise CannotFold(f"the bias {node.inputs[2].name} is not a vector")
        places.append(bias)
    return places


def _binary_places(node: ir.Node, result: ir.Value, axis: int) -> list[Place]:
    for value, other in operands(node):
        if other.is_initializer() and not other.is_graph_input():
            _check_vector(other, result, axis)
            place = _place(node, 0 if node.inputs[0] is other else 1)
            return [place] if is_op(node, "Mul") else [place, *_through(node, value, axis)]
    if is_op(node, "Add"):
        raise CannotFold(f"{result.name} is a sum of two values ({node.name}), as a residual is")
    reasons: list[str] = []
    for value in dict.fromkeys(node.inputs):  # a gated product: one of the factors may be linear
        if value is None or dims(value) != dims(result) or None in (dims(result) or [None]):
            continue
        try:
            return _through(node, value, axis)
        except CannotFold as error:
            reasons.append(str(error))
    raise CannotFold("; ".join(reasons) or f"the factors of {node.name} do not have its shape")


def _check_vector(other: ir.Value, result: ir.Value, axis: int) -> None:
    """A constant that has one number, or one for each channel and nothing else."""
    shape, whole = dims(other) or [], dims(result) or []
    width = len(whole)
    position = axis if axis < 0 else axis - width
    for index, size in enumerate(shape):
        from_end = index - len(shape)
        if size != 1 and (from_end != position or not whole or size != whole[from_end]):
            raise CannotFold(f"the constant {other.name} does not have one number per channel")


def _is_lower_bound(node: ir.Node) -> bool:
    """Clip(x, 0) without an upper bound, which is Relu."""
    if not is_op(node, "Clip"):
        return False
    if "min" in node.attributes or "max" in node.attributes:
        return attribute(node, "min") == 0.0 and attribute(node, "max", 3.4e38) >= 3.4e38
    low, high = (*node.inputs[1:], None, None)[:2]
    return low is not None and scalar(low) == 0.0 and high is None
