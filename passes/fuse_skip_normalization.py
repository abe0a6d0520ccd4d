"""Residual addition and normalization as one node, where that is measured faster."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ..compiler.base import Outcome, Pass, PassContext
from ..compiler.graph import (
    FROM_KEY,
    MICROSOFT,
    PASS_KEY,
    Names,
    all_nodes,
    attribute,
    dims,
    is_op,
    only_consumer,
    producer,
    remove_dead,
    require_domain,
)

_KINDS = {
    "LayerNormalization": ("SkipLayerNormalization", "Add+LayerNormalization"),
    "RMSNormalization": ("SkipSimplifiedLayerNormalization", "Add+RMSNormalization"),
}


@dataclasses.dataclass(frozen=True)
class FuseSkipNormalization(Pass):
    """``normalization(x + r)`` -> ``com.microsoft.Skip*Normalization``, with the sum as its 4th output where needed.

    1. ``LayerNormalization(Add(x, r), scale, bias)`` -> SkipLayerNormalization.
    2. ``RMSNormalization(Add(x, r), scale)`` -> SkipSimplifiedLayerNormalization.

    x and r have the same dims of rank 2 or 3, the axis is the last, and mean or deviation outputs are not read. Sum of
    two counts as Add.

    Only where it pays: on the CPU provider where ``runtime/capabilities.py`` measured it faster (SkipLayerNormalization
    never was: 5 to 8 times slower; for RMS it can pay for single rows); on CUDA always. Contract: onnxruntime
    docs/ContribOperators.md.
    """

    name: ClassVar[str] = "fuse-skip-normalization"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        names: Names | None = None
        for node in all_nodes(model):
            if not is_op(node, *_KINDS) or (total := producer(node.inputs[0], "Add", "Sum")) is None:
                continue
            kind, plain = _KINDS[node.op_type]
            rule = f"{plain} -> {kind}"
            if context.device == "cpu" and context.costs.faster(kind, plain, rows=1) is not True:
                ratio = context.costs.ratio(kind, plain, rows=1)
                said = "was not measured" if ratio is None else f"takes {ratio:.1f} x the time here"
                outcome.refuse(node, rule, f"the fused kernel {said}")
                continue
            reason = _obstacle(node, total)
            if reason:
                outcome.refuse(node, rule, reason)
                continue
            names = names or Names(model)
            self._fuse(node, total, kind, names)
            outcome.counts[kind] += 1
        if outcome.changed:
            require_domain(model, MICROSOFT)
            remove_dead(model)
        return outcome

    def _fuse(self, node: ir.Node, total: ir.Node, kind: str, names: Names) -> None:
        graph, result, sum_value = node.graph, node.outputs[0], total.outputs[0]
        needed = only_consumer(sum_value) is None
        values = [ir.Value(name=names.fresh(f"{result.name}_fused"), shape=result.shape, type=result.type)]
        if needed:
            values += [ir.Value(name=""), ir.Value(name="")]
            values.append(
                ir.Value(name=names.fresh(f"{sum_value.name}_sum"), shape=sum_value.shape, type=sum_value.type)
            )
        inputs = [*total.inputs, *node.inputs[1:]]
        attributes = {"epsilon": attribute(node, "epsilon", 1e-5)}
        name = names.fresh(f"{node.name}/{kind}")
        new = ir.node(kind, inputs, attributes=attributes, domain=MICROSOFT, outputs=values, name=name)
        new.metadata_props[PASS_KEY] = self.name
        new.metadata_props[FROM_KEY] = f"{total.op_type}:{total.name}, {node.op_type}:{node.name}"
        pairs = [(result, values[0]), *([(sum_value, values[3])] if needed else [])]
        if graph is None:
            raise ValueError(f"{node.name} is not in a graph")
        # The sum moves to where the normalization stands; its other readers come later, as _obstacle made sure.
        old_values, new_values = zip(*pairs, strict=True)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], old_values, new_values)


def _obstacle(node: ir.Node, total: ir.Node) -> str:
    shapes = [dims(value) for value in total.inputs]
    if len(total.inputs) != 2 or total.graph is not node.graph:
        return "the sum has more than two terms, or lies in another graph"
    if shapes[0] is None or shapes[0] != shapes[1] or len(shapes[0]) not in (2, 3):
        return "the two terms do not provably have the same dims"
    if attribute(node, "axis", -1) not in (-1, len(shapes[0]) - 1):
        return "it does not normalize the last axis"
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its mean or inverse standard deviation output is read"
    readers = {use.node for use in total.outputs[0].uses()} - {node}
    return "the sum is read before the normalization" if readers & _between(total, node) else ""


def _between(first: ir.Node, last: ir.Node) -> set[ir.Node]:
    """The nodes of the graph after ``first`` and before ``last``."""
    found: set[ir.Node] = set()
    graph = first.graph
    started = False
    for node in graph if isinstance(graph, ir.Graph) else []:
        if node is last:
            break
        if started:
            found.add(node)
        started = started or node is first
    return found
