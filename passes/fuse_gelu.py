"""Gelu and SiLU in all spellings, to one operator."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import onnx_ir as ir

from ..compiler.base import Outcome, Pass, PassContext
from ..compiler.graph import (
    MICROSOFT,
    Names,
    all_nodes,
    is_op,
    make_node,
    only_consumer,
    opset,
    producer,
    remove_dead,
    replace,
    require_domain,
    scalar,
)
from .polynomial import is_polynomial, polynomial

_ERF = {1: math.sqrt(0.5)}
_TANH = {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * 0.044715}


@dataclasses.dataclass(frozen=True)
class FuseGelu(Pass):
    """Recognizes the activations by what they compute, anchored at Erf, Tanh or Sigmoid.

    1. ``0.5 x (1 + erf(x / sqrt 2))`` -> Gelu; the factors in any order and grouping, constants up to 5e-5.
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
        """``(1 + anchor(...)) * x * 0.5``: collects the factors downstream until they are complete."""
        kind, expected = ("erf", _ERF) if is_op(anchor, "Erf") else ("tanh", _TANH)
        rule = f"0.5 x (1 + {kind}(...)) -> Gelu"
        one_plus = only_consumer(anchor.outputs[0])
        if one_plus is None or not is_op(one_plus, "Add") or 1.0 not in map(scalar, one_plus.inputs):
            return
        x = _root(anchor.inputs[0])
        if x is None or not is_polynomial(anchor.inputs[0], x, expected):
            outcome.refuse(anchor, rule, f"the argument of {kind} is not the one of Gelu")
            return
        coefficient, has_x, node, gone = 1.0, False, one_plus, [anchor, one_plus]
        while not (has_x and math.isclose(coefficient, 0.5, rel_tol=1e-5)):
            following = only_consumer(node.outputs[0])
            if following is None or not is_op(following, "Mul", "Div"):
                outcome.refuse(
                    anchor, rule, f"{node.op_type} {node.name} is also used elsewhere, or is no factor of Gelu"
                )
                return
            other = following.inputs[1] if following.inputs[0] is node.outputs[0] else following.inputs[0]
            factor = polynomial(other, x)
            if factor is None or len(factor) != 1 or (is_op(following, "Div") and other is not following.inputs[1]):
                outcome.refuse(anchor, rule, f"{following.op_type} {following.name} is no factor of Gelu")
                return
            degree, number = next(iter(factor.items()))
            if degree > 1 or (degree == 1 and (has_x or is_op(following, "Div"))):
                return
            has_x = has_x or degree == 1
            coefficient = coefficient / number if is_op(following, "Div") else coefficient * number
            node = following
            gone.append(node)
        if opset(model) >= 20:
            self._write("Gelu", x, node, gone, names, {"approximate": "tanh"} if kind == "tanh" else {}, "")
        else:
            require_domain(model, MICROSOFT)
            self._write("Gelu" if kind == "erf" else "FastGelu", x, node, gone, names, {}, MICROSOFT)
        outcome.counts[f"Gelu({kind})"] += 1

    def _sigmoid(self, anchor: ir.Node, model: ir.Model, names: Names, outcome: Outcome, context: PassContext) -> None:
        rule = "x sigmoid(a x) -> QuickGelu"
        product = only_consumer(anchor.outputs[0])
        if product is None or not is_op(product, "Mul"):
            return
        x = product.inputs[1] if product.inputs[0] is anchor.outputs[0] else product.inputs[0]
        slope = polynomial(anchor.inputs[0], x) if x is not None else None
        if x is None or slope is None or set(slope) != {1}:
            return  # a gate over another tensor, as in GLU: no activation
        if context.costs.faster("QuickGelu", "Sigmoid+Mul") is False:
            outcome.refuse(anchor, rule, "Sigmoid and Mul are measured faster here")
            return
        require_domain(model, MICROSOFT)
        self._write("QuickGelu", x, product, [anchor, product], names, {"alpha": slope[1]}, MICROSOFT)
        outcome.counts["SiLU" if math.isclose(slope[1], 1.0) else "QuickGelu"] += 1

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


def _root(value: ir.Value | None) -> ir.Value | None:
    """The tensor that the argument of Erf or Tanh is a function of: up through scalar arithmetic."""
    candidates: list[ir.Value] = []
    todo = [value]
    for _ in range(16):
        if not todo:
            break
        current = todo.pop()
        node = producer(current, "Add", "Mul", "Div", "Pow", "Sub")
        if current is None or scalar(current) is not None:
            continue
        candidates.append(current)
        todo += node.inputs if node is not None else []
    # The argument is a polynomial in x: the candidate closest to the inputs of which that is true.
    good = [item for item in candidates if item is not value and polynomial(value, item) is not None]
    return good[-1] if good else None
