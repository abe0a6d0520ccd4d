"""Finds scaled dot-product attention by meaning, anchored at a Softmax or ONNX Attention; used by ``FuseAttention``."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from ...compiler.graph import attribute, is_op, only_consumer, producer, scalar
from ..factors import constant_factor
from ..symbolic import SymbolicShapes
from ..symbolic_dims import ONE, Dims, number
from .head_layout import NotAttention, Operand, merge_heads, split_heads

# A fill below this leaves no weight beside any unmasked score, so adding it is the same as writing it.
_MASKED = -1e9
_MASKED_HALF = -6e4  # float16 ends at -65504


@dataclasses.dataclass
class AttentionMatch:
    """One attention block ``softmax(scale * Q K^T + masks) V``.

    Attributes:
        anchor: the Softmax, or the ONNX Attention.
        query: Q; likewise ``key`` and ``value``.
        scale: product of all constant factors on Q, K and the scores.
        masks: values added to the scores, broadcasting to [batch, heads, query length, key length]; the mask of an ONNX
            Attention may be bool.
        fill: ``Where`` that writes a very low number into the scores, or None.
        guarded: whether NaN probabilities are replaced by 0 (torch's SDPA export, ONNX Attention).
        last: the node whose output is the result with merged heads.
        result: dims of that output.
        result_length_first: whether it has the length before the batch.
        nodes: the nodes of the block, without ``last``.
    """

    anchor: ir.Node
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

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a head of K and V."""
        return self.query.heads != self.key.heads


def match_attention(anchor: ir.Node, shapes: SymbolicShapes, *, grouped: bool = True) -> AttentionMatch:
    """The attention block around ``anchor``, a Softmax or an ONNX Attention with operands of rank 4.

    Args:
        anchor: the node.
        shapes: symbolic shapes of the model.
        grouped: whether repeats of the heads of K and V are looked through.

    Raises:
        NotAttention: with the reason why it is none that can be fused.
    """
    nodes: list[ir.Node] = [anchor]
    if is_op(anchor, "Attention"):
        context, guarded, fill = anchor, True, None  # rows that are masked everywhere give 0
        sources, masks, scale = _operator(anchor, shapes)
    else:
        context, guarded = below(anchor, nodes)
        scores = Scores(shapes, nodes)
        product = scores.walk_up(anchor.inputs[0])
        _check_scores(anchor, product, scores)
        sources = [*product.inputs[:2], context.inputs[1]]
        masks, fill, scale = scores.masks, scores.fill, scores.scale
    transposed = context is not anchor
    query = split_heads(sources[0], shapes, "Q", repeated=False)
    key = split_heads(sources[1], shapes, "K", transposed=transposed, repeated=grouped)
    value = split_heads(sources[2], shapes, "V", repeated=grouped)
    if key.heads != value.heads or query.heads % key.heads:
        raise NotAttention(f"Q, K and V have {query.heads}, {key.heads} and {value.heads} heads")
    if query.batch != ONE and ONE in (key.batch, value.batch):
        raise NotAttention("all rows of the batch share one K or V")
    if value.scale != 1.0:
        raise NotAttention("V is scaled")
    merged = (query.batch, number(query.heads), query.length, number(value.head_dim))
    last, result, length_first = merge_heads(context, merged, shapes, nodes)
    scale *= query.scale * key.scale
    return AttentionMatch(
        anchor, query, key, value, scale, masks, fill, guarded, last, result, length_first, nodes[:-1]
    )


def _operator(node: ir.Node, shapes: SymbolicShapes) -> tuple[list[ir.Value | None], list[ir.Value], float]:
    """Q, K and V, the mask and the scale of an ONNX Attention with operands of rank 4, as torch exports it."""
    dims = shapes.dims(node.inputs[0])
    if dims is None or len(dims) != 4:
        raise NotAttention("" if dims is not None else "the rank of Q is not known")
    if any(item is not None for item in node.inputs[4:]):
        raise NotAttention("it has a key/value cache of its own")
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        raise NotAttention("its further outputs are used")
    if dims[3][1]:
        raise NotAttention("the size of its heads is not a constant")
    scale = attribute(node, "scale")
    masks = [item for item in node.inputs[3:4] if item is not None]
    return [*node.inputs[:3]], masks, dims[3][0] ** -0.5 if scale is None else float(scale)


def _check_scores(softmax: ir.Node, product: ir.Node, scores: Scores) -> None:
    if scores.softcap:
        raise NotAttention("the scores are capped by tanh, which the kernels of encoders do not do")
    dims = scores.shapes.dims(product.outputs[0])
    if dims is None or len(dims) != 4:
        raise NotAttention(f"the scores have {'unknown rank' if dims is None else f'rank {len(dims)}'}, not 4")
    if attribute(softmax, "axis", -1) not in (-1, 3):
        raise NotAttention(f"softmax runs over axis {attribute(softmax, 'axis', 1)}, not the last")


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
