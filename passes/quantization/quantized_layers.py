"""Quantized layers beside the float ones they were made from, as AdaRound and bias correction need them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ...compiler.base import PassContext
from ...compiler.graph import FROM_KEY, PASS_KEY, Array, attribute, constant
from ...compiler.variants import float_constant, is_quantized
from ...runtime.errors import PassError
from ..linear_layers import LinearLayer, linear_layer


def reference_model(given: ir.Model | None, context: PassContext, name: str) -> ir.Model:
    """The float graph that a correction works towards.

    Raises:
        PassError: there is none.
    """
    reference = given if given is not None else context.reference
    if reference is None or is_quantized(reference):
        raise PassError(
            f"{name} needs the float model that was quantized.",
            f"Put it behind the quantizing pass in one compile, or give {name} its reference=.",
        )
    return reference


def quantized_layers(model: ir.Model) -> Iterator[LinearLayer]:
    """The layers of the main graph whose weights are behind DequantizeLinear."""
    for node in model.graph:
        layer = linear_layer(node)
        if layer is not None and layer.dequantize is not None:
            yield layer


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A stored weight with everything in its shape.

    Attributes:
        codes: the integers.
        scale: step of each.
        zero: zero point of each.
        exact: the float weights.
    """

    codes: Array
    scale: Array
    zero: Array
    exact: Array


def quantized_weight(layer: LinearLayer, reference: ir.Model) -> QuantizedWeight | str:
    """The weight of a quantized layer with the float one, or why there is none."""
    node, stored = layer.dequantize, layer.stored
    if node is None:
        return "the weight is not quantized"
    if len(stored.uses()) != 1 or len(node.outputs[0].uses()) != 1:
        return f"the weight {stored.name} is also used elsewhere"
    makers = {value.name: maker for maker in reference.graph for value in maker.outputs}
    tensor = float_constant(node, stored, reference, makers)
    codes, scale = constant(stored), constant(node.inputs[1])
    if tensor is None or codes is None or scale is None:
        return f"the float model has no weight of the shape of {stored.name} in its place"
    point = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros_like(scale)
    if point is None:
        return f"the zero point of {stored.name} is not constant"
    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    steps, points = (_spread(array.astype(np.float64), codes.shape, axis, block) for array in (scale, point))
    return QuantizedWeight(codes.astype(np.float64), steps, points, tensor.numpy().astype(np.float64))


def store(value: ir.Value, array: Array) -> None:
    """Gives an initializer new content of the same type and shape."""
    old = value.const_value
    if old is not None:
        new = np.ascontiguousarray(array.astype(old.numpy().dtype))
        value.const_value = ir.Tensor(new, dtype=old.dtype, name=value.name)


def mark(node: ir.Node, by: str) -> None:
    """Writes into the metadata of ``node`` that ``by`` changed its constants."""
    node.metadata_props.setdefault(FROM_KEY, f"{node.op_type}:{node.name}")
    node.metadata_props[PASS_KEY] = by


def _spread(values: Array, shape: tuple[int, ...], axis: int, block: int) -> Array:
    """Scales or zero points, one for each element of a tensor of ``shape`` (DequantizeLinear-21)."""
    if values.size == 1:
        return np.full(shape, values.reshape(-1)[0])
    if block:
        return np.repeat(values, block, axis=axis)[tuple(slice(size) for size in shape)]
    form = [1] * len(shape)
    form[axis] = -1
    return np.broadcast_to(values.reshape(form), shape)
