"""How attention and rotations work on parts: each rank has some of the heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from ...compiler.graph import attribute
from .splits import CannotSplit, Found, Sources, Split, divide, first

if TYPE_CHECKING:
    from .sharder import Sharder


def rotary(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = first(sharder, node)
    if len(sharder.shape(value)) == 4:
        if split.axis != 1:
            raise CannotSplit("a rotation needs whole heads")
        return {node.outputs[0]: split}
    heads = attribute(node, "num_heads", 0)
    table = node.inputs[2]
    size = split.total // heads if heads else 2 * sharder.shape(table)[-1] if table is not None else 1
    by_head = split.over(size)
    if by_head is None:
        raise CannotSplit(f"{split.total // size} heads cannot be divided over {sharder.ranks} ranks", True)
    if heads:
        sharder.set_attribute(node, "num_heads", by_head.sizes)
    return {node.outputs[0]: split}


HEADS = {
    # operator: (attributes with the heads of queries and of keys, input that holds the past key)
    "GroupQueryAttention": ("num_heads", "kv_num_heads", 3),
    "MultiHeadAttention": ("num_heads", "num_heads", 6),
    "Attention": ("q_num_heads", "kv_num_heads", 4),
}
_MASKS = {"GroupQueryAttention": 10, "MultiHeadAttention": 5, "Attention": 3}  # [batch or 1, heads or 1, ...]


def attention(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    if node.op_type == "Attention" and node.domain:
        raise CannotSplit("com.microsoft.Attention keeps its weights inside")
    query, key, past = HEADS[node.op_type]
    value, split = first(sharder, node)
    inputs = [*node.inputs, *[None] * 12]
    by_head = len(sharder.shape(value)) == 4
    heads = sharder.shape(value)[1] if by_head else attribute(node, query)
    kv_heads = sharder.shape(inputs[1])[1] if by_head and inputs[1] is not None else attribute(node, key, heads)
    for count, whose in ((heads, "query"), (kv_heads, "key/value")):
        if count % sharder.ranks:
            raise CannotSplit(f"{count} {whose} heads cannot be divided over {sharder.ranks} ranks", True)
    _check_operands(sharder, node, inputs, split)
    cache = divide(1, [kv_heads], sharder.ranks)
    for held in inputs[past : past + 2]:
        if held is not None and held not in sharder.splits:
            sharder.divide_input(held, cache, sources)
    if not by_head:
        sharder.set_attribute(node, query, [heads // sharder.ranks] * sharder.ranks)
        if key != query:
            sharder.set_attribute(node, key, [kv_heads // sharder.ranks] * sharder.ranks)
    result = node.outputs[0]
    shape = sharder.shape(result)
    found = {output: cache for output in node.outputs[1:3] if output.name}
    return {result: split if by_head else divide(len(shape) - 1, [shape[-1]], sharder.ranks), **found}


def _check_operands(sharder: Sharder, node: ir.Node, inputs: list[ir.Value | None], split: Split) -> None:
    """Keys and values are divided too, the mask is the same for all heads; MultiHeadAttention's bias is cut."""
    for other in (item for item in inputs[1:3] if item is not None):
        if other not in sharder.splits:
            raise CannotSplit(f"{other.name} is whole, and the query is not")
        if not sharder.splits[other].even:
            raise CannotSplit("a head would lie on two ranks")
    if not split.even:
        raise CannotSplit("a head would lie on two ranks")
    mask = inputs[_MASKS[node.op_type]]
    if mask is not None and len(sharder.shape(mask)) > 2 and sharder.shape(mask)[-3] != 1:
        raise CannotSplit("the mask differs from head to head")
    if node.op_type != "MultiHeadAttention" or inputs[3] is None:
        return
    parts = [split, *(sharder.splits[item] for item in inputs[1:3] if item is not None and item in sharder.splits)]
    if not sharder.is_constant(inputs[3]) or len(parts) != 3:
        raise CannotSplit("MultiHeadAttention adds a bias that cannot be divided")
    ranges = [list[tuple[int, int]]() for _ in range(sharder.ranks)]
    start = 0
    for part in parts:
        for rank, pieces in enumerate(part.ranges):
            ranges[rank] += [(a + start, b + start) for a, b in pieces]
        start += part.total
    sharder.slice_weight(node, 3, Split(0, tuple(tuple(pieces) for pieces in ranges), start))
