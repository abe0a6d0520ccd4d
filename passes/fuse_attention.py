"""Scaled dot-product attention, however it is spelled, to one fused operator."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from ..compiler.base import Outcome, Pass, PassContext
from ..compiler.graph import (
    MICROSOFT,
    Names,
    add_initializer,
    is_op,
    make_node,
    opset,
    remove_dead,
    replace,
    require_domain,
)
from .attention_mask import MaskBuilder, is_finite, is_written_infinity
from .attention_match import AttentionMatch, NotAttention, Operand, match_attention
from .projections import biased_product
from .simplify_shapes import constant_target
from .symbolic import SymbolicShapes, number

Form = Literal["auto", "Attention", "MultiHeadAttention"]
_RULE = "softmax(scale * Q K^T + mask) V -> fused attention"
_STANDARD_OPSET = 23


@dataclasses.dataclass(frozen=True)
class FuseAttention(Pass):
    """Replaces attention blocks by ``Attention`` (ONNX, opset 23) or ``com.microsoft.MultiHeadAttention``.

    Matched by meaning, anchored at Softmax:

    1. Scores are ``Q K^T`` with constant scales anywhere: on the scores, on Q, on K, as Mul or Div.
    2. Any number of masks or biases added to the scores; or ``Where(condition, scores, fill)`` with a fill <= -1e9.
    3. Q, K and V come from [batch, length, heads * head_dim] tensors by any chain of Reshape and Transpose that
       provably means "split heads" (K also transposed), and the result goes back by "merge heads". Where the length
       comes before the batch (``torch.nn.MultiheadAttention``), Transposes bring it into order and back.
    4. The NaN guard of torch's SDPA export (``Where(IsNaN(p), 0, p)``) is dropped where the mask is provably finite;
       Attention gives 0 for fully masked rows by itself; else the guard moves behind the fused node, where a fully
       masked row is NaN as a whole.
    5. For MultiHeadAttention, constant biases of all three projections become the node's own bias input.

    In float16 rows that are masked everywhere by a finite number have no defined meaning (the number does not drown the
    scores in kernels that compute in float32); all others keep theirs.

    Refused: probabilities or scores used elsewhere, softmax over another axis, unequal heads of Q and K/V (grouped
    heads belong to the decoder fusion), head layouts that cannot be proved.

    Pays on the CPU provider by less data movement: Attention-23 takes about half the time of MultiHeadAttention up to
    a few hundred tokens (``runtime/capabilities.py`` measures it); on CUDA by flash and memory-efficient kernels.
    Contracts: ONNX operator Attention-23; onnxruntime docs/ContribOperators.md, MultiHeadAttention.

    Attributes:
        form: operator to write; ``"auto"`` takes the one measured faster on the target, and MultiHeadAttention where
            nothing was measured, below opset 23, or where a mask may be minus infinity.
    """

    name: ClassVar[str] = "fuse-attention"
    form: Form = "auto"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        anchors = [node for graph in model.graphs() for node in graph if is_op(node, "Softmax")]
        if not anchors:
            return outcome
        builder = _Builder(model, self.name, standard=self._standard(model, context))
        for softmax in anchors:
            try:
                outcome.counts[builder.fuse(match_attention(softmax, builder.shapes))] += 1
            except NotAttention as refusal:
                if str(refusal):
                    outcome.refuse(softmax, _RULE, str(refusal))
        if outcome.counts["MultiHeadAttention"]:
            require_domain(model, MICROSOFT)
        outcome.counts = +outcome.counts
        if outcome.changed:
            remove_dead(model)
        return outcome

    def _standard(self, model: ir.Model, context: PassContext) -> bool:
        """Whether to write Attention-23 where the mask allows it."""
        if opset(model) < _STANDARD_OPSET or self.form == "MultiHeadAttention":
            return False
        return self.form == "Attention" or bool(context.costs.faster("Attention", "MultiHeadAttention"))


class _Builder:
    """Builds the fused nodes."""

    def __init__(self, model: ir.Model, by: str, *, standard: bool) -> None:
        self.shapes = SymbolicShapes(model)
        self._names = Names(model)
        self._masks = MaskBuilder(model, self.shapes, self._names)
        self._by = by
        self._standard = standard

    def fuse(self, match: AttentionMatch) -> str:
        """Replaces one block; returns the operator written."""
        graph = match.last.graph
        if not isinstance(graph, ir.Graph):
            raise NotAttention("the block lies in a model-local function; inline functions first")
        target = self._regroup(match)
        finite = is_finite(match)
        standard = self._standard and (finite or (match.guarded and is_written_infinity(match)))
        new: list[ir.Node] = []
        base = self._names.fresh(f"{match.softmax.name or 'attention'}/attention")
        operands = [self._batch_first(part, new) for part in (match.query, match.key, match.value)]
        mask = self._masks.bias(match, operands[:2], graph, new, lifted=standard and finite)
        heads = match.query.heads
        if standard:
            inputs: list[ir.Value | None] = [*operands, mask]
            attributes: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": heads}
        else:
            inputs = [*self._projection_bias(operands, graph, base), None, mask]
            attributes = {"num_heads": heads}
        while inputs[-1] is None:
            inputs.pop()
        op, domain = ("Attention", "") if standard else ("MultiHeadAttention", MICROSOFT)
        result = match.last.outputs[0]
        output = self._names.fresh(f"{result.name}_attention")
        like = result if target is None else None
        attributes |= _scale(match)
        dtype = result.dtype
        new.append(
            make_node(
                op, inputs, name=base, output=output, like=like, dtype=dtype, attributes=attributes, domain=domain
            )
        )
        if match.guarded and not finite and not standard:
            new += self._guard(new[-1].outputs[0], graph)
        if match.result_length_first:
            new.append(self._swap(new[-1].outputs[0], f"{base}/length_first"))
        if target is not None and len(target) != 3:
            shape = add_initializer(graph, self._names, f"{base}.shape", np.array(target, np.int64))
            name = self._names.fresh(f"{base}/reshape")
            inputs = [new[-1].outputs[0], shape]
            new.append(make_node("Reshape", inputs, name=name, output=self._names.fresh(f"{name}_out"), like=result))
        replace(match.last, new, by=self._by, gone=match.nodes)
        return op

    def _regroup(self, match: AttentionMatch) -> tuple[int, ...] | None:
        """The constant shape of a result that is not [batch, length, hidden]; None for one that is."""
        hidden = number(match.value.heads * match.value.head_dim)
        outer = [match.query.batch, match.query.length]
        if match.result_length_first:
            outer.reverse()
        if match.result == (*outer, hidden) and not match.result_length_first:
            return None
        target = constant_target((*outer, hidden), match.result)
        if target is None:
            raise NotAttention("the shape of the result cannot be written as a constant")
        return target

    def _batch_first(self, operand: Operand, new: list[ir.Node]) -> ir.Value:
        """Q, K or V as [batch, length, hidden]."""
        if not operand.length_first:
            return operand.value
        new.append(self._swap(operand.value, f"{operand.value.name}/batch_first"))
        return new[-1].outputs[0]

    def _swap(self, value: ir.Value, base: str) -> ir.Node:
        name = self._names.fresh(base)
        attributes = {"perm": [1, 0, 2]}
        output = self._names.fresh(f"{name}_out")
        return make_node("Transpose", [value], name=name, output=output, dtype=value.dtype, attributes=attributes)

    def _projection_bias(self, operands: list[ir.Value], graph: ir.Graph, base: str) -> list[ir.Value | None]:
        """Q, K, V, and their constant biases joined to [hidden + hidden + v_hidden] where all three have one."""
        pairs = [pair for pair in map(biased_product, operands) if pair is not None]
        if len(pairs) != 3:
            return [*operands, None]
        joined = np.concatenate([array for _, array in pairs])
        return [*(product for product, _ in pairs), add_initializer(graph, self._names, f"{base}.bias", joined)]

    def _guard(self, result: ir.Value, graph: ir.Graph) -> list[ir.Node]:
        dtype = result.dtype.numpy() if result.dtype is not None else np.float32
        zero = add_initializer(graph, self._names, "guard_zero", np.array(0.0, dtype))
        names = [self._names.fresh(f"{result.name}_{word}") for word in ("isnan", "guarded")]
        nan = make_node("IsNaN", [result], name=names[0], output=names[0], like=result, dtype=ir.DataType.BOOL)
        where = make_node("Where", [nan.outputs[0], zero, result], name=names[1], output=names[1], like=result)
        return [nan, where]


def _scale(match: AttentionMatch) -> dict[str, float]:
    """The scale attribute, left out where it is the default 1 / sqrt(head_dim)."""
    return {} if math.isclose(match.scale, match.query.head_dim**-0.5, rel_tol=1e-6) else {"scale": match.scale}
