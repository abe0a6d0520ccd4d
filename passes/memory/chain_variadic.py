"""Sums and extrema of many inputs, taken up one by one: each input can go when it has been added."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import onnx_ir as ir

from ...compiler.base import Gate, Outcome, Pass, PassContext
from ...compiler.graph import Names, all_nodes, dims, is_op, make_node, replace

_PAIRWISE = {"Sum": "Add", "Max": "Max", "Min": "Min"}


@dataclasses.dataclass(frozen=True)
class ChainVariadic(Pass):
    """Writes Sum, Max and Min of more than two inputs as a chain of operators with two.

    1. ``Sum(a, b, c, ...)`` -> ``Add(Add(Add(a, b), c), ...)``, and Max and Min alike, in the order of the inputs, in
       which ONNX Runtime takes them too: the same numbers.

    All inputs of the variadic operator are alive when it runs, and ONNX Runtime's kernel needs a buffer for what it has
    so far besides its output. In the chain an input is alive until its own step, which ``plan-memory`` puts right after
    the node that makes it.

    Refused: inputs of different shapes, or of shapes that are not known.

    Pays in memory on the CPU provider, before ``plan-memory``; the kernels take no longer.
    """

    name: ClassVar[str] = "chain-variadic"
    tolerance: ClassVar[float] = 0.0
    gate: ClassVar[Gate] = "not-slower"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        names = Names(model)
        for node in all_nodes(model):
            if is_op(node, *_PAIRWISE) and len(node.inputs) > 2:
                self._chain(node, names, outcome)
        return outcome

    def _chain(self, node: ir.Node, names: Names, outcome: Outcome) -> None:
        result, operator = node.outputs[0], _PAIRWISE[node.op_type]
        shape = dims(result)
        if shape is None or None in shape or any(dims(value) != shape for value in node.inputs):
            reason = "the inputs differ in shape, or their shapes are not known"
            outcome.refuse(node, f"{node.op_type} of many -> {operator} of two", reason)
            return
        new: list[ir.Node] = []

        def step(so_far: ir.Value | None, value: ir.Value | None) -> ir.Value:
            name, output = names.fresh(f"{node.name}/{operator.lower()}"), names.fresh(f"{result.name}_so_far")
            new.append(make_node(operator, [so_far, value], name=name, output=output, like=result))
            return new[-1].outputs[0]

        functools.reduce(step, node.inputs[1:], node.inputs[0])
        replace(node, new, by=self.name)
        outcome.counts[f"{node.op_type} chained"] += 1
