"""Layers with constant weights (MatMul, Gemm, Conv) as the corrections look at them: channels, rows, bias."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..compiler.base import PassContext
from ..compiler.graph import Array, attribute, constant, dims, is_fixed, is_op, producer, rank
from ..runtime.calibrate import Observer, observe
from .matching import next_node, operands

FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True)
class LinearLayer:
    """``y = W x``, with W an initializer, or an initializer behind DequantizeLinear.

    Attributes:
        node: the MatMul, Gemm or Conv.
        groups: groups of a Conv, else 1.
    """

    node: ir.Node
    groups: int = 1

    @property
    def weight(self) -> ir.Value:
        """What the node reads as W."""
        value = self.node.inputs[1]
        if value is None:
            raise ValueError(f"{self.node.name} has no weight")
        return value

    @property
    def dequantize(self) -> ir.Node | None:
        """The DequantizeLinear that makes the weight, None where it is stored as it is."""
        return producer(self.weight, "DequantizeLinear")

    @property
    def out_axis(self) -> int:
        """Axis of the stored weight that counts output channels."""
        return 0 if is_op(self.node, "Conv") or attribute(self.node, "transB", 0) else 1

    @property
    def stored(self) -> ir.Value:
        """The initializer that holds the weight or its codes."""
        value = self.dequantize.inputs[0] if self.dequantize is not None else self.weight
        return value or self.weight

    @property
    def channel_axis(self) -> int:
        """Axis of x and y that counts channels."""
        return 1 if is_op(self.node, "Conv") else -1

    def matrix(self, array: Array) -> Array:
        """An array of the weight's shape as [groups, outputs of a group, inputs of an output]."""
        flat = array.reshape(array.shape[0], -1) if self.out_axis == 0 else array.T
        return flat.reshape(self.groups, flat.shape[0] // self.groups, flat.shape[1])

    def unmatrix(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of ``matrix``: an array of the weight's ``shape``."""
        flat = matrix.reshape(-1, matrix.shape[-1])
        return np.ascontiguousarray(flat.reshape(shape) if self.out_axis == 0 else flat.T)

    def by_input(self, array: Array) -> Array:
        """The weight with one row for each input channel: [input channels, all that read it]."""
        if not is_op(self.node, "Conv"):
            return array if self.out_axis == 1 else array.T
        outputs, inputs = array.shape[:2]
        split = array.reshape(self.groups, outputs // self.groups, inputs, -1).transpose(0, 2, 1, 3)
        return split.reshape(self.groups * inputs, -1)

    def by_output(self, array: Array) -> Array:
        """The weight with one row for each output channel."""
        return self.matrix(array).reshape(-1, self.matrix(array).shape[-1])

    def times_inputs(self, array: Array, factor: Array) -> Array:
        """The weight with every input channel multiplied by its number in ``factor``."""
        if not is_op(self.node, "Conv"):
            return array * (factor[:, None] if self.out_axis == 1 else factor[None, :])
        outputs, inputs = array.shape[:2]
        split = array.reshape(self.groups, outputs // self.groups, inputs, -1)
        return (split * factor.reshape(self.groups, 1, inputs, 1)).reshape(array.shape)

    def times_outputs(self, array: Array, factor: Array) -> Array:
        """The weight with every output channel multiplied by its number in ``factor``."""
        shape = [1] * array.ndim
        shape[self.out_axis] = -1
        return array * factor.reshape(shape)

    def rows(self, x: Array) -> Array:
        """The inputs of one output, for every position of x: [groups, rows, inputs of an output].

        For a Conv these are its patches, padding included, as zeros.
        """
        if not is_op(self.node, "Conv"):
            return x.reshape(1, -1, x.shape[-1])
        return _patches(self.node, x, dims(self.stored) or [], self.groups)


def linear_layer(node: ir.Node) -> LinearLayer | None:
    """``node`` as a layer with constant weights, or None."""
    if not is_op(node, "MatMul", "Gemm", "Conv") or len(node.inputs) < 2 or attribute(node, "transA", 0):
        return None
    weight = node.inputs[1]
    dequantize = producer(weight, "DequantizeLinear")
    stored = dequantize.inputs[0] if dequantize is not None else weight
    if weight is None or not is_fixed(stored) or is_fixed(node.inputs[0]):
        return None
    shape = dims(stored)
    if shape is None or (len(shape) != 2) != is_op(node, "Conv"):
        return None
    return LinearLayer(node, attribute(node, "group", 1))


def bias_of(layer: LinearLayer) -> tuple[ir.Node, int] | None:
    """The node and the input that hold the layer's bias: its own third input, or the Add behind it."""
    if not is_op(layer.node, "MatMul"):
        has = len(layer.node.inputs) > 2 and layer.node.inputs[2] is not None
        return (layer.node, 2) if has else None
    add = next_node(layer.node.outputs[0])
    if add is None or not is_op(add, "Add"):
        return None
    for value, other in operands(add):
        if value is layer.node.outputs[0] and _is_vector(other):
            return add, 0 if add.inputs[0] is other else 1
    return None


def result_of(layer: LinearLayer) -> ir.Value:
    """What the layer computes, its bias included."""
    bias = bias_of(layer)
    return (layer.node if bias is None else bias[0]).outputs[0]


def float_weight(layer: LinearLayer) -> Array | None:
    """The weight of a layer that is not quantized, None for types other than float32 and float64."""
    if layer.dequantize is not None or layer.weight.dtype not in FLOATS:
        return None
    return constant(layer.weight)


def watch(model: ir.Model, observers: Mapping[LinearLayer, Observer], context: PassContext) -> None:
    """Shows the input of each layer to its observer, in one run over the samples; layers may share an input."""
    by_value: dict[str, list[Observer]] = {}
    for layer, observer in observers.items():
        value = layer.node.inputs[0]
        by_value.setdefault((value.name if value is not None else None) or "", []).append(observer)
    several = {name: _Several(members) for name, members in by_value.items()}
    if several:
        observe(model, several, context.feeds, threads=context.threads, progress=context.progress)


class _Several:
    """Shows one value to several observers."""

    def __init__(self, members: Sequence[Observer]) -> None:
        self.members = members

    def update(self, array: Array) -> None:
        for member in self.members:
            member.update(array)


def _is_vector(value: ir.Value) -> bool:
    source = producer(value, "DequantizeLinear")
    return is_fixed(source.inputs[0] if source is not None else value) and rank(value) == 1


def _patches(node: ir.Node, x: Array, shape: list[int | str | None], groups: int) -> Array:
    """Patches of x [n, channels, ...] under a convolution: [groups, n * positions, channels / groups * kernel]."""
    kernel = tuple(size for size in shape[2:] if isinstance(size, int))
    axes = len(kernel)
    dilations = attribute(node, "dilations", [1] * axes)
    strides = attribute(node, "strides", [1] * axes)
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    pads = _pads(node, x.shape[2:], reach, strides)
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + axes)))
    picked = windows[(slice(None), slice(None), *(slice(None, None, step) for step in strides))]
    picked = picked[(..., *(slice(None, None, step) for step in dilations))]
    channels = x.shape[1]
    order = (1, 0, *range(2, 2 + 2 * axes))
    moved = picked.transpose(order).reshape(groups, channels // groups, -1, int(np.prod(kernel)))
    return moved.transpose(0, 2, 1, 3).reshape(groups, -1, channels // groups * int(np.prod(kernel)))


def _pads(node: ir.Node, sizes: tuple[int, ...], reach: list[int], strides: list[int]) -> list[tuple[int, int]]:
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads: list[tuple[int, int]] = []
        for size, width, stride in zip(sizes, reach, strides, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + width - size)
            less, more = total // 2, total - total // 2
            pads.append((less, more) if mode == "SAME_UPPER" else (more, less))
        return pads
    axes = len(sizes)
    values = attribute(node, "pads", [0] * (2 * axes)) if mode == "NOTSET" else [0] * (2 * axes)
    return [(int(values[axis]), int(values[axis + axes])) for axis in range(axes)]
