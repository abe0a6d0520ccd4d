"""Products with stored matrices: each rank has some of the columns, or some of the rows and adds up.

Quantized ones too, where their sums can be taken in parts: then scales and zero points are cut with the codes.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import onnx_ir as ir

from ...compiler.graph import MICROSOFT, attribute, constant, is_op, producer
from .splits import CannotSplit, Found, Sources, Split, divide, first

if TYPE_CHECKING:
    from .sharder import Sharder

_SMALLEST = 0.001  # of all weights: a smaller weight stays whole
LARGE = 0.01
"""Of all weights: a smaller table stays whole."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """How an operator multiplies with a matrix.

    Attributes:
        weight: the input that is the matrix.
        columns: inputs that have one number, or one for each column.
        bias: input that is added once.
        whole: why its sum cannot be taken in parts; empty if it can.
    """

    weight: int = 1
    columns: tuple[int, ...] = ()
    bias: int | None = None
    whole: str = ""


PRODUCTS = {
    "MatMul": Kind(),
    "Gemm": Kind(bias=2),
    "MatMulNBits": Kind(bias=5),
    "MatMulInteger": Kind(columns=(3,)),
    "MatMulIntegerToFloat": Kind(columns=(3, 5), bias=6),
    "DynamicQuantizeMatMul": Kind(columns=(2, 3), bias=4, whole="it rounds its input by the range of the whole"),
    "QLinearMatMul": Kind(weight=3, columns=(4, 5), whole="it rounds its sum"),
}


def kind_of(node: ir.Node) -> Kind | None:
    """How ``node`` multiplies, None if it does not."""
    return PRODUCTS.get(node.op_type) if node.domain in ("", MICROSOFT) else None


def is_quantized(node: ir.Node) -> bool:
    """Whether ``node`` is a product of which an operand is integers, or that makes them of an activation."""
    kind = kind_of(node)
    if kind is None or node.op_type not in ("MatMul", "Gemm"):
        return kind is not None or is_op(node, "DynamicQuantizeLinear")
    weight = node.inputs[1]
    turned = producer(weight, "Transpose")
    return producer(turned.inputs[0] if turned is not None else weight, "DequantizeLinear") is not None


def begin(sharder: Sharder, node: ir.Node) -> None:
    """Lets a product divide its columns, or a table its width; nothing for any other node.

    Raises:
        CannotSplit: it cannot.
    """
    if is_op(node, "Gather") and attribute(node, "axis", 0) == 0:
        _begin_table(sharder, node)
    elif is_op(node, "GatherBlockQuantized", domain=MICROSOFT):
        _begin_quantized_table(sharder, node)
    elif kind_of(node) is not None and not attribute(node, "transA", 0) and _is_divisible(sharder, node):
        output = node.outputs[0]
        split = divide(0, _pieces(output, _width(sharder, node)), sharder.ranks, sharder.unit(node))
        _cut_columns(sharder, node, split)
        sharder.divide(output, split.on(len(sharder.shape(output)) - 1), frozenset([node]))


def matmul(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    """A MatMul, also of two activations."""
    left, right = node.inputs[:2]
    output = node.outputs[0]
    if left is None or right is None:
        raise CannotSplit("an input is missing")
    a, b = sharder.splits.get(left), sharder.splits.get(right)
    ranks = len(sharder.shape(left)), len(sharder.shape(right)), len(sharder.shape(output))
    if a is not None and b is None and a.axis == ranks[0] - 1:
        return _add_up(sharder, node, a)
    aligned = {split.on(split.axis + ranks[2] - rank) for split, rank in ((a, ranks[0]), (b, ranks[1])) if split}
    if len(aligned) != 1:
        raise CannotSplit("the factors of a product are divided differently")
    split = aligned.pop()
    rows = split.axis == ranks[2] - 2 and b is None
    columns = split.axis == ranks[2] - 1 and a is None
    if not (rows or columns or split.axis < ranks[2] - 2):
        raise CannotSplit("a product sums over it")
    if split.axis < ranks[2] - 2:
        for value, own, rank in ((left, a, ranks[0]), (right, b, ranks[1])):
            axis = split.axis - (ranks[2] - rank)
            if own is None and axis >= 0 and sharder.shape(value)[axis] != 1:
                if value.is_graph_input():
                    sharder.divide_input(value, split.on(axis), sources)
                raise CannotSplit(f"{value.name} is whole, and the other factor is not")
    return {output: split}


def product(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    """A product of an activation with a stored matrix."""
    value, split = first(sharder, node)
    if split.axis != len(sharder.shape(value)) - 1 and not attribute(node, "transA", 0):
        return {node.outputs[0]: split}
    if attribute(node, "transA", 0):
        raise CannotSplit("a Gemm of this form needs it whole")
    return _add_up(sharder, node, split)


def _add_up(sharder: Sharder, node: ir.Node, split: Split) -> Found:
    """Each rank has the rows of the matrix that go with its columns of the activation."""
    kind = PRODUCTS[node.op_type]
    if kind.whole:
        raise CannotSplit(f"{node.op_type} needs it whole: {kind.whole}")
    if not _is_stored(sharder, node):
        raise CannotSplit("it is multiplied with what is no constant matrix")
    if node.op_type == "MatMulNBits":
        _cut_rows_of_blocks(sharder, node, split)
    else:
        sharder.cut(node, kind.weight, split.on(1 if attribute(node, "transB", 0) else 0))
    if kind.bias is not None and len(node.inputs) > kind.bias and node.inputs[kind.bias] is not None:
        sharder.only_on_first(node, kind.bias)
    sharder.add_up(node.outputs[0])
    return {}


def _is_stored(sharder: Sharder, node: ir.Node) -> bool:
    if node.op_type == "MatMulNBits":
        return all(value is None or sharder.is_constant(value) for value in node.inputs[1:6])
    return sharder.is_matrix(node.inputs[PRODUCTS[node.op_type].weight])


def _is_divisible(sharder: Sharder, node: ir.Node) -> bool:
    weight = node.inputs[PRODUCTS[node.op_type].weight]
    try:
        return _is_stored(sharder, node) and sharder.share(weight) >= _SMALLEST
    except CannotSplit:  # a value whose shape is not known
        return False


def _width(sharder: Sharder, node: ir.Node) -> int:
    if node.op_type == "MatMulNBits":
        return attribute(node, "N")
    weight = node.inputs[PRODUCTS[node.op_type].weight]
    return sharder.shape(weight)[0 if attribute(node, "transB", 0) else 1] if weight is not None else 0


def _cut_columns(sharder: Sharder, node: ir.Node, split: Split) -> None:
    kind = PRODUCTS[node.op_type]
    if node.op_type == "MatMulNBits":
        for index in range(1, min(4, len(node.inputs))):  # codes, scales, zero points: [N, ...], or flat
            value = node.inputs[index]
            if value is not None:
                shape = sharder.shape(value)
                sharder.slice_weight(node, index, split.times(shape[0] // split.total) if len(shape) == 1 else split)
        sharder.set_attribute(node, "N", split.sizes)
    else:
        sharder.cut(node, kind.weight, split.on(0 if attribute(node, "transB", 0) else 1))
    for index in (*kind.columns, *([kind.bias] if kind.bias is not None else [])):
        sharder.cut_vector(node, index, split)


def _cut_rows_of_blocks(sharder: Sharder, node: ir.Node, split: Split) -> None:
    codes, scales, zero_points, order = (*node.inputs[1:5], None, None)[:4]
    if order is not None or codes is None or scales is None:
        raise CannotSplit("MatMulNBits with g_idx needs it whole")
    blocks = sharder.blocks(split, attribute(node, "block_size")).on(1)
    rows = attribute(node, "N")
    sharder.slice_weight(node, 1, blocks)
    sharder.slice_weight(node, 2, blocks, rows=rows if len(sharder.shape(scales)) == 1 else None)
    if zero_points is not None:
        flat = len(sharder.shape(zero_points)) == 1
        packed = attribute(node, "bits", 4) if zero_points.dtype == ir.DataType.UINT8 else None
        sharder.slice_weight(node, 3, blocks, rows=rows if flat else None, bits=packed)
    sharder.set_attribute(node, "K", split.sizes)


def _begin_table(sharder: Sharder, node: ir.Node) -> None:
    weight, output = node.inputs[0], node.outputs[0]
    if weight is None or not sharder.is_constant(weight) or sharder.share(weight) < LARGE:
        return
    shape = sharder.shape(weight)
    if len(shape) != 2:
        return
    if len(weight.uses()) > 1:
        split = divide(0, [shape[0]], sharder.ranks)
        sharder.slice_weight(node, 0, split)
        sharder.look_up(node, split)
        return
    split = divide(1, [shape[1]], sharder.ranks)
    sharder.slice_weight(node, 0, split)
    sharder.gather(output, split.on(len(sharder.shape(output)) - 1))


def _begin_quantized_table(sharder: Sharder, node: ir.Node) -> None:
    """Width in whole blocks; rows where the codes are also those of a MatMulNBits, behind a Reshape."""
    data, _, scales, zero_points = (*node.inputs, None)[:4]
    reshaped = producer(data, "Reshape")
    stored = reshaped.inputs[0] if reshaped is not None else data
    parameters = [value for value in (stored, scales, zero_points) if value is not None]
    known = data is not None and all(sharder.is_constant(value) for value in parameters)
    if not known or data is None or attribute(node, "gather_axis", 0) != 0 or sharder.share(stored) < LARGE:
        return
    shape, output = sharder.shape(data), node.outputs[0]
    others = range(2, 2 + len(parameters[1:]))
    if reshaped is not None or len(data.uses()) > 1:
        split = divide(0, [shape[0]], sharder.ranks)
        if reshaped is not None:
            sharder.slice_weight(reshaped, 0, split)
            sharder.set_dim(reshaped, split, 2, 2)
        else:
            sharder.slice_weight(node, 0, split)
        for index in others:
            sharder.slice_weight(node, index, split)
        sharder.look_up(node, split)
        return
    bits = attribute(node, "bits", 4) if data.dtype == ir.DataType.UINT8 else None
    width = shape[1] * 8 // bits if bits is not None else shape[1]
    split = divide(1, [width], sharder.ranks, attribute(node, "block_size", 128))
    blocks = split.blocks(attribute(node, "block_size", 128))
    if blocks is None:
        raise CannotSplit("the last block of the table is not whole")
    sharder.slice_weight(node, 0, split, bits=bits)
    sharder.slice_weight(node, 2, blocks)
    if zero_points is not None:
        sharder.slice_weight(node, 3, blocks, bits=bits)
    sharder.gather(output, split.on(len(sharder.shape(output)) - 1))


def _pieces(value: ir.Value, width: int) -> list[int]:
    """The columns of a product by what they become: Q, K and V of one matrix, or gate and up."""
    for use in value.uses():
        node = use.node
        if is_op(node, "Add") and len(value.uses()) == 1:
            return _pieces(node.outputs[0], width)
        if is_op(node, "Split") and attribute(node, "axis", 0) in (-1, len(value.shape or ()) - 1):
            sizes = attribute(node, "split") if len(node.inputs) < 2 else constant(node.inputs[1], limit=64)
            if sizes is not None:
                return [int(size) for size in sizes]
            return [width // len(node.outputs)] * len(node.outputs)
        if is_op(node, "GroupQueryAttention", domain=MICROSOFT) and use.idx == 0 and node.inputs[1] is None:
            query, key = attribute(node, "num_heads"), attribute(node, "kv_num_heads")
            size = width // (query + 2 * key)
            return [query * size, key * size, key * size]
    return [width]
