"""Scaled dot-product attention, however it is spelled, to one fused operator."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from ...compiler.base import Outcome, Pass, PassContext
from ...compiler.graph import (
    MICROSOFT,
    Names,
    add_initializer,
    attribute,
    is_op,
    make_node,
    opset,
    remove_dead,
    replace,
    require_domain,
)
from ..fusion.projections import biased_product
from ..simplify.simplify_shapes import constant_target
from ..symbolic import SymbolicShapes
from ..symbolic_dims import number
from .attention_mask import MaskBuilder, is_finite, is_written_infinity
from .attention_match import AttentionMatch, match_attention
from .cached_attention import find_caches
from .head_layout import NotAttention, Operand

Form = Literal["auto", "Attention", "MultiHeadAttention"]
_RULE = "softmax(scale * Q K^T + mask) V -> fused attention"
_STANDARD_OPSET = 23


@dataclasses.dataclass(frozen=True)
class FuseAttention(Pass):
    """Replaces attention blocks by ``Attention`` (ONNX, opset 23) or ``com.microsoft.MultiHeadAttention``.

    Matched by meaning, anchored at Softmax, or at Attention with operands [batch, heads, length, head_dim]:

    1. Scores are ``Q K^T`` with constant scales anywhere: on the scores, on Q, on K, as Mul or Div.
    2. Any number of masks or biases added to the scores; or ``Where(condition, scores, fill)`` with a fill <= -1e9.
    3. Q, K and V come from [batch, length, heads * head_dim] tensors by any chain of Reshape and Transpose that
       provably means "split heads" (K also transposed), and the result goes back by "merge heads". Where the length
       comes before the batch (``torch.nn.MultiheadAttention``), Transposes bring it into order and back.
    4. The NaN guard of torch's SDPA export (``Where(IsNaN(p), 0, p)``) is dropped where the mask is provably finite;
       Attention gives 0 for fully masked rows by itself; else the guard moves behind the fused node, where a fully
       masked row is NaN as a whole.
    5. For MultiHeadAttention, constant biases of all three projections become the node's own bias input.
    6. Repeated heads of K and V (grouped-query attention) go to Attention-23 unrepeated; MultiHeadAttention gets them
       repeated as they are.
    7. Operands that are computed by head (rotated, normalized) are brought to [batch, length, hidden] by Transpose.
    8. Attention-23 with 4-D operands, as torch's exporter writes it for SDPA, gets the 3-D operands before the split
       into heads, where that saves Transposes or repeats; mask, causality, cap and precision stay as they are. It
       becomes MultiHeadAttention only where that is measured faster, and for no mask, a bool mask or causality alone.

    In float16 rows that are masked everywhere by a finite number have no defined meaning (the number does not drown the
    scores in kernels that compute in float32); all others keep theirs.

    Refused: probabilities or scores used elsewhere, softmax over another axis, head layouts that cannot be proved,
    attention over a key/value cache (``FuseGroupQueryAttention``).

    Pays on the CPU provider by less data movement: Attention-23 takes about half the time of MultiHeadAttention up to
    a few hundred tokens (``runtime/capabilities.py`` measures it); on CUDA by flash and memory-efficient kernels.
    Contracts: ONNX operator Attention-23; onnxruntime docs/ContribOperators.md, MultiHeadAttention.

    Attributes:
        form: operator to write; ``"auto"`` takes the one measured faster on the target. Where nothing was measured, an
            Attention stays one, grouped heads become one, and all else becomes MultiHeadAttention; so does all below
            opset 23 and what has a mask that may be minus infinity.
    """

    name: ClassVar[str] = "fuse-attention"
    form: Form = "auto"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        anchors = [node for graph in model.graphs() for node in graph if is_op(node, "Softmax", "Attention")]
        if not anchors:
            return outcome
        builder = _Builder(model, self.name, self._preferred(model, context))
        for anchor in anchors:
            try:
                outcome.counts[builder.fuse(anchor)] += 1
            except NotAttention as refusal:
                if str(refusal):
                    outcome.refuse(anchor, _RULE, str(refusal))
        if outcome.counts["MultiHeadAttention"]:
            require_domain(model, MICROSOFT)
        outcome.counts = +outcome.counts
        if outcome.changed:
            remove_dead(model)
        return outcome

    def _preferred(self, model: ir.Model, context: PassContext) -> Form:
        """The form to write where both can be; "auto" where nothing is known of either."""
        if opset(model) < _STANDARD_OPSET:
            return "MultiHeadAttention"
        faster = context.costs.faster("Attention", "MultiHeadAttention")
        if self.form != "auto" or faster is None:
            return self.form
        return "Attention" if faster else "MultiHeadAttention"


class _Builder:
    """Builds the fused nodes."""

    def __init__(self, model: ir.Model, by: str, preferred: Form) -> None:
        self._shapes = SymbolicShapes(model)
        self._names = Names(model)
        self._masks = MaskBuilder(model, self._shapes, self._names)
        self._cached = {value for cache in find_caches(model) for value in (cache.new, cache.present)}
        self._by = by
        self._preferred = preferred

    def fuse(self, anchor: ir.Node) -> str:
        """Replaces one block; returns the operator written."""
        match = match_attention(anchor, self._shapes)
        standard = self._is_standard(match)
        if match.grouped and not standard:
            match = match_attention(anchor, self._shapes, grouped=False)
        graph = match.last.graph
        if not isinstance(graph, ir.Graph):
            raise NotAttention("the block lies in a model-local function; inline functions first")
        if {match.key.value, match.value.value} & self._cached:
            raise NotAttention("it reads a key/value cache, which fuse-group-query-attention takes care of")
        if is_op(anchor, "Attention") and not _is_worth(match):
            raise NotAttention("its operands are computed by head: [batch, length, hidden] would need more Transposes")
        target = self._regroup(match)
        new: list[ir.Node] = []
        base = self._names.fresh(f"{anchor.name or 'attention'}/attention")
        operands = [self._flat(part, graph, new) for part in (match.query, match.key, match.value)]
        result = match.last.outputs[0]
        new.append(
            self._attention(match, operands, graph, base, new)
            if standard
            else self._multi_head_attention(match, operands, graph, base, new)
        )
        new[-1].outputs[0].shape = result.shape if target is None else None
        if not standard and not _is_finite(match) and match.guarded:
            new += self._guard(new[-1].outputs[0], graph)
        if match.result_length_first:
            new.append(self._transpose(new[-1].outputs[0], f"{base}/length_first", (1, 0, 2)))
        if target is not None and len(target) != 3:
            new.append(self._reshape(new[-1].outputs[0], f"{base}/reshape", target, graph, like=result))
        replace(match.last, new, by=self._by, gone=match.nodes)
        return "Attention" if standard else "MultiHeadAttention"

    def _is_standard(self, match: AttentionMatch) -> bool:
        """Whether to write Attention-23."""
        if is_op(match.anchor, "Attention"):
            return self._preferred != "MultiHeadAttention" or not self._fits_multi_head(match)
        if self._preferred == "MultiHeadAttention" or match.scale <= 0:  # ORT's kernel demands a positive scale
            return False
        possible = is_finite(match) or (match.guarded and is_written_infinity(match))
        return possible and (self._preferred == "Attention" or match.grouped)

    def _fits_multi_head(self, match: AttentionMatch) -> bool:
        """Whether MultiHeadAttention can say the same as the ONNX Attention."""
        node = match.anchor
        if match.grouped or attribute(node, "softcap", 0.0) or attribute(node, "softmax_precision", 0):
            return False
        if attribute(node, "is_causal", 0):
            return not match.masks and match.query.length == match.key.length
        return all(mask.dtype == ir.DataType.BOOL for mask in match.masks)

    def _attention(
        self, match: AttentionMatch, operands: list[ir.Value], graph: ir.Graph, base: str, new: list[ir.Node]
    ) -> ir.Node:
        attributes: dict[str, Any] = {"q_num_heads": match.query.heads, "kv_num_heads": match.key.heads}
        if is_op(match.anchor, "Attention"):
            mask = match.masks[0] if match.masks else None
            kept = {name: attribute(match.anchor, name) for name in ("is_causal", "softcap", "softmax_precision")}
            attributes |= {name: value for name, value in kept.items() if value}
        else:
            mask = self._masks.bias(match, operands[:2], graph, new, lifted=is_finite(match))
        return self._fused("Attention", [*operands, mask], base, match, attributes)

    def _multi_head_attention(
        self, match: AttentionMatch, operands: list[ir.Value], graph: ir.Graph, base: str, new: list[ir.Node]
    ) -> ir.Node:
        attributes: dict[str, Any] = {"num_heads": match.query.heads}
        if is_op(match.anchor, "Attention") and attribute(match.anchor, "is_causal", 0):
            attributes["unidirectional"] = 1
        mask = self._masks.bias(match, operands[:2], graph, new, lifted=False)
        inputs = [*self._projection_bias(operands, graph, base), None, mask]
        return self._fused("MultiHeadAttention", inputs, base, match, attributes, MICROSOFT)

    def _fused(
        self,
        op: str,
        inputs: list[ir.Value | None],
        base: str,
        match: AttentionMatch,
        attributes: dict[str, Any],
        domain: str = "",
    ) -> ir.Node:
        while inputs[-1] is None:
            inputs.pop()
        result = match.last.outputs[0]
        output = self._names.fresh(f"{result.name}_attention")
        attributes |= _scale(match)
        return make_node(op, inputs, name=base, output=output, dtype=result.dtype, attributes=attributes, domain=domain)

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

    def _flat(self, operand: Operand, graph: ir.Graph, new: list[ir.Node]) -> ir.Value:
        """Q, K or V as [batch, length, heads * head_dim]."""
        value = operand.value
        if not operand.in_order:
            new.append(self._transpose(value, f"{operand.value.name}/batch_first", operand.order))
            value = new[-1].outputs[0]
        if len(operand.order) == 4:
            target = (0, 0, operand.heads * operand.head_dim)
            new.append(self._reshape(value, f"{operand.value.name}/flat", target, graph))
            value = new[-1].outputs[0]
        return value

    def _transpose(self, value: ir.Value, base: str, perm: tuple[int, ...]) -> ir.Node:
        name = self._names.fresh(base)
        output = self._names.fresh(f"{name}_out")
        attributes = {"perm": list(perm)}
        return make_node("Transpose", [value], name=name, output=output, dtype=value.dtype, attributes=attributes)

    def _reshape(
        self, value: ir.Value, base: str, target: tuple[int, ...], graph: ir.Graph, like: ir.Value | None = None
    ) -> ir.Node:
        name = self._names.fresh(base)
        shape = add_initializer(graph, self._names, f"{name}.shape", np.array(target, np.int64))
        output = self._names.fresh(f"{name}_out")
        return make_node("Reshape", [value, shape], name=name, output=output, like=like, dtype=value.dtype)

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


def _is_finite(match: AttentionMatch) -> bool:
    """Whether no probability can be NaN, as MultiHeadAttention computes them."""
    return not match.masks if is_op(match.anchor, "Attention") else is_finite(match)


def _is_worth(match: AttentionMatch) -> bool:
    """Whether 3-D operands save an ONNX Attention Transposes or repeated heads."""
    saved = 0 if match.result_length_first else 1
    for operand in (match.query, match.key, match.value):
        saved += 1 if operand.in_order else 3 - len(operand.order)
    return match.grouped or saved > 0
