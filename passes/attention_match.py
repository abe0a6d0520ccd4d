"""Finds scaled dot-product attention by meaning, anchored at a Softmax; used by ``FuseAttention``."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ..compiler.graph import attribute, is_op, only_consumer, producer, scalar
from .factors import constant_factor
from .symbolic import ONE, Dim, Dims, SymbolicShapes, multiply, number
from .views import View, follow_view, origins, whole_view

# A fill below this leaves no weight beside any unmasked score, so adding it is the same as writing it.
_MASKED = -1e9
_MASKED_HALF = -6e4  # float16 ends at -65504


class NotAttention(Exception):
    """Ends a match; the message is the reason, empty where the Softmax has nothing to do with attention."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """Q, K or V before its split into heads.

    Attributes:
        value: [batch, length, heads * head_dim], or [length, batch, heads * head_dim] where ``length_first``.
        length_first: the layout of ``torch.nn.MultiheadAttention``.
        batch: dim of the batch.
        length: dim of the length.
        heads: number of heads.
        head_dim: size of one head.
        scale: product of the constant factors between ``value`` and the block.
    """

    value: ir.Value
    length_first: bool
    batch: Dim
    length: Dim
    heads: int
    head_dim: int
    scale: float


@dataclasses.dataclass
class AttentionMatch:
    """One attention block ``softmax(scale * Q K^T + masks) V``.

    Attributes:
        softmax: the anchor.
        query: Q; likewise ``key`` and ``value``.
        scale: product of all constant factors on Q, K and the scores.
        masks: values added to the scores, broadcasting to [batch, heads, query length, key length].
        fill: ``Where`` that writes a very low number into the scores, or None.
        guarded: whether NaN probabilities are replaced by 0 (torch's SDPA export).
        last: the node whose output is the result with merged heads.
        result: dims of that output.
        result_length_first: whether it has the length before the batch.
        nodes: the nodes of the block, without ``last``.
    """

    softmax: ir.Node
    query: Operand
    key: Operand
    value: Operand
    scale: float
    masks: list[ir.Value]
    fill: ir.Node | None
    guarded: bool
    last: ir.Node
    result: Dims
    result_length_first: bool
    nodes: list[ir.Node]


def match_attention(softmax: ir.Node, shapes: SymbolicShapes) -> AttentionMatch:
    """The attention block around ``softmax``.

    Raises:
        NotAttention: with the reason why it is none that can be fused.
    """
    nodes: list[ir.Node] = [softmax]
    context, guarded = below(softmax, nodes)
    scores = Scores(shapes, nodes)
    product = scores.walk_up(softmax.inputs[0])
    if scores.softcap:
        raise NotAttention("the scores are capped by tanh, which the kernels of encoders do not do")
    dims = shapes.dims(product.outputs[0])
    if dims is None or len(dims) != 4:
        raise NotAttention(f"the scores have {'unknown rank' if dims is None else f'rank {len(dims)}'}, not 4")
    if attribute(softmax, "axis", -1) not in (-1, 3):
        raise NotAttention(f"softmax runs over axis {attribute(softmax, 'axis', 1)}, not the last")
    query = _split_heads(product.inputs[0], shapes, "Q", transposed=False)
    key = _split_heads(product.inputs[1], shapes, "K", transposed=True)
    value = _split_heads(context.inputs[1], shapes, "V", transposed=False)
    if not query.heads == key.heads == value.heads:
        raise NotAttention(f"Q, K and V have {query.heads}, {key.heads} and {value.heads} heads")
    if value.scale != 1.0:
        raise NotAttention("V is scaled")
    merged = (query.batch, number(query.heads), query.length, number(value.head_dim))
    last, result, length_first = merge_heads(context, merged, shapes, nodes)
    scale = scores.scale * query.scale * key.scale
    masks, fill = scores.masks, scores.fill
    return AttentionMatch(
        softmax, query, key, value, scale, masks, fill, guarded, last, result, length_first, nodes[:-1]
    )


@dataclasses.dataclass
class Scores:
    """Walks from the Softmax up to ``Q K^T``, collecting what is done to the scores.

    Attributes:
        shapes: symbolic shapes of the model.
        nodes: receives the nodes on the way.
        scale: product of the constant factors, without the cap.
        softcap: c of ``c tanh(scores / c)``, 0 for none.
        masks: values added to the scores.
        fill: ``Where`` that writes a very low number into the scores, or None.
    """

    shapes: SymbolicShapes
    nodes: list[ir.Node]
    scale: float = 1.0
    softcap: float = 0.0
    masks: list[ir.Value] = dataclasses.field(default_factory=lambda: list[ir.Value]())
    fill: ir.Node | None = None

    def walk_up(self, value: ir.Value | None) -> ir.Node:
        """The MatMul of Q and K^T."""
        while True:
            node = producer(value)
            if node is None:
                raise NotAttention("")
            if only_consumer(node.outputs[0]) is None:
                raise NotAttention(
                    f"{node.op_type} {node.name} between Q K^T and the softmax is also used elsewhere"
                    if _leads_to_product(node.outputs[0])
                    else ""
                )
            self.nodes.append(node)
            if is_op(node, "MatMul"):
                return node
            if is_op(node, "Add"):
                value = self._mask(node)
            elif is_op(node, "Mul", "Div"):
                value = self._factor(node)
            elif is_op(node, "Where"):
                value = self._fill(node)
            elif is_op(node, "Tanh") and not self.softcap:
                self.softcap = self.scale
                value = node.inputs[0]
            else:
                raise NotAttention(f"the scores come from {node.op_type}, not from a MatMul" if self.masks else "")

    def _mask(self, node: ir.Node) -> ir.Value | None:
        left, right = node.inputs
        from_left, from_right = _leads_to_product(left), _leads_to_product(right)
        if from_left == from_right:
            raise NotAttention("both operands of Add come from a MatMul: cannot tell scores from bias" if left else "")
        self._unscaled_so_far()
        scores, mask = (left, right) if from_left else (right, left)
        if mask is not None:
            self.masks.append(mask)
        return scores

    def _fill(self, node: ir.Node) -> ir.Value | None:
        for fill, scores in (node.inputs[1:], node.inputs[:0:-1]):
            low = scalar(fill)
            if low is None or not _leads_to_product(scores):
                continue
            self._unscaled_so_far()
            if self.masks or self.fill is not None:
                raise NotAttention("the scores are masked more than once, once by writing a fill")
            highest = _MASKED_HALF if node.outputs[0].dtype == ir.DataType.FLOAT16 else _MASKED
            if low > highest:
                raise NotAttention(f"the fill {low:g} could leave weight on masked positions (<= {highest:g} does not)")
            self.fill = node
            return scores
        raise NotAttention("")

    def _factor(self, node: ir.Node) -> ir.Value | None:
        factor, other = constant_factor(node, self.shapes)
        if factor is None:
            raise NotAttention("the scores are scaled by something that is no constant" if self.masks else "")
        self.scale *= factor
        return other

    def _unscaled_so_far(self) -> None:
        if self.scale != 1.0:
            raise NotAttention("the scores are scaled after the mask, which scales the mask too")


def below(softmax: ir.Node, nodes: list[ir.Node]) -> tuple[ir.Node, bool]:
    """From the Softmax down to the MatMul with V; and whether a NaN guard lies between."""
    probabilities = softmax.outputs[0]
    users = {use.node for use in probabilities.uses()}
    guard = next((node for node in users if is_op(node, "IsNaN")), None)
    if guard is not None and len(users) == 2:
        where = only_consumer(guard.outputs[0])
        if where is None or not is_op(where, "Where") or where not in users or scalar(where.inputs[1]) != 0.0:
            raise NotAttention("")
        nodes += [guard, where]
        probabilities = where.outputs[0]
    node = only_consumer(probabilities)
    if node is None:
        in_attention = any(is_op(use.node, "MatMul") for use in probabilities.uses())
        raise NotAttention("the attention probabilities are also used elsewhere" if in_attention else "")
    if not is_op(node, "MatMul") or node.inputs[0] is not probabilities:
        raise NotAttention("")
    nodes.append(node)
    return node, guard is not None


def _leads_to_product(value: ir.Value | None) -> bool:
    """Whether ``value`` comes, through scales and masks, from a MatMul of two computed values."""
    for _ in range(8):
        node = producer(value, "MatMul", "Mul", "Div", "Add", "Where", "Tanh")
        if node is None:
            return False
        if node.op_type == "MatMul":
            return not any(item is None or item.is_initializer() for item in node.inputs)
        if node.op_type == "Add":
            return _leads_to_product(node.inputs[0]) or _leads_to_product(node.inputs[1])
        if node.op_type == "Where":
            value = node.inputs[1] if scalar(node.inputs[2]) is not None else node.inputs[2]
        else:
            value = node.inputs[0] if producer(node.inputs[0]) is not None else node.inputs[-1]
    return False


def _split_heads(value: ir.Value | None, shapes: SymbolicShapes, role: str, *, transposed: bool) -> Operand:
    """The tensor behind ``value`` that was split into heads, and how."""
    scale, chain = 1.0, list[ir.Node]()
    base = value
    while (node := producer(base, "Reshape", "Transpose", "Mul", "Div")) is not None:
        if node.op_type in ("Mul", "Div"):
            factor, other = constant_factor(node, shapes)
            if factor is None or only_consumer(node.outputs[0]) is None:
                break
            scale, base = scale * factor, other
        else:
            chain.insert(0, node)
            base = node.inputs[0]
    ranks = [shapes.dims(node.inputs[0]) for node in chain]
    start = next((index for index, dims in enumerate(ranks) if dims is not None and len(dims) == 3), None)
    dims = ranks[start] if start is not None else None
    if start is None or dims is None:
        raise NotAttention(f"{role} does not come from a [batch, length, hidden] tensor by Reshape and Transpose")
    above_scale = start == 0 and shapes.dims(base) == dims
    source = base if above_scale else chain[start].inputs[0]
    view = _followed(whole_view(dims), chain[start:], shapes, role)
    found = origins(view)
    first, second = ([(axis,)] if dims[axis] != ONE else [] for axis in (0, 1))
    head_axis, length_axis, dim_axis = (1, 3, 2) if transposed else (1, 2, 3)
    if len(view) != 4 or source is None or [found[0], found[length_axis]] not in ([first, second], [second, first]):
        raise NotAttention(f"{role} is not split into [batch, heads, length, head_dim]")
    split = (found[head_axis], found[dim_axis])
    if split not in (([(2, 0)], [(2, 1)]), ([], [(2,)]), ([(2,)], [])):
        raise NotAttention(f"the hidden axis of {role} is not split into heads and head_dim")
    heads, head_dim = (view[axis][0][0] if view[axis] else ONE for axis in (head_axis, dim_axis))
    if heads[1] or head_dim[1]:
        raise NotAttention(f"the number of heads of {role} is not a constant")
    length_first = [found[0], found[length_axis]] != [first, second]
    batch, length = (dims[1], dims[0]) if length_first else (dims[0], dims[1])
    return Operand(source, length_first, batch, length, heads[0], head_dim[0], scale)


def _followed(view: View, chain: list[ir.Node], shapes: SymbolicShapes, role: str) -> View:
    for node in chain:
        followed = follow_view(view, node, shapes)
        if followed is None:
            raise NotAttention(f"cannot prove what {node.op_type} {node.name} does to {role}")
        view = followed
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
        view, node = _followed(view, [following], shapes, "the result"), following
        nodes.append(node)
        found = origins(view)
        if found[-1] != heads + head_dim:
            continue
        order = [origin for axis in found for origin in axis]
        for first, second in ((batch, length), (length, batch)):
            if order == [*first, *second, *heads, *head_dim]:
                result = tuple(multiply([dim for dim, _ in axis]) for axis in view)
                return node, result, (first, second) != (batch, length)
