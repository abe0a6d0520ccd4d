"""How nodes work on parts: for each operator, from the division of its inputs to that of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from ...compiler.graph import attribute, integers
from ..symbolic import squeezed_axes
from .splits import CannotSplit, Split, divide, reshape

if TYPE_CHECKING:
    from .sharder import Sharder

Sources = frozenset[ir.Node]
Found = dict[ir.Value, Split]
_ELEMENTWISE = """Add Sub Mul Div Pow Neg Abs Sigmoid Tanh Relu Gelu Erf Sqrt Exp Log Cast Identity Clip Min Max IsNaN
    Reciprocal HardSwish HardSigmoid LeakyRelu Elu Softplus Where Equal Greater Less And Or Not FastGelu BiasGelu
    QuickGelu Sum"""
_NORMALIZATIONS = "Softmax LayerNormalization SimplifiedLayerNormalization RMSNormalization"


def follow(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    """The divisions of the outputs of ``node``, of whose inputs some are divided; edits go to ``sharder``.

    Raises:
        CannotSplit: it cannot work on parts.
    """
    rule = _RULES.get(node.op_type) if node.domain in ("", "com.microsoft", "ai.onnx") else None
    if rule is None:
        raise CannotSplit(f"{node.op_type} needs it whole")
    return rule(sharder, node, sources)


def _first(sharder: Sharder, node: ir.Node) -> tuple[ir.Value, Split]:
    """The first input, which must be divided, and its division."""
    value = node.inputs[0]
    if value is None or value not in sharder.splits:
        raise CannotSplit(f"{node.op_type} has its first input whole and another one divided")
    return value, sharder.splits[value]


def _elementwise(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    output = node.outputs[0]
    rank = len(sharder.shape(output))
    aligned: set[Split] = set()
    for value in node.inputs:
        if value in sharder.splits:
            split = sharder.splits[value]
            aligned.add(split.on(split.axis + rank - len(sharder.shape(value))))
    if len(aligned) != 1:
        raise CannotSplit(f"the inputs of {node.op_type} are divided differently")
    split = aligned.pop()
    for index, value in enumerate(node.inputs):
        if value is None or value in sharder.splits:
            continue
        axis = split.axis - (rank - len(sharder.shape(value)))
        if axis < 0 or sharder.shape(value)[axis] == 1:
            continue
        if sharder.is_constant(value):
            sharder.slice_weight(node, index, split.on(axis))
        elif value.is_graph_input():
            sharder.divide_input(value, split.on(axis), sources)
        else:
            raise CannotSplit(f"{value.name} is whole, and the other input is not")
    return {output: split}


def _matmul(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    left, right = node.inputs[:2]
    output = node.outputs[0]
    if left is None or right is None:
        raise CannotSplit("an input is missing")
    a, b = sharder.splits.get(left), sharder.splits.get(right)
    ranks = len(sharder.shape(left)), len(sharder.shape(right)), len(sharder.shape(output))
    if a is not None and b is None and a.axis == ranks[0] - 1:
        if not sharder.is_matrix(right):
            raise CannotSplit("it is multiplied with what is no constant matrix")
        sharder.slice_factor(node, a.on(0))
        sharder.add_up(output)
        return {}
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


def _gemm(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    _, split = _first(sharder, node)
    if split.axis != 1 or attribute(node, "transA", 0) or not sharder.is_matrix(node.inputs[1]):
        raise CannotSplit("a Gemm of this form needs it whole")
    sharder.slice_factor(node, split.on(1 if attribute(node, "transB", 0) else 0))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        sharder.only_on_first(node, 2)
    sharder.add_up(node.outputs[0])
    return {}


def _reshape(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = _first(sharder, node)
    after = sharder.shape(node.outputs[0])
    found = reshape(split, sharder.shape(value), after)
    sharder.set_dim(node, found, len(after), len(after))
    return {node.outputs[0]: found}


def _expand(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = _first(sharder, node)
    before, after, target = sharder.shape(value), sharder.shape(node.outputs[0]), node.inputs[1]
    found = split.on(split.axis + len(after) - len(before))
    if target is None or after[found.axis] != split.total * split.outer:
        raise CannotSplit("an Expand repeats it")
    sharder.set_dim(node, found, sharder.shape(target)[0], len(after))
    return {node.outputs[0]: found}


def _tile(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = _first(sharder, node)
    if sharder.shape(node.outputs[0])[split.axis] != sharder.shape(value)[split.axis]:
        raise CannotSplit("a Tile repeats it")
    return {node.outputs[0]: split}


def _transpose(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = _first(sharder, node)
    rank = len(sharder.shape(value))
    perm = attribute(node, "perm", list(reversed(range(rank))))
    return {node.outputs[0]: split.on(list(perm).index(split.axis))}


def _unsqueeze(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    _value, split = _first(sharder, node)
    axes, rank = squeezed_axes(node), len(sharder.shape(node.outputs[0]))
    if axes is None:
        raise CannotSplit("the axes of an Unsqueeze are computed")
    old = [axis for axis in range(rank) if axis not in {axis % rank for axis in axes}]
    return {node.outputs[0]: split.on(old[split.axis])}


def _squeeze(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = _first(sharder, node)
    axes, rank = squeezed_axes(node), len(sharder.shape(value))
    if axes is None or split.axis in {axis % rank for axis in axes}:
        raise CannotSplit("a Squeeze of this form needs it whole")
    return {node.outputs[0]: split.on(split.axis - sum(axis % rank < split.axis for axis in axes))}


def _concat(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    output = node.outputs[0]
    axis = attribute(node, "axis") % len(sharder.shape(output))
    splits = {sharder.splits[value] for value in node.inputs if value in sharder.splits}
    if len(splits) != 1:
        raise CannotSplit("what a Concat joins is divided differently")
    split = splits.pop()
    if split.axis == axis:
        raise CannotSplit("a Concat makes it longer")
    for value in node.inputs:
        if value is not None and value not in sharder.splits:
            sharder.divide_input(value, split, sources)
    return {output: split}


def _slice(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = _first(sharder, node)
    rank = len(sharder.shape(value))
    axes = integers(node.inputs[3]) if len(node.inputs) > 3 else None
    if axes is None or split.axis in {axis % rank for axis in axes}:
        raise CannotSplit("a Slice of this form needs it whole")
    return {node.outputs[0]: split}


def _split(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = _first(sharder, node)
    if attribute(node, "axis", 0) % len(sharder.shape(value)) != split.axis:
        return dict.fromkeys(node.outputs, split)
    found: list[Split] = []
    start = 0
    for output in node.outputs:
        stop = start + sharder.shape(output)[split.axis]
        part = split.within(start, stop)
        if part is None:
            raise CannotSplit("a Split gives a rank nothing")
        found.append(part)
        start = stop
    sharder.set_sizes(node, found)
    return dict(zip(node.outputs, found, strict=True))


def _normalization(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = _first(sharder, node)
    rank = len(sharder.shape(value))
    axis = attribute(node, "axis", -1) % rank
    if split.axis == axis or (split.axis > axis and node.op_type != "Softmax") or len(node.outputs) != 1:
        raise CannotSplit(f"{node.op_type} needs it whole")
    return {node.outputs[0]: split}


def _rotary(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = _first(sharder, node)
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


_HEADS = {
    # operator: (attributes with the heads of queries and of keys, input that holds the past key)
    "GroupQueryAttention": ("num_heads", "kv_num_heads", 3),
    "MultiHeadAttention": ("num_heads", "num_heads", 6),
    "Attention": ("q_num_heads", "kv_num_heads", 4),
}
_MASKS = {"GroupQueryAttention": 10, "MultiHeadAttention": 5, "Attention": 3}  # [batch or 1, heads or 1, ...]


def _attention(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    if node.op_type == "Attention" and node.domain:
        raise CannotSplit("com.microsoft.Attention keeps its weights inside")
    query, key, past = _HEADS[node.op_type]
    value, split = _first(sharder, node)
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
    first = node.outputs[0]
    shape = sharder.shape(first)
    found = {output: cache for output in node.outputs[1:3] if output.name}
    return {first: split if by_head else divide(len(shape) - 1, [shape[-1]], sharder.ranks), **found}


def _check_operands(sharder: Sharder, node: ir.Node, inputs: list[ir.Value | None], split: Split) -> None:
    """Keys and values are divided too, the mask is the same for all heads; MultiHeadAttention's bias is cut."""
    for other in (item for item in inputs[1:3] if item is not None):
        if other not in sharder.splits:
            raise CannotSplit(f"{other.name} is whole, and the query is not")
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


_RULES: dict[str, Callable[[Sharder, ir.Node, Sources], Found]] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_NORMALIZATIONS.split(), _normalization),
    **dict.fromkeys(_HEADS, _attention),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Reshape": _reshape,
    "Expand": _expand,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Tile": _tile,
    "RotaryEmbedding": _rotary,
}
