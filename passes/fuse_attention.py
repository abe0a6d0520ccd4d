"""Scaled dot-product attention, however it is spelled, to ``com.microsoft.MultiHeadAttention``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ..compiler.base import Outcome, Pass, PassContext
from ..compiler.graph import (
    MICROSOFT,
    Array,
    Names,
    add_initializer,
    constant,
    is_op,
    make_node,
    only_consumer,
    opset,
    producer,
    remove_dead,
    replace,
    require_domain,
    scalar,
)
from .attention_match import AttentionMatch, NotAttention, match_attention
from .symbolic import SymbolicShapes

_RULE = "softmax(scale * Q K^T + mask) V -> MultiHeadAttention"
_LOWEST = np.float32(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True)
class FuseAttention(Pass):
    """Replaces attention blocks by ``com.microsoft.MultiHeadAttention``.

    Matched by meaning, anchored at Softmax:

    1. Scores are ``Q K^T`` with constant scales anywhere: on the scores, on Q, on K, as Mul or Div.
    2. Any number of masks or biases added to the scores; or ``Where(condition, scores, fill)`` with a fill <= -1e9.
    3. Q, K and V come from [batch, length, heads * head_dim] tensors by any chain of Reshape and Transpose that
       provably means "split heads" (K also transposed), and the result goes back by "merge heads".
    4. The NaN guard of torch's SDPA export (``Where(IsNaN(p), 0, p)``) is dropped where the mask is provably finite,
       else moved behind the fused node, where a fully masked row is NaN as a whole.
    5. Constant projection biases of Q, K and V become the node's own bias input, where all three have one.

    Refused: probabilities or scores used elsewhere, softmax over another axis, unequal heads of Q and K/V (grouped
    heads belong to the decoder fusion), head layouts that cannot be proved.

    Pays on the CPU provider by less data movement (no transposes, no materialized NaN guard) and on CUDA by its
    flash and memory-efficient kernels. Contract: onnxruntime docs/ContribOperators.md, MultiHeadAttention.
    """

    name: ClassVar[str] = "fuse-attention"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        anchors = [node for graph in model.graphs() for node in graph if is_op(node, "Softmax")]
        if not anchors:
            return outcome
        builder = _Builder(model, self.name)
        for softmax in anchors:
            try:
                builder.fuse(match_attention(softmax, builder.shapes))
                outcome.counts["MultiHeadAttention"] += 1
            except NotAttention as refusal:
                if str(refusal):
                    outcome.refuse(softmax, _RULE, str(refusal))
        if outcome.changed:
            require_domain(model, MICROSOFT)
            remove_dead(model)
        return outcome


class _Builder:
    """Builds the fused nodes; a mask that had to be adapted is shared by all layers that use it."""

    def __init__(self, model: ir.Model, by: str) -> None:
        self.shapes = SymbolicShapes(model)
        self._opset = opset(model)
        self._names = Names(model)
        self._by = by
        self._masks: dict[tuple[object, ...], ir.Value] = {}

    def fuse(self, match: AttentionMatch) -> None:
        """Replaces one block."""
        graph = match.last.graph
        if not isinstance(graph, ir.Graph):
            raise NotAttention("the block lies in a model-local function; inline functions first")
        result = match.last.outputs[0]
        base = self._names.fresh(f"{match.softmax.name or 'attention'}/MultiHeadAttention")
        inputs, bias = self._projection_bias(match, graph, base)
        new: list[ir.Node] = []
        mask = self._mask(match, graph, new)
        attributes: dict[str, Any] = {"num_heads": match.heads}
        if not math.isclose(match.scale, match.head_dim**-0.5, rel_tol=1e-6):
            attributes["scale"] = match.scale
        operands = [*inputs, bias, None, mask]
        while operands[-1] is None:
            operands.pop()
        fused = make_node(
            "MultiHeadAttention",
            operands,
            name=base,
            output=self._names.fresh(f"{result.name}_attention"),
            like=result,
            attributes=attributes,
            domain=MICROSOFT,
        )
        new.append(fused)
        if match.guarded and not _finite(match):
            new += self._guard(fused, graph)
        replace(match.last, new, by=self._by, gone=match.nodes)

    def _projection_bias(
        self, match: AttentionMatch, graph: ir.Graph, base: str
    ) -> tuple[list[ir.Value | None], ir.Value | None]:
        """Joins the constant biases of the three projections into one initializer [hidden + hidden + v_hidden]."""
        sources: list[ir.Value | None] = [match.query, match.key, match.value]
        found = [_biased_product(value) for value in (match.query, match.key, match.value)]
        pairs = [pair for pair in found if pair is not None]
        if len(pairs) != 3:
            return sources, None
        joined = np.concatenate([array for _, array in pairs])
        return [product for product, _ in pairs], add_initializer(graph, self._names, f"{base}.bias", joined)

    def _mask(self, match: AttentionMatch, graph: ir.Graph, new: list[ir.Node]) -> ir.Value | None:
        """One additive bias of shape [1 or batch, 1 or heads, query length, key length], or None."""
        if match.fill is None and not match.masks:
            return None
        query, key = self.shapes.dims(match.query), self.shapes.dims(match.key)
        lengths = (query[1] if query else match.query, key[1] if key else match.key)
        parts = tuple(match.fill.inputs) if match.fill is not None else tuple(match.masks)
        identity = (graph, lengths, parts)
        if identity not in self._masks:
            value = self._fill_mask(match.fill, graph, new) if match.fill is not None else match.masks[0]
            for other in match.masks[1:]:
                node = self._node("Add", [value, other], "mask_sum", value.dtype)
                new.append(node)
                value = node.outputs[0]
            dims = self.shapes.dims(value)
            if dims is None or len(dims) != 4 or dims[2:] != lengths:
                value = self._expand(value, match, graph, new)
            self._masks[identity] = value
        return self._masks[identity]

    def _fill_mask(self, where: ir.Node, graph: ir.Graph, new: list[ir.Node]) -> ir.Value:
        """``Where(condition, scores, fill)`` as an additive mask: 0 where the scores stay, the fill elsewhere."""
        zero = add_initializer(graph, self._names, "mask_zero", np.array(0.0, np.float32))
        first = scalar(where.inputs[1])
        number = first if first is not None else scalar(where.inputs[2])
        low = add_initializer(
            graph,
            self._names,
            "mask_fill",
            np.array(-np.inf if number is not None and math.isinf(number) else _LOWEST, np.float32),
        )
        branches = [low, zero] if first is not None else [zero, low]
        node = self._node("Where", [where.inputs[0], *branches], "mask", ir.DataType.FLOAT)
        new.append(node)
        return node.outputs[0]

    def _expand(self, value: ir.Value, match: AttentionMatch, graph: ir.Graph, new: list[ir.Node]) -> ir.Value:
        """Broadcasts a mask to full query and key length, which the kernel demands; batch and heads may stay 1."""
        ones = add_initializer(graph, self._names, "mask_ones", np.array([1, 1], np.int64))
        lengths = [self._length(source, graph, new) for source in (match.query, match.key)]
        target = self._node("Concat", [ones, *lengths], "mask_shape", ir.DataType.INT64, shape=[4], axis=0)
        expand = self._node("Expand", [value, target.outputs[0]], "mask_expanded", value.dtype)
        new += [target, expand]
        return expand.outputs[0]

    def _length(self, source: ir.Value, graph: ir.Graph, new: list[ir.Node]) -> ir.Value:
        """The length (axis 1) of a [batch, length, hidden] tensor, as a tensor of one element."""
        if self._opset >= 15:
            node = self._node("Shape", [source], "length", ir.DataType.INT64, shape=[1], start=1, end=2)
            new.append(node)
            return node.outputs[0]
        one = add_initializer(graph, self._names, "length_axis", np.array([1], np.int64))
        whole = self._node("Shape", [source], "length_shape", ir.DataType.INT64, shape=[3])
        node = self._node("Gather", [whole.outputs[0], one], "length", ir.DataType.INT64, shape=[1], axis=0)
        new += [whole, node]
        return node.outputs[0]

    def _guard(self, fused: ir.Node, graph: ir.Graph) -> list[ir.Node]:
        zero = add_initializer(graph, self._names, "guard_zero", np.array(0.0, np.float32))
        result = fused.outputs[0]
        nan = self._node("IsNaN", [result], "guard_isnan", ir.DataType.BOOL)
        return [nan, self._node("Where", [nan.outputs[0], zero, result], "guarded", result.dtype)]

    def _node(
        self,
        op: str,
        inputs: list[ir.Value | None],
        base: str,
        dtype: ir.DataType | None,
        shape: list[int | str | None] | None = None,
        **attributes: int,
    ) -> ir.Node:
        name = self._names.fresh(f"attention_{base}")
        return make_node(
            op,
            inputs,
            name=name,
            output=self._names.fresh(f"{name}_out"),
            dtype=dtype,
            shape=shape,
            attributes=attributes,
        )


def _biased_product(value: ir.Value) -> tuple[ir.Value, Array] | None:
    """For ``MatMul(x, W) + b`` with a constant vector b that only the attention reads: the product and b."""
    node = producer(value, "Add")
    if node is None or len({use.node for use in value.uses()}) != 1 or value.is_graph_output():
        return None
    for left, right in (node.inputs, node.inputs[::-1]):
        product = producer(left, "MatMul")
        bias = constant(right, limit=1 << 16)
        if product is None or left is None or bias is None or bias.ndim != 1 or only_consumer(left) is not node:
            continue
        weight = product.inputs[1]
        if weight is not None and weight.shape is not None and weight.shape[-1] == bias.size:
            return left, bias
    return None


def _finite(match: AttentionMatch) -> bool:
    """Whether no row of the mask can be minus infinity everywhere, so that no probability is NaN."""
    if match.fill is not None:
        return all(number is None or math.isfinite(number) for number in map(scalar, match.fill.inputs[1:]))
    return len(match.masks) <= 1 and all(_finite_value(mask) for mask in match.masks)


def _finite_value(value: ir.Value | None) -> bool:
    node = producer(value)
    if node is None:
        array = constant(value, limit=1 << 20)
        return array is not None and bool(np.isfinite(array).all())
    if is_op(node, "Where"):
        return _finite_value(node.inputs[1]) and _finite_value(node.inputs[2])
    if is_op(node, "Expand", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Transpose", "Slice"):
        return _finite_value(node.inputs[0])
    return False
