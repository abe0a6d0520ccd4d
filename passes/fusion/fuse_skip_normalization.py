"""Residual addition and normalization as one node, where that is measured faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from ...compiler.base import Outcome, Pass, PassContext
from ...compiler.graph import (
    FROM_KEY,
    MICROSOFT,
    PASS_KEY,
    Names,
    all_nodes,
    attribute,
    constant,
    dims,
    is_op,
    only_consumer,
    producer,
    rank,
    remove_dead,
    require_domain,
    subgraphs,
)
from ..matching import as_vector, deciding_rows

_KINDS = {
    "LayerNormalization": ("SkipLayerNormalization", "Add+LayerNormalization"),
    "RMSNormalization": ("SkipSimplifiedLayerNormalization", "Add+RMSNormalization"),
}
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclasses.dataclass(frozen=True)
class FuseSkipNormalization(Pass):
    """``normalization(x + r)`` -> ``com.microsoft.Skip*Normalization``, with the sum as its 4th output where needed.

    1. ``LayerNormalization(Add(x, r), scale, bias)`` -> SkipLayerNormalization.
    2. ``RMSNormalization(Add(x, r), scale)`` -> SkipSimplifiedLayerNormalization.

    x and r have the same dims of rank 2 or 3, the axis is the last, and mean or deviation outputs are not read. Sum of
    two counts as Add.

    Only where it pays: on the CPU provider where ``runtime/capabilities.py`` measured it faster for few and for many
    rows (on the machines seen so far it never was: SkipLayerNormalization takes 2.5 to 8 times as long,
    SkipSimplifiedLayerNormalization 1.0 to 1.7), or for one row in a decoder with a cache, which runs token by token
    (there one call less counts); on CUDA always. Contract: onnxruntime docs/ContribOperators.md.

    Attributes:
        always: fuse whatever the measured costs say.
    """

    name: ClassVar[str] = "fuse-skip-normalization"
    always: bool = False

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        candidates = [node for node in all_nodes(model) if is_op(node, *_KINDS) and _sum_of(node) is not None]
        if not candidates:
            return outcome
        names, order = Names(model), _order(model)
        rows = deciding_rows(model)
        for node in candidates:
            total = _sum_of(node)
            kind, plain = _KINDS[node.op_type]
            reason = self._not_worth_it(kind, plain, rows, context) or _obstacle(node, total, order)
            if total is None or reason:
                outcome.refuse(node, f"{plain} -> {kind}", reason)
                continue
            order[self._fuse(node, total, kind, names)] = order[node]
            outcome.counts[kind] += 1
        if outcome.changed:
            require_domain(model, MICROSOFT)
            remove_dead(model)
        return outcome

    def _not_worth_it(self, kind: str, plain: str, rows: Sequence[int], context: PassContext) -> str:
        if self.always or context.device != "cpu":
            return ""
        ratios = [ratio for ratio in (context.costs.ratio(kind, plain, n) for n in rows) if ratio is not None]
        if not ratios:
            return "the fused kernel was not measured: compile with measured costs, or set always=True"
        worst = max(ratios)
        return f"the fused kernel takes up to {worst:.1f} x the time here" if worst >= 1.0 else ""

    def _fuse(self, node: ir.Node, total: ir.Node, kind: str, names: Names) -> ir.Node:
        graph, result, sum_value = node.graph, node.outputs[0], total.outputs[0]
        needed = only_consumer(sum_value) is None
        values = [ir.Value(name=names.fresh(f"{result.name}_fused"), shape=result.shape, type=result.type)]
        if needed:
            values += [ir.Value(name=""), ir.Value(name="")]
            values.append(
                ir.Value(name=names.fresh(f"{sum_value.name}_sum"), shape=sum_value.shape, type=sum_value.type)
            )
        if not isinstance(graph, ir.Graph):
            raise ValueError(f"{node.name} is not in a graph")
        parts = [as_vector(value, graph, names) if value is not None else None for value in node.inputs[1:]]
        inputs = [*total.inputs, *parts]
        attributes = {"epsilon": attribute(node, "epsilon", 1e-5)}
        name = names.fresh(f"{node.name}/{kind}")
        new = ir.node(kind, inputs, attributes=attributes, domain=MICROSOFT, outputs=values, name=name)
        new.metadata_props.update(node.metadata_props)
        new.metadata_props[PASS_KEY] = self.name
        new.metadata_props[FROM_KEY] = f"{total.op_type}:{total.name}, {node.op_type}:{node.name}"
        pairs = [(result, values[0]), *([(sum_value, values[3])] if needed else [])]
        # The sum moves to where the normalization stands; its other readers come later, as _obstacle made sure.
        old_values, new_values = zip(*pairs, strict=True)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], old_values, new_values)
        return new


def _sum_of(node: ir.Node) -> ir.Node | None:
    return producer(node.inputs[0], "Add", "Sum")


def _obstacle(node: ir.Node, total: ir.Node | None, order: dict[ir.Node, int]) -> str:
    if total is None or len(total.inputs) != 2 or total.graph is not node.graph:
        return "the sum has more than two terms, or lies in another graph"
    shapes = [dims(value) for value in total.inputs]
    if shapes[0] is None or shapes[0] != shapes[1] or None in shapes[0] or len(shapes[0]) not in (2, 3):
        return "the two terms do not provably have the same dims, or not two or three of them"
    if node.outputs[0].dtype not in _TYPES:
        return f"the fused kernel has no {node.outputs[0].dtype} form"
    if attribute(node, "axis", -1) not in (-1, len(shapes[0]) - 1):
        return "it does not normalize the last axis"
    if not all(_is_row(value) for value in node.inputs[1:] if value is not None):
        return "its scale or bias is no vector"
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its mean or inverse standard deviation output is read"
    early = any(order[use.node] < order[node] for use in total.outputs[0].uses())
    return "the sum is read before the normalization" if early else ""


def _is_row(value: ir.Value) -> bool:
    """Whether ``value`` is a vector, or a constant that is one but for axes of size 1."""
    array = constant(value, limit=1 << 20) if rank(value) != 1 else None
    return rank(value) == 1 or (array is not None and array.ndim > 0 and array.size == array.shape[-1])


def _order(model: ir.Model) -> dict[ir.Node, int]:
    """Where each node stands; the nodes of a body stand right behind the node that has it."""
    order: dict[ir.Node, int] = {}

    def visit(graph: ir.Graph) -> None:
        for node in graph:
            order[node] = len(order)
            for body in subgraphs(node):
                visit(body)

    visit(model.graph)
    return order
