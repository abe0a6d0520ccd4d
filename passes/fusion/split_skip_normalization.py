"""Residual addition and normalization as two nodes, in a form that ONNX Runtime does not fuse again."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ...compiler.base import Outcome, Pass, PassContext
from ...compiler.graph import (
    FROM_KEY,
    MICROSOFT,
    PASS_KEY,
    Names,
    add_initializer,
    all_nodes,
    attribute,
    constant,
    dims,
    is_op,
    make_node,
    opset,
    producer,
    remove_dead,
    replace,
)
from ..matching import deciding_rows, next_node

_KINDS = {
    "SkipLayerNormalization": ("LayerNormalization", 17, 4),
    "SkipSimplifiedLayerNormalization": ("RMSNormalization", 23, 3),
}
_KEPT = "Add kept apart from LayerNormalization"


@dataclasses.dataclass(frozen=True)
class SplitSkipNormalization(Pass):
    """Splits fused residual normalizations where the fused kernel is slower, and keeps them split at run time.

    1. ``SkipLayerNormalization(x, r, scale, bias, b)`` -> ``LayerNormalization(x + r + b)``; the sum also serves the
       readers of the fused node's sum output. Likewise SkipSimplifiedLayerNormalization -> Add + RMSNormalization.
    2. ``LayerNormalization(Add(x, r), scale)``: the scale [D] becomes [1, D], which means and costs the same, where x
       and r may have equal dims of rank 3 and the sum has no other reader. Only then ONNX Runtime's default
       optimizations write SkipLayerNormalization, whose CPU kernel takes 2.5 to 8 times as long; with a scale that is
       no vector they do not (onnxruntime 1.25 and newer; 1.24 fuses it still, and then fails at run time). So the
       artifact is fast without session options. (Sum instead of Add also stops them, but runs on one thread only: 1.3
       times as long with two threads at 1024 rows, more with more.)

    Refused: on CUDA, where the fused kernels win; where measured costs say otherwise; where mean or inverse deviation
    (outputs 1 and 2) are read; below the opset of the unfused operator; a scale computed at run time.

    Pays on the CPU provider: ``runtime/capabilities.py`` measures both forms. Contract: onnxruntime
    docs/ContribOperators.md, SkipLayerNormalization.
    """

    name: ClassVar[str] = "split-skip-normalization"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        fused = [node for node in all_nodes(model) if is_op(node, *_KINDS, domain=MICROSOFT)]
        if context.device != "cpu":
            for node in fused:
                outcome.refuse(
                    node, "Skip*Normalization -> Add + normalization", "the fused kernel is the faster on CUDA"
                )
            return outcome
        names = Names(model)
        for node in fused:
            self._split(node, model, names, context, outcome)
        if context.costs.faster("SkipLayerNormalization", "Add+LayerNormalization") is not True:
            self._keep_apart(model, names, context, outcome)
        if outcome.changed:
            remove_dead(model)
        return outcome

    def _split(self, node: ir.Node, model: ir.Model, names: Names, context: PassContext, outcome: Outcome) -> None:
        """Rule 1."""
        kind, needed, bias_index = _KINDS[node.op_type]
        rule = f"{node.op_type} -> Add + {kind}"
        rows = deciding_rows(model)
        if context.costs.faster(node.op_type, f"Add+{kind}", rows[len(rows) // 2]) is True:
            outcome.refuse(node, rule, "the fused kernel is measured faster here")
            return
        if opset(model) < needed:
            outcome.refuse(node, rule, f"{kind} needs opset {needed}: run upgrade-opset first")
            return
        if any(value.uses() or value.is_graph_output() for value in node.outputs[1:3]):
            outcome.refuse(node, rule, "its mean or inverse standard deviation output is read")
            return
        inputs = list(node.inputs)
        bias = inputs[bias_index] if len(inputs) > bias_index else None
        result = node.outputs[0]
        like = result if result.type is not None else inputs[0]  # onnx infers no types of these operators' results
        new: list[ir.Node] = []
        total = inputs[0]
        for summand in (bias, inputs[1]):
            if summand is not None:
                base = names.fresh(f"{node.name}/sum")
                new.append(make_node("Add", [total, summand], name=base, output=f"{base}_out", like=like))
                total = new[-1].outputs[0]
        if len(node.outputs) > 3 and total is not None:
            node.outputs[3].replace_all_uses_with(total, replace_graph_outputs=True)
            if total.is_graph_output():
                total.name, node.outputs[3].name = node.outputs[3].name, total.name
        parts = inputs[2:bias_index]
        while parts and parts[-1] is None:
            parts.pop()
        attributes = {"axis": -1, "epsilon": attribute(node, "epsilon", 1e-5)}
        name = names.fresh(f"{node.name}/{kind}")
        output = names.fresh(f"{result.name}_normalized")
        new.append(make_node(kind, [total, *parts], name=name, output=output, like=like, attributes=attributes))
        replace(node, new, by=self.name)
        outcome.counts[rule] += 1

    def _keep_apart(self, model: ir.Model, names: Names, context: PassContext, outcome: Outcome) -> None:
        """Rule 2."""
        rows: dict[tuple[ir.Graph, ir.Value], ir.Value] = {}
        for node in all_nodes(model):
            scale = node.inputs[1] if is_op(node, "LayerNormalization") and _would_be_fused(node) else None
            if scale is None or not isinstance(node.graph, ir.Graph):
                continue
            array = constant(scale, limit=1 << 20)
            if array is None:
                outcome.refuse(node, _KEPT, "its scale is computed at run time, so its shape cannot be changed here")
                continue
            key = (node.graph, scale)
            if key not in rows:
                rows[key] = add_initializer(node.graph, names, f"{scale.name}_row", array.reshape(1, -1))
            node.replace_input_with(1, rows[key])
            node.metadata_props[PASS_KEY] = self.name
            node.metadata_props[FROM_KEY] = f"{node.op_type}:{node.name}"
            outcome.counts[_KEPT] += 1
        ratio = context.costs.ratio("SkipLayerNormalization", "Add+LayerNormalization", 1024)
        if outcome.counts[_KEPT] and ratio is not None:
            outcome.notes.append(
                f"ONNX Runtime's default fusion would make each residual normalization {ratio:.1f} x slower "
                "(1024 rows, this machine); a scale of shape [1, D] keeps it from doing so"
            )


def _would_be_fused(node: ir.Node) -> bool:
    """Whether ORT's SkipLayerNormFusion may take this LayerNormalization with the Add of two computed terms before it.

    It wants equal dims of rank 3. Where they are unknown it may still find them equal.
    """
    total = producer(node.inputs[0], "Add")
    scale = dims(node.inputs[1])
    if total is None or next_node(total.outputs[0]) is not node or (scale is not None and len(scale) != 1):
        return False
    shapes = [shape for shape in map(dims, total.inputs) if shape is not None]
    if any(len(shape) != 3 for shape in shapes):
        return False
    if shapes and any(left != right and 1 in (left, right) for left, right in zip(shapes[0], shapes[-1], strict=True)):
        return False
    return all(value is not None and (producer(value) is not None or value.is_graph_input()) for value in total.inputs)
