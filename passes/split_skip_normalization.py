"""Residual addition and normalization as two nodes, in a form that ONNX Runtime does not fuse again."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ..compiler.base import Outcome, Pass, PassContext
from ..compiler.graph import (
    MICROSOFT,
    Names,
    all_nodes,
    attribute,
    dims,
    is_op,
    make_node,
    opset,
    producer,
    remove_dead,
    replace,
)
from .matching import next_node

_KINDS = {
    "SkipLayerNormalization": ("LayerNormalization", 17, 4),
    "SkipSimplifiedLayerNormalization": ("RMSNormalization", 23, 3),
}


@dataclasses.dataclass(frozen=True)
class SplitSkipNormalization(Pass):
    """Splits fused residual normalizations where the fused kernel is slower, and keeps them split at run time.

    1. ``SkipLayerNormalization(x, r, scale, bias, b)`` -> ``LayerNormalization(Sum(x, r, b))``; the sum also serves
       whoever read the fused node's sum output. Likewise SkipSimplifiedLayerNormalization -> Sum + RMSNormalization.
    2. ``LayerNormalization(Add(x, r))`` -> ``LayerNormalization(Sum(x, r))`` where x and r may have equal dims of rank
       3 and the sum has no other reader: only then ONNX Runtime's default optimizations write SkipLayerNormalization,
       whose CPU kernel takes 2.5 to 8 times as long. They do not know Sum, which costs as much as Add, so the artifact
       is fast without session options.

    Refused: on CUDA, where the fused kernels win; where measured costs say otherwise; where mean or inverse deviation
    (outputs 1 and 2) are read; below the opset of the unfused operator.

    Pays on the CPU provider: ``runtime/capabilities.py`` measures both forms. Contract: onnxruntime
    docs/ContribOperators.md, SkipLayerNormalization.
    """

    name: ClassVar[str] = "split-skip-normalization"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        fused = [node for node in all_nodes(model) if is_op(node, *_KINDS, domain=MICROSOFT)]
        sums = [node for node in all_nodes(model) if _would_be_fused(node)]
        if context.device != "cpu":
            for node in fused:
                outcome.refuse(
                    node, "Skip*Normalization -> Sum + normalization", "the fused kernel is the faster on CUDA"
                )
            return outcome
        names = Names(model)
        for node in fused:
            self._split(node, model, names, context, outcome)
        if context.costs.faster("SkipLayerNormalization", "Sum+LayerNormalization") is not True:
            for node in sums:
                base = names.fresh(f"{node.name}/sum")
                result = node.outputs[0]
                new = make_node("Sum", node.inputs, name=base, output=names.fresh(f"{result.name}_sum"), like=result)
                replace(node, [new], by=self.name)
                outcome.counts["Add kept apart from LayerNormalization"] += 1
        if outcome.counts["Add kept apart from LayerNormalization"]:
            ratio = context.costs.ratio("SkipLayerNormalization", "Sum+LayerNormalization", 1024)
            if ratio is not None:
                outcome.notes.append(
                    f"ONNX Runtime's default fusion would make each residual normalization {ratio:.1f} x slower "
                    "(1024 rows, this machine); Sum instead of Add keeps it from doing so"
                )
        if outcome.changed:
            remove_dead(model)
        return outcome

    def _split(self, node: ir.Node, model: ir.Model, names: Names, context: PassContext, outcome: Outcome) -> None:
        kind, needed, bias_index = _KINDS[node.op_type]
        rule = f"{node.op_type} -> Sum + {kind}"
        plain = "Sum+LayerNormalization" if kind == "LayerNormalization" else "Add+RMSNormalization"
        if context.costs.faster(node.op_type, plain) is True:
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
        summands = [value for value in (inputs[0], inputs[1], bias) if value is not None]
        base = names.fresh(f"{node.name}/sum")
        total = make_node("Sum", summands, name=base, output=names.fresh(f"{base}_out"), like=result)
        if len(node.outputs) > 3:
            node.outputs[3].replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
            if total.outputs[0].is_graph_output():
                total.outputs[0].name, node.outputs[3].name = node.outputs[3].name, total.outputs[0].name
        parts = inputs[2:bias_index]
        while parts and parts[-1] is None:
            parts.pop()
        attributes = {"axis": -1, "epsilon": attribute(node, "epsilon", 1e-5)}
        name = names.fresh(f"{node.name}/{kind}")
        output = names.fresh(f"{result.name}_normalized")
        operands = [total.outputs[0], *parts]
        new = make_node(kind, operands, name=name, output=output, like=result, attributes=attributes)
        replace(node, [total, new], by=self.name)
        outcome.counts[rule] += 1


def _would_be_fused(node: ir.Node) -> bool:
    """Whether ORT's SkipLayerNormFusion may take this Add: two computed terms, read by one LayerNormalization only.

    It wants equal dims of rank 3. Where they are unknown it may still find them equal; Sum does no harm then.
    """
    if not is_op(node, "Add"):
        return False
    following = next_node(node.outputs[0])
    if following is None or not is_op(following, "LayerNormalization") or following.inputs[0] is not node.outputs[0]:
        return False
    shapes = [shape for shape in map(dims, node.inputs) if shape is not None]
    if any(len(shape) != 3 for shape in shapes):
        return False
    if shapes and any(left != right and 1 in (left, right) for left, right in zip(shapes[0], shapes[-1], strict=True)):
        return False
    return all(value is not None and (producer(value) is not None or value.is_graph_input()) for value in node.inputs)
