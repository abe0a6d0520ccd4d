"""The two first products of a gated feed-forward layer as one."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ...compiler.base import Gate, Outcome, Pass, PassContext
from ...compiler.graph import (
    Names,
    all_nodes,
    dims,
    is_op,
    make_node,
    opset,
    producer,
    remove_dead,
)
from ..matching import next_node
from .projections import join_columns, place_joined, split_columns

_RULE = "act(x Wg) * (x Wu) -> Split(x [Wg | Wu])"
_OPSET = 13  # Split takes its sizes as an input


@dataclasses.dataclass(frozen=True)
class FuseGateUp(Pass):
    """Merges the gate and up products of gated feed-forward layers (SwiGLU, GeGLU; Shazeer 2020, arXiv 2002.05202).

    1. ``act(x Wg) * (x Wu) -> g, u = Split(x [Wg | Wu]); act(g) * u`` with any activation of one input, where both
       weights are constant matrices of one size that nothing else uses and x Wu and act(x Wg) meet in a Mul.

    One large product uses memory and cores better than two for few rows (one token); for many rows Split copies, so the
    speed gate decides.
    """

    name: ClassVar[str] = "fuse-gate-up"
    gate: ClassVar[Gate] = "not-slower"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        names = Names(model)
        for node in all_nodes(model):
            found = _products(node)
            if found is None or not isinstance(node.graph, ir.Graph):
                continue
            reason = _obstacle(*found) or ("Split needs opset 13" if opset(model) < _OPSET else "")
            if reason:
                outcome.refuse(node, _RULE, reason)
                continue
            self._merge(*found, node.graph, names)
            outcome.counts["gate and up merged"] += 1
        if outcome.changed:
            remove_dead(model)
        return outcome

    def _merge(self, gate: ir.Node, up: ir.Node, graph: ir.Graph, names: Names) -> None:
        base = names.fresh(f"{gate.name}/gate_up")
        weight = join_columns(graph, names, f"{base}.weight", [(gate.inputs[1], None), (up.inputs[1], None)])
        known = dims(gate.outputs[0])
        width = (dims(weight) or [None])[-1]
        shape = [*known[:-1], width] if known is not None else None
        operands = [gate.inputs[0], weight]
        product = make_node(
            "MatMul", operands, name=base, output=f"{base}_out", dtype=gate.outputs[0].dtype, shape=shape
        )
        half = int(width or 0) // 2
        pair = (gate, up)
        split = split_columns(
            graph, names, base, product.outputs[0], [node.outputs[0] for node in pair], [half, half], _OPSET
        )
        place_joined([product, split], pair, self.name)
        for node, part in zip(pair, split.outputs, strict=True):
            node.outputs[0].replace_all_uses_with(part)


def _products(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """(gate, up) of the Mul ``node`` of an activated and a plain product of one input; None for anything else."""
    if not is_op(node, "Mul") or len(node.inputs) != 2:
        return None
    for activated, plain in (node.inputs, node.inputs[::-1]):
        up = producer(plain, "MatMul")
        activation = producer(activated)
        gate = producer(activation.inputs[0], "MatMul") if activation is not None and activation.inputs else None
        if (
            up is None
            or gate is None
            or activation is None
            or len([v for v in activation.inputs if v is not None]) != 1
        ):
            continue
        if up.inputs[0] is gate.inputs[0] and up is not gate:
            return gate, up
    return None


def _obstacle(gate: ir.Node, up: ir.Node) -> str:
    """Why the two products cannot be merged; empty if they can."""
    for node in (gate, up):
        weight = node.inputs[1]
        if weight is None or not weight.is_initializer() or len(weight.shape or ()) != 2:
            return f"the weight of {node.name} is not a constant matrix"
        if weight.is_graph_input() or len(weight.uses()) != 1:
            return f"the weight of {node.name} is also used elsewhere: merging would store it twice"
        if next_node(node.outputs[0]) is None:
            return f"the result of {node.name} is also used elsewhere"
        if weight.graph is not node.graph:
            return f"the weight of {node.name} belongs to an enclosing graph"
    if dims(gate.inputs[1]) != dims(up.inputs[1]):
        return "gate and up differ in size"
    return ""
