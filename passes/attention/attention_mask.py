"""The mask of an attention block as the one additive tensor that the fused kernels take."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ...compiler.graph import Names, add_initializer, constant, is_op, make_node, opset, producer, scalar
from ..symbolic import SymbolicShapes
from .attention_match import AttentionMatch

# The numbers below are of the mask's own type: float32 or float16.
# ORT's CPU Attention-23 kernel takes exactly the lowest float for "masked" and gives 0 for rows that are masked
# everywhere, where softmax gives the mean of V. A hair above it, both agree: a score added to it is lost in rounding.
_HAIR = 0.9
_VIEWS = ("Expand", "Gather", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Transpose", "Slice")


class MaskBuilder:
    """Makes masks fit; one that had to be adapted is shared by all layers that use it.

    Args:
        model: the model that new nodes are for.
        shapes: its symbolic shapes.
        names: source of fresh names.
    """

    def __init__(self, model: ir.Model, shapes: SymbolicShapes, names: Names) -> None:
        self._shapes = shapes
        self._names = names
        self._opset = opset(model)
        self._made: dict[tuple[object, ...], ir.Value] = {}

    def bias(
        self, match: AttentionMatch, sources: list[ir.Value], graph: ir.Graph, new: list[ir.Node], *, lifted: bool
    ) -> ir.Value | None:
        """One additive bias of shape [1 or batch, 1 or heads, query length, key length], or None.

        Args:
            match: the attention block.
            sources: Q and K as [batch, length, hidden].
            graph: the graph it lies in.
            new: receives the nodes that make the bias, in order.
            lifted: replace the lowest floats (minus infinity too) by a number a hair above them.
        """
        if match.fill is None and not match.masks:
            return None
        lengths = (match.query.length, match.key.length)
        parts = tuple(match.fill.inputs) if match.fill is not None else tuple(match.masks)
        identity = (graph, lengths, parts, lifted)
        if identity not in self._made:
            value = self._joined(match, graph, new, lifted)
            dims = self._shapes.dims(value)
            if dims is None or len(dims) != 4 or dims[2:] != lengths:
                value = self._expand(value, sources, graph, new)
            self._made[identity] = value
        return self._made[identity]

    def _joined(self, match: AttentionMatch, graph: ir.Graph, new: list[ir.Node], lifted: bool) -> ir.Value:
        if match.fill is not None:
            condition, yes, no = match.fill.inputs
            first = scalar(yes) is not None
            low = scalar(yes) if first else scalar(no)
            dtype = match.fill.outputs[0].dtype or ir.DataType.FLOAT
            number = _lowest(dtype) if low is None or math.isfinite(low) else low
            branches = [number, 0.0] if first else [0.0, number]
            return self._where(condition, branches, dtype, graph, new, lifted)
        value = match.masks[0]
        if value.dtype == ir.DataType.BOOL:  # of an ONNX Attention
            dtype = match.last.outputs[0].dtype or ir.DataType.FLOAT
            return self._where(value, [0.0, -math.inf], dtype, graph, new, lifted)
        for other in match.masks[1:]:
            value = self._append("Add", [value, other], "mask_sum", value.dtype, new)
        if not lifted:
            return value
        node = producer(value, "Where")
        numbers = [scalar(item) for item in node.inputs[1:]] if node is not None else []
        known = [item for item in numbers if item is not None]
        dtype = value.dtype or ir.DataType.FLOAT
        lowest = _HAIR * _lowest(dtype)
        if node is not None and len(known) == 2:
            return value if min(known) >= lowest else self._where(node.inputs[0], known, dtype, graph, new, lifted)
        floor = add_initializer(graph, self._names, "mask_floor", np.array(lowest, dtype.numpy()))
        made = self._append("Max", [value, floor], "mask_lifted", value.dtype, new)
        made.shape = value.shape
        return made

    def _where(
        self,
        condition: ir.Value | None,
        branches: list[float],
        dtype: ir.DataType,
        graph: ir.Graph,
        new: list[ir.Node],
        lifted: bool,
    ) -> ir.Value:
        numbers = [max(number, _HAIR * _lowest(dtype)) if lifted else number for number in branches]
        arrays = [np.array(number, dtype.numpy()) for number in numbers]
        sources = [add_initializer(graph, self._names, "mask_value", array) for array in arrays]
        made = self._append("Where", [condition, *sources], "mask", dtype, new)
        made.shape = condition.shape if condition is not None else None
        return made

    def _expand(self, value: ir.Value, sources: list[ir.Value], graph: ir.Graph, new: list[ir.Node]) -> ir.Value:
        """Broadcasts to full query and key length, which the kernels demand; batch and heads may stay 1."""
        ones = add_initializer(graph, self._names, "mask_ones", np.array([1, 1], np.int64))
        lengths = [self._length(source, graph, new) for source in sources]
        target = self._append("Concat", [ones, *lengths], "mask_shape", ir.DataType.INT64, new, axis=0)
        return self._append("Expand", [value, target], "mask_expanded", value.dtype, new)

    def _length(self, source: ir.Value, graph: ir.Graph, new: list[ir.Node]) -> ir.Value:
        """The length (axis 1) of a [batch, length, hidden] tensor, as a tensor of one element."""
        if self._opset >= 15:
            return self._append("Shape", [source], "length", ir.DataType.INT64, new, start=1, end=2)
        one = add_initializer(graph, self._names, "length_axis", np.array([1], np.int64))
        whole = self._append("Shape", [source], "length_shape", ir.DataType.INT64, new)
        return self._append("Gather", [whole, one], "length", ir.DataType.INT64, new, axis=0)

    def _append(
        self,
        op: str,
        inputs: list[ir.Value | None],
        base: str,
        dtype: ir.DataType | None,
        new: list[ir.Node],
        **attributes: int,
    ) -> ir.Value:
        name = self._names.fresh(f"attention_{base}")
        node = make_node(
            op, inputs, name=name, output=self._names.fresh(f"{name}_out"), dtype=dtype, attributes=attributes
        )
        new.append(node)
        return node.outputs[0]


def _lowest(dtype: ir.DataType) -> float:
    return float(np.finfo(dtype.numpy()).min)


def is_finite(match: AttentionMatch) -> bool:
    """Whether no row of the mask can be minus infinity everywhere, so that no probability is NaN."""
    if match.fill is not None:
        return all(number is None or math.isfinite(number) for number in map(scalar, match.fill.inputs[1:]))
    dtype = match.last.outputs[0].dtype or ir.DataType.FLOAT
    return math.fsum(map(_bound, match.masks)) <= -_lowest(dtype)


def is_written_infinity(match: AttentionMatch) -> bool:
    """Whether the mask is ``Where`` over 0 and minus infinity: a row is masked everywhere or a softmax as usual."""
    where = match.fill if match.fill is not None else (producer(match.masks[0], "Where") if match.masks else None)
    if where is None or len(match.masks) > 1:
        return False
    numbers = {number for number in map(scalar, where.inputs[1:]) if number is not None}
    return numbers == {0.0, -math.inf} if match.fill is None else numbers == {-math.inf}


def _bound(value: ir.Value | None) -> float:
    """A number that no element of ``value`` exceeds in size; infinity where none is known."""
    node = producer(value)
    if node is None:
        array = constant(value, limit=1 << 20)
        return float(np.abs(array).max(initial=0.0)) if array is not None and array.dtype.kind == "f" else math.inf
    if is_op(node, "Where"):
        return max(_bound(node.inputs[1]), _bound(node.inputs[2]))
    if is_op(node, "Add"):
        return _bound(node.inputs[0]) + _bound(node.inputs[1])
    if is_op(node, *_VIEWS):
        return _bound(node.inputs[0])
    return math.inf
