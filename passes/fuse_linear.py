"""Linear layers: constant scales and biases folded into the weights, 2-D MatMul + Add to Gemm."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..compiler.base import Outcome, Pass, PassContext
from ..compiler.graph import (
    Array,
    Names,
    add_initializer,
    all_nodes,
    constant,
    is_op,
    make_node,
    only_consumer,
    producer,
    rank,
    remove_dead,
    replace,
    scalar,
)


@dataclasses.dataclass(frozen=True)
class FuseLinear(Pass):
    """Simplifies linear layers with constant weights.

    1. ``(x W) * c``, ``(x * c) W``, ``(x W) / c`` -> ``x (c W)`` for a number c, where nothing else reads W or the
       intermediate: a new weight of the same size replaces W.
    2. ``(y + b1) + b2`` with constant vectors or numbers -> ``y + (b1 + b2)``.
    3. ``x W + b`` with 2-D x and a constant vector b -> ``Gemm(x, W, b)``, where ONNX Runtime adds the bias inside the
       product. For 3-D x its Gemm would need reshapes; MatMul + Add stays.

    Weights read from external files are only loaded where rule 1 applies. Refused: a weight or an intermediate with
    other readers.

    Pays on CPU and CUDA by a node and a pass over memory less.
    """

    name: ClassVar[str] = "fuse-linear"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        names = Names(model)
        for node in all_nodes(model):
            if is_op(node, "Mul", "Div"):
                self._scale_after(node, names, outcome)
            elif is_op(node, "MatMul"):
                self._scale_before(node, names, outcome)
        for node in all_nodes(model):
            if is_op(node, "Add"):
                self._two_biases(node, names, outcome)
        remove_dead(model)  # what was merged no longer counts as a reader
        for node in all_nodes(model):
            if is_op(node, "Add"):
                self._gemm(node, names, outcome, context)
        if outcome.changed:
            remove_dead(model)
        return outcome

    def _scale_after(self, node: ir.Node, names: Names, outcome: Outcome) -> None:
        """Rule 1, the number behind the product."""
        sides = [node.inputs, node.inputs[::-1]] if is_op(node, "Mul") else [node.inputs]
        for value, other in sides:
            number, product = scalar(other), producer(value, "MatMul")
            if number is None or product is None or value is None or (rank(other) or 0) > (rank(value) or 0):
                continue
            if _constant_weight(product) is None or (is_op(node, "Div") and number == 0.0):
                return
            if only_consumer(value) is not node:
                outcome.refuse(node, "(x W) * c -> x (c W)", f"the product {value.name} is also used elsewhere")
                return
            factor = 1.0 / number if is_op(node, "Div") else number
            weight = self._scaled_weight(product, factor, names, outcome)
            if weight is None:
                return
            base = names.fresh(f"{product.name}/scaled")
            result = node.outputs[0]
            output = names.fresh(f"{result.name}_scaled")
            new = make_node("MatMul", [product.inputs[0], weight], name=base, output=output, like=result)
            replace(node, [new], by=self.name, gone=[product])
            outcome.counts["scale folded into weight"] += 1
            return

    def _scale_before(self, node: ir.Node, names: Names, outcome: Outcome) -> None:
        """Rule 1, the number in front of the product."""
        scaled = producer(node.inputs[0], "Mul", "Div")
        if scaled is None or _constant_weight(node) is None:
            return
        sides = [scaled.inputs, scaled.inputs[::-1]] if is_op(scaled, "Mul") else [scaled.inputs]
        for value, other in sides:
            number = scalar(other)
            if number is None or number == 0.0 or value is None or (rank(other) or 0) > (rank(value) or 0):
                continue
            if only_consumer(scaled.outputs[0]) is not node:
                outcome.refuse(node, "(x * c) W -> x (c W)", f"{scaled.outputs[0].name} is also used elsewhere")
                return
            factor = 1.0 / number if is_op(scaled, "Div") else number
            weight = self._scaled_weight(node, factor, names, outcome)
            if weight is not None:
                node.replace_input_with(1, weight)
                node.replace_input_with(0, value)
                outcome.counts["scale folded into weight"] += 1
            return

    def _scaled_weight(self, product: ir.Node, factor: float, names: Names, outcome: Outcome) -> ir.Value | None:
        weight = product.inputs[1]
        if weight is None or not isinstance(product.graph, ir.Graph):
            return None
        if len(weight.uses()) != 1 or weight.graph is not product.graph:
            outcome.refuse(product, "(x W) * c -> x (c W)", f"the weight {weight.name} is also used elsewhere")
            return None
        array = constant(weight)
        if array is None:
            return None
        return add_initializer(product.graph, names, f"{weight.name}_scaled", (array * factor).astype(array.dtype))

    def _two_biases(self, node: ir.Node, names: Names, outcome: Outcome) -> None:
        """Rule 2."""
        outer = _biased(node)
        inner_node = producer(outer[0], "Add") if outer is not None else None
        inner = _biased(inner_node) if inner_node is not None else None
        if (
            outer is None
            or inner is None
            or only_consumer(outer[0]) is not node
            or not isinstance(node.graph, ir.Graph)
        ):
            return
        if outer[1].dtype != inner[1].dtype or max(outer[1].ndim, inner[1].ndim) > (rank(inner[0]) or 0):
            return
        try:
            total = outer[1] + inner[1]
        except ValueError:  # the vectors do not broadcast with each other
            return
        if total.size > max(outer[1].size, inner[1].size):
            return
        bias = add_initializer(node.graph, names, f"{node.name}_bias", total)
        node.replace_input_with(0, inner[0])
        node.replace_input_with(1, bias)
        outcome.counts["biases merged"] += 1

    def _gemm(self, node: ir.Node, names: Names, outcome: Outcome, context: PassContext) -> None:
        """Rule 3."""
        found = _biased(node)
        product = producer(found[0], "MatMul") if found is not None else None
        if found is None or product is None or rank(product.inputs[0]) != 2 or rank(product.inputs[1]) != 2:
            return
        rule = "x W + b -> Gemm"
        if only_consumer(found[0]) is not node:
            outcome.refuse(node, rule, f"the product {found[0].name} is also used elsewhere")
            return
        result, bias = node.outputs[0], node.inputs[1] if node.inputs[0] is found[0] else node.inputs[0]
        base = names.fresh(f"{product.name}/Gemm")
        output = names.fresh(f"{result.name}_gemm")
        new = make_node("Gemm", [*product.inputs, bias], name=base, output=output, like=result)
        replace(node, [new], by=self.name, gone=[product])
        outcome.counts["Gemm"] += 1


def _constant_weight(product: ir.Node) -> ir.Value | None:
    weight = product.inputs[1]
    good = weight is not None and weight.is_initializer() and not weight.is_graph_input() and rank(weight) == 2
    return weight if good else None


def _biased(node: ir.Node) -> tuple[ir.Value, Array] | None:
    """For ``Add(y, b)`` with a constant number or vector b: y and b."""
    for value, other in (node.inputs, node.inputs[::-1]):
        array = constant(other, limit=1 << 20)
        if value is not None and array is not None and array.dtype.kind == "f" and array.ndim <= 1:
            return value, np.asarray(array)
    return None
