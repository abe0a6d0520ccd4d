"""How Q, K and V are split into heads and the result is merged back, told by what the chains between do."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ...compiler.graph import is_op, only_consumer, producer
from ..factors import constant_factor
from ..symbolic import SymbolicShapes
from ..symbolic_dims import ONE, Dim, Dims, multiply
from .views import REPEAT, View, follow_view, origins, whole_view

_MOVES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand")


class NotAttention(Exception):
    """Ends a match; the message is the reason, empty where the node has nothing to do with attention."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """Q, K or V.

    Attributes:
        value: [batch, length, heads * head_dim] before its split into heads, or a tensor of rank 4 that was computed
            with its heads apart (rotated, normalized); the axes in any order.
        order: the axes of ``value`` as [batch, length, heads * head_dim] or [batch, length, heads, head_dim].
        batch: dim of the batch.
        length: dim of the length.
        heads: number of heads, before they are repeated.
        head_dim: size of one head.
        repeats: how many query heads read each head, side by side.
        scale: product of the constant factors between ``value`` and the block.
    """

    value: ir.Value
    order: tuple[int, ...]
    batch: Dim
    length: Dim
    heads: int
    head_dim: int
    repeats: int
    scale: float

    @property
    def in_order(self) -> bool:
        """Whether no Transpose is needed."""
        return self.order == tuple(range(len(self.order)))


@dataclasses.dataclass(frozen=True)
class _Level:
    """A value above an operand, the nodes that move it down there, and the factors on the way."""

    value: ir.Value
    chain: list[ir.Node]
    scale: float


def split_heads(
    value: ir.Value | None, shapes: SymbolicShapes, role: str, *, transposed: bool = False, repeated: bool = True
) -> Operand:
    """The tensor behind ``value`` that was split into heads, and how.

    Args:
        value: [batch, heads, length, head_dim], the last two swapped where ``transposed``.
        shapes: symbolic shapes of the model.
        role: Q, K or V, for messages.
        transposed: see ``value``.
        repeated: whether repeats of heads are looked through.

    Raises:
        NotAttention: it cannot be proved to be such a split.
    """
    if value is None:
        raise NotAttention("")
    levels = [(level, shapes.dims(level.value)) for level in _levels_above(value, shapes)]
    ranks = [0 if dims is None else len(dims) for _, dims in levels]
    # What is only moved must be a split of the hidden axis; a tensor that is computed by head is taken as it is.
    by_head = len(ranks) if _repeats(levels[0][0]) or 3 not in ranks else ranks.index(3)
    candidates = [level for (level, _), rank in zip(levels, ranks, strict=True) if rank == 3]
    candidates += [level for (level, _), rank in zip(levels[:by_head], ranks, strict=False) if rank == 4]
    failed: NotAttention | None = None
    for level in candidates:
        try:
            operand = _operand(level, shapes, role, transposed)
            if repeated or operand.repeats == 1:
                return operand
        except NotAttention as error:
            failed = failed or error
    raise failed or NotAttention(f"{role} does not come from a [batch, length, hidden] tensor by Reshape and Transpose")


def _repeats(level: _Level) -> bool:
    return any(is_op(node, "Expand") for node in level.chain)


def _levels_above(value: ir.Value, shapes: SymbolicShapes) -> list[_Level]:
    """The values that ``value`` is made of by moving and scaling only, the highest first."""
    levels: list[_Level] = []
    chain, scale = list[ir.Node](), 1.0
    base: ir.Value | None = value
    while base is not None:
        levels.insert(0, _Level(base, list(chain), scale))
        node = producer(base, *_MOVES, "Mul", "Div")
        if node is None:
            break
        if not is_op(node, "Mul", "Div"):
            chain.insert(0, node)
            base = node.inputs[0]
            continue
        factor, other = constant_factor(node, shapes)
        if factor is None or only_consumer(base) is None or shapes.dims(other) != shapes.dims(base):
            break
        scale, base = scale * factor, other
    return levels


def _operand(level: _Level, shapes: SymbolicShapes, role: str, transposed: bool) -> Operand:
    dims = shapes.dims(level.value)
    if dims is None:
        raise NotAttention(f"the rank of {level.value.name} is not known")
    view = followed(whole_view(dims), level.chain, shapes, role)
    if len(view) != 4:
        raise NotAttention(f"{role} is not split into [batch, heads, length, head_dim]")
    batch, heads, length, features = (view[axis] for axis in ((0, 1, 3, 2) if transposed else (0, 1, 2, 3)))
    repeats = multiply([dim for dim, origin in heads if origin == REPEAT])
    if heads and heads[-1][1] == REPEAT:
        heads = heads[:-1]
    order = _order([batch, length, heads, features], dims, role)
    count, size = multiply([dim for dim, _ in heads]), multiply([dim for dim, _ in features])
    if count[1] or size[1] or repeats[1]:
        raise NotAttention(f"the number of heads of {role} is not a constant")
    return Operand(level.value, order, dims[order[0]], dims[order[1]], count[0], size[0], repeats[0], scale=level.scale)


def _order(parts: View, dims: Dims, role: str) -> tuple[int, ...]:
    """The axes of a tensor of ``dims`` as [batch, length, hidden], or [batch, length, heads, head_dim]."""
    batch, length, heads, features = origins(parts)
    if len(dims) == 4:
        wanted = [batch, length, heads, features]
    elif (heads, features) in (([(2, 0)], [(2, 1)]), ([], [(2,)]), ([(2,)], [])):
        wanted = [batch, length, [(2,)]]
    else:
        raise NotAttention(f"the hidden axis of {role} is not split into heads and head_dim")
    free = [axis for axis, dim in enumerate(dims) if dim == ONE]  # axes of size 1 may stand anywhere
    order: list[int] = []
    for part in wanted:
        if not part and not free:
            raise NotAttention(f"{role} is not split into [batch, heads, length, head_dim]")
        order.append(part[0][0] if part else free.pop(0))
        if part not in ([], [(order[-1],)]):
            raise NotAttention(f"{role} is not split into [batch, heads, length, head_dim]")
    if sorted(order) != list(range(len(dims))):
        raise NotAttention(f"{role} is not split into [batch, heads, length, head_dim]")
    return tuple(order)


def followed(view: View, chain: list[ir.Node], shapes: SymbolicShapes, role: str) -> View:
    """``view`` at the end of ``chain``.

    Raises:
        NotAttention: what a node of it does cannot be proved.
    """
    for node in chain:
        after = follow_view(view, node, shapes)
        if after is None:
            raise NotAttention(f"cannot prove what {node.op_type} {node.name} does to {role}")
        view = after
    return view


def merge_heads(
    context: ir.Node, dims: Dims, shapes: SymbolicShapes, nodes: list[ir.Node]
) -> tuple[ir.Node, Dims, bool]:
    """Follows [batch, heads, length, head_dim] down to where the heads are merged.

    Returns the node that does it, the dims of its output ([batch, length, hidden], or the same with batch and length
    joined or swapped), and whether the length comes before the batch there.
    """
    view = whole_view(dims)
    batch, heads, length, head_dim = origins(view)
    node = context
    while True:
        following = only_consumer(node.outputs[0])
        if following is None or not is_op(following, "Reshape", "Transpose"):
            raise NotAttention("the heads of the result are not merged into [batch, length, hidden]")
        view, node = followed(view, [following], shapes, "the result"), following
        nodes.append(node)
        found = origins(view)
        if found[-1] != heads + head_dim:
            continue
        order = [origin for axis in found for origin in axis]
        for first, second in ((batch, length), (length, batch)):
            if order == [*first, *second, *heads, *head_dim]:
                result = tuple(multiply([dim for dim, _ in axis]) for axis in view)
                return node, result, (first, second) != (batch, length)
