"""Rotary position embedding before attention without a cache, however it is spelled, to RotaryEmbedding."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ...compiler.base import Outcome, Pass, PassContext
from ...compiler.graph import (
    MICROSOFT,
    Names,
    add_initializer,
    is_op,
    make_node,
    opset,
    producer,
    rank,
    remove_dead,
    replace,
    require_domain,
)
from ..symbolic import SymbolicShapes
from .attention_match import match_attention
from .cached_attention import find_caches
from .head_layout import NotAttention, Operand
from .rotary_probe import Angles, RotaryProbe, Site

_RULE = "cos x + sin rotated(x) -> RotaryEmbedding"
_STANDARD_OPSET = 23


@dataclasses.dataclass(frozen=True)
class FuseRotary(Pass):
    """Replaces the rotation of Q and K in encoders, and in decoders without a cache, by ``RotaryEmbedding``.

    Anchored at attention (written out, or ONNX Attention); what happens between a projection and the attention is told
    by running it on made inputs (``rotary_probe.py``), so that the spelling does not matter. Recognized are

    1. half-rotated and interleaved pairs, of all features of a head or the first of them;
    2. Q and K that are projections, consecutive parts of one product, or normalized by head;
    3. cosines and sines that the graph computes (from a Range, position ids, the mask) or holds: they stay as they are,
       computed once for all layers.

    The kernel rotates [batch, length, heads * head_dim]; the split into heads comes after it, where ``FuseAttention``,
    which must run later, drops it. One table for all rows: ``com.microsoft.RotaryEmbedding``; angles of their own for
    each row: ``RotaryEmbedding`` of ONNX, from opset 23 on.

    Refused: models with a key/value cache (``FuseGroupQueryAttention`` rotates inside of its kernel), rotations in
    subgraphs, cosines and sines that are no tensors of their own in the graph.

    Pays on CPU: six elementwise operators over Q and K and four Transposes less. Rotation and attention take 0.46
    (1 x 16 tokens), 0.32 (1 x 128) and 0.64 (8 x 128) of the time of the form written out. Rotary embedding: Su et al.
    2021 (arXiv 2104.09864). Contracts: onnxruntime docs/ContribOperators.md; ONNX operator RotaryEmbedding-23.
    """

    name: ClassVar[str] = "fuse-rotary"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        shapes = SymbolicShapes(model)
        operands = _operands(model, shapes)
        if not operands:
            return outcome
        first = operands[0].value.producer() or next(iter(model.graph))
        if find_caches(model):
            outcome.refuse(
                first, _RULE, "the model has a key/value cache: fuse-group-query-attention rotates in its kernel"
            )
            return outcome
        context.progress("probing rotations")

        def refuse(value: ir.Value, reason: str) -> None:
            outcome.refuse(value.producer() or first, _RULE, reason)

        builder = _Builder(model, self.name)
        for site in RotaryProbe(model, shapes).find(operands, refuse):
            if site.cos.by_row and opset(model) < _STANDARD_OPSET:
                refuse(site.operand.value, "each row has positions of its own: run upgrade-opset first")
                continue
            outcome.counts[builder.write(site)] += 1
        if outcome.counts["com.microsoft.RotaryEmbedding"]:
            require_domain(model, MICROSOFT)
        outcome.counts = +outcome.counts
        if outcome.changed:
            remove_dead(model)
        return outcome


def _operands(model: ir.Model, shapes: SymbolicShapes) -> list[Operand]:
    """Q and K of the attentions of the main graph that are computed by head, in the order of the graph."""
    found: dict[ir.Value, Operand] = {}
    for node in model.graph:
        if not is_op(node, "Softmax", "Attention"):
            continue
        try:
            match = match_attention(node, shapes)
        except NotAttention:
            continue
        for operand in (match.query, match.key):
            maker = producer(operand.value)
            inside = maker is not None and maker.graph is model.graph and maker.op_type != "RotaryEmbedding"
            if inside and len(operand.order) == 4:
                found[operand.value] = operand
    made = {value: number for number, node in enumerate(model.graph) for value in node.outputs}
    return sorted(found.values(), key=lambda item: made[item.value])


class _Builder:
    """Writes the fused nodes."""

    def __init__(self, model: ir.Model, by: str) -> None:
        self._graph, self._by = model.graph, by
        self._names = Names(model)
        self._tables: dict[tuple[Angles, int], ir.Value] = {}

    def write(self, site: Site) -> str:
        """Replaces one rotation; returns the operator written."""
        operand, rotation = site.operand, site.rotation
        new: list[ir.Node] = []
        result = operand.value
        x = self._source(site, new)
        half = rotation.width // 2
        tables = [self._table(angles, half, new) for angles in (site.cos, site.sin)]
        attributes: dict[str, Any] = {"interleaved": int(rotation.interleaved), "num_heads": operand.heads}
        if rotation.width != operand.head_dim:
            attributes["rotary_embedding_dim"] = rotation.width
        domain = "" if site.cos.by_row else MICROSOFT
        inputs = [x, *tables] if site.cos.by_row else [x, self._integers("rotary_offset", [0]), *tables]
        base = self._names.fresh(f"{result.name}_rotary")
        rotated = self._append("RotaryEmbedding", inputs, base, new, x, domain, attributes)
        heads = operand.heads
        target = self._integers("rotary_heads", [0, 0, heads, operand.head_dim])
        split = self._append("Reshape", [rotated, target], f"{base}_split", new, None)
        if not operand.in_order:
            perm = [operand.order.index(axis) for axis in range(4)]
            self._append("Transpose", [split], f"{base}_by_head", new, result, attributes={"perm": perm})
        new[-1].outputs[0].shape = result.shape
        maker = result.producer()
        if maker is None:
            raise ValueError(f"{result.name} is made by no node")
        replace(maker, new, by=self._by)
        return f"{domain}.RotaryEmbedding" if domain else "RotaryEmbedding"

    def _source(self, site: Site, new: list[ir.Node]) -> ir.Value:
        """What is rotated as [batch, length, heads * head_dim]."""
        value, operand = site.source, site.operand
        width = operand.heads * operand.head_dim
        if site.heads_axis == 1:
            perm = {"perm": [0, 2, 1, 3]}
            value = self._append("Transpose", [value], f"{value.name}_by_token", new, None, attributes=perm)
        if site.heads_axis:
            target = self._integers("rotary_flat", [0, 0, width])
            value = self._append("Reshape", [value, target], f"{site.source.name}_flat", new, None)
        if not site.whole:
            bounds = [self._integers("bound", [number]) for number in (site.start, site.start + width, -1)]
            value = self._append("Slice", [value, *bounds], f"{site.source.name}_part", new, None)
        if value is not site.source:
            lead = (operand.value.shape[axis] for axis in operand.order[:2]) if operand.value.shape is not None else ()
            value.shape = ir.Shape([*lead, width]) if operand.value.shape is not None else None
        return value

    def _table(self, angles: Angles, half: int, new: list[ir.Node]) -> ir.Value:
        """Cosines or sines as [length, width / 2], or [batch, length, width / 2] where rows have their own."""
        key = (angles, half)
        if key in self._tables:
            return self._tables[key]
        value = angles.value
        name = value.name or "angles"
        if angles.step * half != (value.shape[-1] if value.shape is not None else 0) or angles.step > 1:
            numbers = (0, angles.step * half, -1, angles.step)
            bounds = [self._integers("bound", [number]) for number in numbers]
            value = self._append("Slice", [value, *bounds], f"{name}_half", new, None)
        if not angles.by_row:
            target = self._integers("rotary_table", [-1, half])
            value = self._append("Reshape", [value, target], f"{name}_table", new, None)
        elif rank(angles.value) == 4:
            value = self._append("Squeeze", [value, self._integers("axis", [1])], f"{name}_table", new, None)
        self._tables[key] = value
        return value

    def _integers(self, base: str, numbers: list[int]) -> ir.Value:
        return add_initializer(self._graph, self._names, base, np.array(numbers, np.int64))

    def _append(
        self,
        op: str,
        inputs: list[ir.Value | None] | list[ir.Value],
        base: str,
        new: list[ir.Node],
        like: ir.Value | None,
        domain: str = "",
        attributes: dict[str, Any] | None = None,
    ) -> ir.Value:
        name = self._names.fresh(base)
        dtype = inputs[0].dtype if inputs[0] is not None else None
        node = make_node(
            op, inputs, name=name, output=name, like=like, dtype=dtype, attributes=attributes, domain=domain
        )
        new.append(node)
        return node.outputs[0]
