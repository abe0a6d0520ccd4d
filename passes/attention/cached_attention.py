"""Finds attention with a key/value cache, anchored at the cache; used by ``FuseGroupQueryAttention``."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ...compiler.graph import attribute, is_op, producer, rank, scalar
from ..factors import constant_factor
from ..probing import MASK, POSITIONS
from ..symbolic import SymbolicShapes
from ..symbolic_dims import number
from .attention_match import NotAttention, Scores, below, merge_heads

# What may lie between a projection and the attention: it moves, rotates and scales numbers, nothing else.
_LINEAR = frozenset(
    [
        "Add",
        "Cast",
        "Concat",
        "Div",
        "Expand",
        "Gather",
        "GatherND",
        "Identity",
        "Mul",
        "Neg",
        "Reshape",
        "RotaryEmbedding",
        "ScatterND",
        "Slice",
        "Split",
        "Squeeze",
        "Sub",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ]
)


@dataclasses.dataclass(frozen=True)
class Cache:
    """One half of a layer's cache: ``present = Concat(past, new)`` along the positions.

    Attributes:
        past: graph input [batch, kv_heads, past, head_dim].
        new: [batch, kv_heads, sequence, head_dim].
        present: graph output [batch, kv_heads, past + sequence, head_dim].
    """

    past: ir.Value
    new: ir.Value
    present: ir.Value


@dataclasses.dataclass(frozen=True)
class CachedAttention:
    """``softmax(mask(scale * Q K^T)) V`` over a cache.

    Attributes:
        key: the keys' cache; likewise ``value``.
        query: Q as the product reads it, [batch, heads, sequence, head_dim].
        key_operand: what the product with Q reads; likewise ``value_operand``.
        masks: values that forbid positions: bool, or added to the scores.
        filled: the one mask is a condition that is true where a very low number is written.
        scale: product of the constant factors on the scores.
        softcap: cap of the scores, 0 for none.
        last: the Reshape whose output is the result, [batch, sequence, heads * head_dim] or the same with the first two
            axes joined.
        nodes: the nodes of the block, without ``last``.
    """

    key: Cache
    value: Cache
    query: ir.Value
    key_operand: ir.Value
    value_operand: ir.Value
    masks: tuple[ir.Value, ...]
    filled: bool
    scale: float
    softcap: float
    last: ir.Node
    nodes: tuple[ir.Node, ...]


def find_caches(model: ir.Model) -> list[Cache]:
    """The caches of ``model``, in the order of its inputs; names do not matter."""
    found: list[Cache] = []
    for past in model.graph.inputs:
        if rank(past) != 4:
            continue
        for use in past.uses():
            node = use.node
            if not is_op(node, "Concat") or use.idx != 0 or len(node.inputs) != 2 or node.inputs[1] is None:
                continue
            if attribute(node, "axis") in (2, -2) and node.outputs[0].is_graph_output():
                found.append(Cache(past, node.inputs[1], node.outputs[0]))
    return found


def match_cached(model: ir.Model, shapes: SymbolicShapes) -> list[CachedAttention]:
    """Every attention over a cache.

    Raises:
        NotAttention: one of the caches is read by something else, named in the message.
    """
    caches = find_caches(model)
    keys: dict[ir.Node, tuple[Cache, ir.Value]] = {}
    values: dict[ir.Node, tuple[Cache, ir.Value]] = {}
    for cache in caches:
        node, index, operand = _reader(cache.present, shapes)
        role = keys if (index == 1 and is_op(node, "Attention")) or _is_scores(node) else values
        role[node] = (cache, operand)
    blocks: list[CachedAttention] = []
    for node, key in keys.items():
        block = _standard(node, key, values) if is_op(node, "Attention") else _written_out(node, key, values, shapes)
        blocks.append(_with_result(block, shapes))
    if 2 * len(blocks) != len(caches):
        raise NotAttention(f"{len(caches)} caches, but {len(blocks)} attentions that read two of them each")
    return blocks


def _reader(value: ir.Value, shapes: SymbolicShapes) -> tuple[ir.Node, int, ir.Value]:
    """The product or Attention that reads ``value`` through repeats, transposes and scales."""
    todo, found = [value], list[tuple[ir.Node, int, ir.Value]]()
    while todo:
        current = todo.pop()
        for use in current.uses():
            node = use.node
            if is_op(node, "MatMul", "Attention"):
                found.append((node, use.idx, current))
            elif _passes_on(node, use.idx, shapes):
                todo.append(node.outputs[0])
            elif not is_op(node, "Shape", "Size"):
                raise NotAttention(f"the cache {value.name} is also read by {node.op_type} {node.name}")
    if len(found) != 1:
        raise NotAttention(f"the cache {value.name} is read by {len(found)} attentions, not by one")
    return found[0]


def _passes_on(node: ir.Node, index: int, shapes: SymbolicShapes) -> bool:
    """Whether ``node`` repeats, moves or scales its input ``index``."""
    if is_op(node, "Mul", "Div"):
        return constant_factor(node, shapes)[0] is not None
    return index == 0 and is_op(node, "Unsqueeze", "Expand", "Reshape", "Transpose", "Identity", "Tile", "Cast")


def _is_scores(node: ir.Node) -> bool:
    """Whether the MatMul ``node`` is ``Q K^T``: a Softmax follows before the next product."""
    todo = [node.outputs[0]]
    for _ in range(12):
        following = [use.node for value in todo for use in value.uses()]
        if any(is_op(item, "Softmax") for item in following):
            return True
        todo = [
            item.outputs[0]
            for item in following
            if is_op(item, "Add", "Mul", "Div", "Where", "Tanh", "Cast", "Reshape")
        ]
    return False


_Halves = dict[ir.Node, tuple[Cache, ir.Value]]


def _standard(node: ir.Node, key: tuple[Cache, ir.Value], values: _Halves) -> CachedAttention:
    """ONNX Attention-23 with 4-D operands, as torch's exporter writes it."""
    value = next((item for other, item in values.items() if other is node), None)
    query, mask = node.inputs[0], (*node.inputs, None, None, None)[3]
    if value is None or query is None or rank(query) != 4:
        raise NotAttention(f"{node.name} does not take Q, K and V as [batch, heads, length, head_dim]")
    if attribute(node, "is_causal", 0):
        raise NotAttention(f"{node.name} is causal by attribute, which counts from the first key, not from the cache")
    if any(item is not None for item in node.inputs[4:]) or len(node.outputs) > 1:
        raise NotAttention(f"{node.name} has a cache of its own or more than one output")
    head = query.shape[3] if query.shape is not None else None
    scale = attribute(node, "scale") or (head**-0.5 if isinstance(head, int) else None)
    if scale is None:
        raise NotAttention(f"the head size of {node.name} is unknown")
    masks = (mask,) if mask is not None else ()
    softcap = float(attribute(node, "softcap", 0.0))
    return CachedAttention(
        key[0], value[0], query, key[1], value[1], masks, False, float(scale), softcap, node, (node,)
    )


def _written_out(
    product: ir.Node, key: tuple[Cache, ir.Value], values: _Halves, shapes: SymbolicShapes
) -> CachedAttention:
    """MatMul, mask, Softmax, MatMul."""
    nodes: list[ir.Node] = []
    softmax = _softmax_after(product)
    nodes.append(softmax)
    context, _ = below(softmax, nodes)
    scores = Scores(shapes, nodes)
    if scores.walk_up(softmax.inputs[0]) is not product or context not in values:
        raise NotAttention(f"the keys of {product.name} and the values of {context.name} are not one attention's")
    value = values[context]
    query = product.inputs[0]
    if query is None or rank(query) != 4:
        raise NotAttention(f"Q of {product.name} is not [batch, heads, length, head_dim]")
    fill = scores.fill
    masks = tuple(scores.masks) if fill is None else tuple(item for item in fill.inputs[:1] if item is not None)
    filled = fill is not None and scalar(fill.inputs[1]) is not None
    scale, cap = scores.scale, scores.softcap
    return CachedAttention(key[0], value[0], query, key[1], value[1], masks, filled, scale, cap, context, tuple(nodes))


def _softmax_after(product: ir.Node) -> ir.Node:
    value = product.outputs[0]
    for _ in range(12):
        users = [use.node for use in value.uses()]
        if len(users) != 1 or value.is_graph_output():
            raise NotAttention(f"the scores {value.name} are also used elsewhere")
        if is_op(users[0], "Softmax"):
            return users[0]
        value = users[0].outputs[0]
    raise NotAttention(f"no Softmax follows {product.name}")


def _with_result(block: CachedAttention, shapes: SymbolicShapes) -> CachedAttention:
    """``block`` with the node that merges its heads as the last."""
    dims = shapes.dims(block.query)
    values = shapes.dims(block.value.new)
    if dims is None or values is None or dims[1][1] or values[3][1]:
        raise NotAttention(f"the heads of {block.last.name} are not known")
    nodes = list(block.nodes)
    if block.last not in nodes:
        nodes.append(block.last)
    merged = (dims[0], number(dims[1][0]), dims[2], values[3])
    last, result, length_first = merge_heads(block.last, merged, shapes, nodes)
    if length_first or len(result) not in (2, 3):
        raise NotAttention(f"the result of {block.last.name} is not merged into [batch, sequence, hidden]")
    return dataclasses.replace(block, last=last, nodes=tuple(item for item in nodes if item is not last))


def activations(model: ir.Model) -> set[ir.Value]:
    """All values that depend on tokens: on any input but the mask and the positions, shapes apart."""
    tainted = {value for value in model.graph.inputs if value.name not in (MASK, POSITIONS)}
    for node in model.graph:
        if not is_op(node, "Shape", "Size") and any(value in tainted for value in node.inputs):
            tainted.update(node.outputs)
    return tainted


def source_of(value: ir.Value, tainted: set[ir.Value], shapes: SymbolicShapes) -> ir.Value:
    """The projection, or norm, that ``value`` is made of by splitting heads and rotating.

    The nearest value above ``value`` through which everything passes and that is [batch, sequence, features] and no
    part of another, or that is made by an operator that does more than move, rotate and scale. ``value`` itself where
    there is no single one.
    """
    found, seen, todo = set[ir.Value](), set[ir.Value](), [value]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        node = producer(current)
        dims = shapes.dims(current)
        whole = dims is not None and len(dims) == 3 and not is_op(node, "Slice", "Split")
        if node is None or node.op_type not in _LINEAR or whole:
            found.add(current)
        else:
            todo += [item for item in node.inputs if item is not None and item in tainted]
    return found.pop() if len(found) == 1 else value
