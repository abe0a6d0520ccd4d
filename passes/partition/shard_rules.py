"""How nodes work on parts: for each operator, from the division of its inputs to that of its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from ...compiler.graph import attribute, integers
from ..symbolic import squeezed_axes
from .shard_attention import HEADS, attention, rotary
from .shard_products import PRODUCTS, matmul, product
from .splits import CannotSplit, Found, Sources, Split, first, reshape

if TYPE_CHECKING:
    from .sharder import Sharder

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
        if sharder.is_stored(value):
            sharder.cut(node, index, split.on(axis))
        elif value.is_graph_input():
            sharder.divide_input(value, split.on(axis), sources)
        else:
            raise CannotSplit(f"{value.name} is whole, and the other input is not")
    return {output: split}


def _reshape(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = first(sharder, node)
    after = sharder.shape(node.outputs[0])
    found = reshape(split, sharder.shape(value), after)
    sharder.set_dim(node, found, len(after), len(after))
    return {node.outputs[0]: found}


def _expand(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = first(sharder, node)
    before, after, target = sharder.shape(value), sharder.shape(node.outputs[0]), node.inputs[1]
    found = split.on(split.axis + len(after) - len(before))
    if target is None or after[found.axis] != split.total * split.outer:
        raise CannotSplit("an Expand repeats it")
    sharder.set_dim(node, found, sharder.shape(target)[0], len(after))
    return {node.outputs[0]: found}


def _tile(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = first(sharder, node)
    if sharder.shape(node.outputs[0])[split.axis] != sharder.shape(value)[split.axis]:
        raise CannotSplit("a Tile repeats it")
    return {node.outputs[0]: split}


def _transpose(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = first(sharder, node)
    rank = len(sharder.shape(value))
    perm = attribute(node, "perm", list(reversed(range(rank))))
    return {node.outputs[0]: split.on(list(perm).index(split.axis))}


def _unsqueeze(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    _value, split = first(sharder, node)
    axes, rank = squeezed_axes(node), len(sharder.shape(node.outputs[0]))
    if axes is None:
        raise CannotSplit("the axes of an Unsqueeze are computed")
    old = [axis for axis in range(rank) if axis not in {axis % rank for axis in axes}]
    return {node.outputs[0]: split.on(old[split.axis])}


def _squeeze(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = first(sharder, node)
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
    value, split = first(sharder, node)
    rank = len(sharder.shape(value))
    axes = integers(node.inputs[3]) if len(node.inputs) > 3 else None
    if axes is None or split.axis in {axis % rank for axis in axes}:
        raise CannotSplit("a Slice of this form needs it whole")
    return {node.outputs[0]: split}


def _split(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = first(sharder, node)
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


def _quantize(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    """QuantizeLinear or DequantizeLinear of an activation, with one scale or one for each place of an axis."""
    value, split = first(sharder, node)
    axis = attribute(node, "axis", 1) % max(1, len(sharder.shape(value)))
    for index, parameter in enumerate(node.inputs[1:], start=1):
        if parameter is None or math.prod(sharder.shape(parameter)) == 1:
            continue
        if len(sharder.shape(parameter)) != 1:
            raise CannotSplit(f"{node.op_type} has scales in blocks")
        if axis == split.axis:
            sharder.cut_vector(node, index, split)
    return {node.outputs[0]: split}


def _by_range(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    raise CannotSplit(f"{node.op_type} rounds by the range of the whole")


def _normalization(sharder: Sharder, node: ir.Node, sources: Sources) -> Found:
    value, split = first(sharder, node)
    rank = len(sharder.shape(value))
    axis = attribute(node, "axis", -1) % rank
    if split.axis == axis or (split.axis > axis and node.op_type != "Softmax") or len(node.outputs) != 1:
        raise CannotSplit(f"{node.op_type} needs it whole")
    return {node.outputs[0]: split}


_RULES: dict[str, Callable[[Sharder, ir.Node, Sources], Found]] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_NORMALIZATIONS.split(), _normalization),
    **dict.fromkeys(HEADS, attention),
    **dict.fromkeys(PRODUCTS, product),
    "MatMul": matmul,
    "Reshape": _reshape,
    "Expand": _expand,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Tile": _tile,
    "RotaryEmbedding": rotary,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _quantize,
    "DynamicQuantizeLinear": _by_range,
}
