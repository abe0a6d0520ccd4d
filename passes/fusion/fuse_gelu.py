"""Gelu and SiLU in all spellings, to one operator."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import onnx_ir as ir

from ...compiler.base import Outcome, Pass, PassContext
from ...compiler.graph import (
    MICROSOFT,
    Names,
    all_nodes,
    is_op,
    make_node,
    opset,
    producer,
    remove_dead,
    replace,
    require_domain,
    scalar,
)
from ..matching import MORE_AXES, grows_rank, next_node, other_operand
from .polynomial import Polynomial, is_polynomial, polynomial

_ERF = {1: math.sqrt(0.5)}
_TANH = {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * 0.044715}
# How far constants may be off: people write sqrt(2) as 1.4142 and sqrt(2 / pi) as 0.7979, and half types round them.
_FLOAT_PRECISION = 3e-5
_PRECISION: dict[ir.DataType | None, float] = {ir.DataType.FLOAT16: 1e-3, ir.DataType.BFLOAT16: 1e-2}
_MAX_STEPS = 16


@dataclasses.dataclass(frozen=True)
class FuseGelu(Pass):
    """Recognizes the activations by what they compute, anchored at Erf, Tanh or Sigmoid.

    1. ``0.5 x (1 + erf(x / sqrt 2))`` -> Gelu; factors and sums in any order and grouping, constants up to 3e-5.
    2. ``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`` -> Gelu(tanh); the cubic in any form, also ``x (a + b x^2)``.
    3. ``x sigmoid(a x)`` -> QuickGelu(alpha=a); a = 1 is SiLU (Swish), a = 1.702 the quick Gelu.

    Gelu is written as the ONNX operator from opset 20 on (same kernel and speed as com.microsoft.Gelu on the CPU
    provider), below as com.microsoft.Gelu or FastGelu. Gelu nodes that are there already stay. The bias is not fused:
    BiasGelu takes as long as Add + Gelu on the CPU provider (``runtime/capabilities.py``).

    Pays on CPU and CUDA: one pass over memory instead of four to eight. Sources: Hendrycks and Gimpel 2016
    (arXiv 1606.08415); ONNX operator Gelu-20; onnxruntime docs/ContribOperators.md.
    """

    name: ClassVar[str] = "fuse-gelu"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        names = Names(model)
        ready = [node for node in all_nodes(model) if _is_gelu(node)]
        if ready:
            outcome.notes.append(f"{len(ready)} Gelu nodes were there already")
        for node in all_nodes(model):
            if is_op(node, "Erf", "Tanh"):
                self._gate(node, model, names, outcome)
            elif is_op(node, "Sigmoid"):
                self._sigmoid(node, model, names, outcome, context)
        if outcome.changed:
            remove_dead(model)
        return outcome

    def _gate(self, anchor: ir.Node, model: ir.Model, names: Names, outcome: Outcome) -> None:
        """``x (0.5 + 0.5 anchor(...))``: follows the only readers until the expression is complete."""
        kind, expected = ("erf", _ERF) if is_op(anchor, "Erf") else ("tanh", _TANH)
        rule = f"0.5 x (1 + {kind}(...)) -> Gelu"
        x = _argument_of(anchor.inputs[0], expected)
        if x is None:
            following = next_node(anchor.outputs[0])
            if following is not None and is_op(following, "Add") and 1.0 in map(scalar, following.inputs):
                outcome.refuse(anchor, rule, f"the argument of {kind} is not the one of Gelu")
            return
        # The value so far is x^degree (offset + slope anchor(...)).
        degree, offset, slope, node, gone = 0, 0.0, 1.0, anchor, [anchor]
        while not (degree == 1 and math.isclose(offset, 0.5, rel_tol=1e-5) and math.isclose(slope, 0.5, rel_tol=1e-5)):
            following = next_node(node.outputs[0])
            if following is None:
                outcome.refuse(anchor, rule, f"{node.op_type} {node.name} is also used elsewhere")
                return
            term = polynomial(other_operand(following, node.outputs[0]), x)
            reversed_division = is_op(following, "Div") and following.inputs[0] is not node.outputs[0]
            power, number = next(iter(term.items())) if term is not None and len(term) == 1 else (-1, 0.0)
            if is_op(following, "Add") and power == degree:
                offset += number
            elif is_op(following, "Div") and power == 0 and number and not reversed_division:
                offset, slope = offset / number, slope / number
            elif is_op(following, "Mul") and power in (0, 1 - degree):
                degree, offset, slope = degree + power, offset * number, slope * number
            else:
                outcome.refuse(anchor, rule, f"{following.op_type} {following.name} is no part of Gelu")
                return
            node = following
            gone.append(node)
        if grows_rank(x, node.outputs[0]):
            outcome.refuse(anchor, rule, MORE_AXES)
            return
        if opset(model) >= 20:
            self._write("Gelu", x, node, gone, names, {"approximate": "tanh"} if kind == "tanh" else {}, "")
        else:
            require_domain(model, MICROSOFT)
            self._write("Gelu" if kind == "erf" else "FastGelu", x, node, gone, names, {}, MICROSOFT)
        outcome.counts[f"Gelu({kind})"] += 1

    def _sigmoid(self, anchor: ir.Node, model: ir.Model, names: Names, outcome: Outcome, context: PassContext) -> None:
        rule = "x sigmoid(a x) -> QuickGelu"
        gate = anchor.outputs[0]
        for product in [use.node for use in gate.uses() if is_op(use.node, "Mul")]:
            x = other_operand(product, gate)
            slope = polynomial(anchor.inputs[0], x) if x is not None else None
            if x is None or slope is None or set(slope) != {1}:
                continue  # a gate over another tensor, as in GLU: no activation
            if next_node(gate) is not product:
                outcome.refuse(anchor, rule, f"the sigmoid {gate.name} is also used elsewhere")
            elif grows_rank(x, product.outputs[0]):
                outcome.refuse(anchor, rule, MORE_AXES)
            elif context.costs.faster("QuickGelu", "Sigmoid+Mul") is False:
                outcome.refuse(anchor, rule, "Sigmoid and Mul are measured faster here")
            else:
                require_domain(model, MICROSOFT)
                self._write("QuickGelu", x, product, [anchor, product], names, {"alpha": slope[1]}, MICROSOFT)
                outcome.counts["SiLU" if math.isclose(slope[1], 1.0) else "QuickGelu"] += 1
            return

    def _write(
        self,
        op: str,
        x: ir.Value,
        last: ir.Node,
        gone: list[ir.Node],
        names: Names,
        attributes: dict[str, Any],
        domain: str,
    ) -> None:
        result = last.outputs[0]
        base = names.fresh(f"{gone[0].name}/{op}")
        output = names.fresh(f"{result.name}_gelu")
        node = make_node(op, [x], name=base, output=output, like=result, attributes=attributes, domain=domain)
        replace(last, [node], by=self.name, gone=[item for item in gone if item is not last])


def _is_gelu(node: ir.Node) -> bool:
    return is_op(node, "Gelu") or is_op(node, "Gelu", "FastGelu", "BiasGelu", "QuickGelu", domain=MICROSOFT)


def _argument_of(value: ir.Value | None, expected: Polynomial) -> ir.Value | None:
    """The tensor x of which ``value`` is the polynomial ``expected``: searched upwards through arithmetic."""
    todo = [value]
    for _ in range(_MAX_STEPS):
        if not todo:
            break
        current = todo.pop(0)
        if current is None or scalar(current) is not None:
            continue
        precision = _PRECISION.get(current.dtype, _FLOAT_PRECISION)
        if current is not value and is_polynomial(value, current, expected, precision):
            return current
        node = producer(current, "Add", "Mul", "Div", "Pow", "Sub")
        todo += node.inputs if node is not None else []
    return None
