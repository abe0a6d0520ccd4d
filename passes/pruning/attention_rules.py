"""What fused attention and rotary embeddings link: a head, or a key/value head with the query heads that read it.

Contracts: ai.onnx Attention-23 and RotaryEmbedding-23; com.microsoft Attention, MultiHeadAttention,
GroupQueryAttention and RotaryEmbedding (onnxruntime docs/ContribOperators.md).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ...compiler.graph import MICROSOFT, Array, attribute
from .coupling import Coupling
from .units import Place


class _Heads:
    """The heads of one attention node, tied to axes of its operands.

    Args:
        c: the coupling.
        node: the attention.
        count: key/value heads, which are the units.
    """

    def __init__(self, c: Coupling, node: ir.Node, count: int) -> None:
        self.c, self.node, self.count = c, node, count
        self._units: Array | None = None

    def tie(self, elements: Array) -> None:
        """``elements`` lie head by head: the same number of them for each unit, in order."""
        if not len(elements):
            return
        if not self.count or len(elements) % self.count:
            self.c.freeze(elements, f"{self.node.op_type} {self.node.name} does not split it into equal heads")
            return
        each = len(elements) // self.count
        first = elements[::each]
        self.c.link(elements, np.repeat(first, each))
        if self._units is None:
            self._units = first
        self.c.link(first, self._units)
        self.c.mark(first, "heads")

    def tie_axis(self, place: Place | None, axis: int) -> None:
        """The whole of an axis, if the tensor is there."""
        if place is not None and place.rank:
            self.tie(self.c.elements(place, axis % place.rank))


def _freeze_rest(c: Coupling, places: list[tuple[Place | None, int]], reason: str) -> None:
    """Every other axis of the operands stays."""
    for place, free in places:
        for axis in range(place.rank if place is not None else 0):
            if place is not None and axis != free % place.rank:
                c.freeze_axis(place, axis, reason)


def _attention(c: Coupling, node: ir.Node) -> None:
    """ai.onnx Attention: Q, K, V of rank 3 (heads in the last axis) or 4 (heads in axis 1)."""
    query = c.operand(node, 0)
    if query is None:
        return
    axis = 1 if query.rank == 4 else 2
    key = c.operand(node, 1)
    count = attribute(node, "kv_num_heads", 0) if axis == 2 else len(c.elements(key, 1)) if key is not None else 0
    heads = _Heads(c, node, count)
    places = [(c.operand(node, index), axis) for index in range(3)] + [(c.result(node), axis)]
    places += [(c.operand(node, 4), 1), (c.operand(node, 5), 1), (c.result(node, 1), 1), (c.result(node, 2), 1)]
    mask, scores = c.operand(node, 3), c.result(node, 3)
    places += [(place, place.rank - 3) for place in (mask, scores) if place is not None and place.rank > 2]
    _tie_all(c, node, heads, places)


def _tie_all(
    c: Coupling, node: ir.Node, heads: _Heads, places: list[tuple[Place | None, int]], done: Place | None = None
) -> None:
    """Ties the axes that count heads; what else the node reads, apart from ``done``, stays as it is."""
    for place, axis in places:
        heads.tie_axis(place, axis)
    _freeze_rest(c, places, f"{node.op_type} {node.name} mixes it")
    covered = {place.value for place in (done, *(place for place, _ in places)) if place is not None}
    for index in range(len(node.inputs)):
        place = c.operand(node, index)
        for axis in range(place.rank if place is not None and place.value not in covered else 0):
            c.freeze_axis(place, axis, f"{node.op_type} {node.name} reads it")


def _multi_head(c: Coupling, node: ir.Node) -> None:
    query = c.operand(node, 0)
    if query is None or query.rank != 3 or c.operand(node, 1) is None:
        c.freeze_node(node, f"{node.op_type} {node.name} reads Q, K and V packed in one tensor")
        return
    heads = _Heads(c, node, attribute(node, "num_heads", 0))
    places: list[tuple[Place | None, int]] = [(c.operand(node, 0), 2), (c.result(node), 2)]
    for index in (1, 2):
        place = c.operand(node, index)
        places.append((place, 1 if place is not None and place.rank == 4 else 2))
    places += [(c.operand(node, index), 1) for index in (5, 6, 7)] + [(c.result(node, index), 1) for index in (1, 2)]
    bias = c.operand(node, 3)
    if bias is not None:
        sizes = [len(c.elements(place, axis)) for place, axis in places[:1] + places[2:4] if place is not None]
        _tie_segments(heads, c.elements(bias, 0), sizes)
    _tie_all(c, node, heads, places, bias)


def _tie_segments(heads: _Heads, elements: Array, sizes: list[int]) -> None:
    """Q, K and V one after the other in one axis."""
    if sum(sizes) != len(elements):
        heads.c.freeze(elements, f"{heads.node.op_type} {heads.node.name} has a bias of another size")
        return
    start = 0
    for size in sizes:
        heads.tie(elements[start : start + size])
        start += size


def _packed_attention(c: Coupling, node: ir.Node) -> None:
    """com.microsoft Attention multiplies its input with [Wq | Wk | Wv] itself."""
    x, weight, bias, out = c.operand(node, 0), c.operand(node, 1), c.operand(node, 2), c.result(node)
    if x is None or weight is None or out is None or c.operand(node, 4) is not None:
        c.freeze_node(node, f"{node.op_type} {node.name} has a packed cache")
        return
    heads = _Heads(c, node, attribute(node, "num_heads", 0))
    columns = c.elements(weight, 1)
    sizes = list(attribute(node, "qkv_hidden_sizes") or [len(columns) // 3] * 3)
    _tie_segments(heads, columns, sizes)
    if bias is not None:
        _tie_segments(heads, c.elements(bias, 0), sizes)
    c.link_axes(x, 2, weight, 0)
    c.freeze_axis(x, 2, f"{node.op_type} {node.name} multiplies it inside")
    places: list[tuple[Place | None, int]] = [(out, 2), (c.operand(node, 5), 1)]
    for place, axis in places:
        heads.tie_axis(place, axis)
    _freeze_rest(c, [*places, (x, 2)], f"{node.op_type} {node.name} mixes it")
    c.made_by(node, columns)


def _group_query(c: Coupling, node: ir.Node) -> None:
    query, packed = c.operand(node, 0), c.operand(node, 1) is None
    if query is None:
        return
    count, total = attribute(node, "kv_num_heads", 0), attribute(node, "num_heads", 0)
    heads = _Heads(c, node, count)
    elements = c.elements(query, 2)
    places: list[tuple[Place | None, int]] = [(query, 2), (c.result(node), 2)]
    if packed:
        size = len(elements) // max(total + 2 * count, 1)
        _tie_segments(heads, elements, [total * size, count * size, count * size])
    else:
        heads.tie(elements)
        places += [(c.operand(node, 1), 2), (c.operand(node, 2), 2)]
    for index in (3, 4, 10, 12, 13):
        place = c.operand(node, index)
        if place is not None and place.rank == 4:
            places.append((place, 1))
    places += [(c.result(node, index), 1) for index in (1, 2)]
    for place, axis in places[1:]:
        heads.tie_axis(place, axis)
    _freeze_rest(c, places, f"{node.op_type} {node.name} mixes it")
    if c.operand(node, 11) is not None:
        c.freeze(elements, f"{node.op_type} {node.name} has a sink for each head")


def _rotary(c: Coupling, node: ir.Node) -> None:
    """The heads of x pass; within a head nothing can be cut."""
    x, out = c.operand(node, 0), c.result(node)
    if x is None or out is None:
        return
    if x.rank == 4:
        for axis in range(3):
            c.link_axes(x, axis, out, axis)
        _freeze_rest(c, [(x, 1), (out, 1)], f"{node.op_type} {node.name} rotates within a head")
        return
    count, cosines = attribute(node, "num_heads", 0), c.operand(node, 2 if node.domain else 1)
    if not count and cosines is not None and not attribute(node, "rotary_embedding_dim", 0):
        count = len(c.elements(x, 2)) // max(2 * cosines.dim(-1)[0], 1)  # the whole head is rotated
    if not count:
        c.freeze_node(node, f"{node.op_type} {node.name} does not say how many heads there are")
        return
    each = len(c.elements(x, 2)) // count
    for place in (x, out):
        elements = c.elements(place, 2)
        c.link(elements, np.repeat(elements[::each], each))
    c.link_axes(x, 2, out, 2)
    c.mark(c.elements(x, 2), "heads")


ATTENTION_RULES: dict[tuple[str, str], Callable[[Coupling, ir.Node], None]] = {
    ("", "Attention"): _attention,
    (MICROSOFT, "Attention"): _packed_attention,
    (MICROSOFT, "MultiHeadAttention"): _multi_head,
    (MICROSOFT, "GroupQueryAttention"): _group_query,
    ("", "RotaryEmbedding"): _rotary,
    (MICROSOFT, "RotaryEmbedding"): _rotary,
}
