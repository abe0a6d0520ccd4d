"""Linear layers: constant scales and biases folded into the weights, 2-D MatMul + Add to Gemm."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ...compiler.base import Outcome, Pass, PassContext
from ...compiler.graph import (
    FROM_KEY,
    PASS_KEY,
    Array,
    Names,
    add_initializer,
    all_nodes,
    attribute,
    constant,
    dims,
    is_op,
    make_node,
    producer,
    rank,
    remove_dead,
    replace,
)
from ..matching import next_node, operands, other_operand, until_nothing_fires

_SCALE = "(x W + b) * c -> x (c W) + c b"
_SMALLEST, _LARGEST = 1e-12, 1e12


@dataclasses.dataclass(frozen=True)
class FuseLinear(Pass):
    """Simplifies linear layers with constant weights.

    1. ``(x W + b) * c``, ``(x W + b) / c`` -> ``x (c W) + c b``, and ``(x * c) W`` -> ``x (c W)``, for a number c.
       Behind the product c may also be one number per column (layer scale). A new weight of the same size replaces W.
       A number behind a Gemm goes into its ``alpha`` and ``beta``.
    2. ``(y + b1) + b2`` with constant vectors or numbers -> ``y + (b1 + b2)``.
    3. ``x W + b`` with 2-D x and a constant vector b -> ``Gemm(x, W, b)``, where ONNX Runtime adds the bias inside the
       product. For 3-D x its Gemm would need reshapes; MatMul + Add stays.

    Weights read from external files are only loaded where rule 1 applies. Transposed constant weights are left to
    ``fold-constants``. Refused: a weight or an intermediate with other readers, half-precision weights (they would be
    rounded a second time), Gemm of what DequantizeLinear makes (only MatMul has integer kernels for that).

    Pays on CPU and CUDA by a node and a pass over memory less.
    """

    name: ClassVar[str] = "fuse-linear"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        names = Names(model)
        # Biases that were merged leave a factor with one to fold it into.
        until_nothing_fires(outcome, lambda: self._round(model, names, outcome))
        return outcome

    def _round(self, model: ir.Model, names: Names, outcome: Outcome) -> None:
        for node in all_nodes(model):
            if is_op(node, "Mul", "Div"):
                self._scale_after(node, names, outcome)
            elif is_op(node, "MatMul"):
                self._scale_before(node, names, outcome)
        for node in all_nodes(model):
            if is_op(node, "Add"):
                self._two_biases(node, names, outcome)
        if outcome.changed:
            remove_dead(model)  # what was merged no longer counts as a reader
        for node in all_nodes(model):
            if is_op(node, "Add"):
                self._gemm(node, names, outcome)
        if outcome.changed:
            remove_dead(model)

    def _scale_after(self, node: ir.Node, names: Names, outcome: Outcome) -> None:
        """Rule 1, the factor behind the product."""
        for value, other in operands(node):
            add = producer(value, "Add")
            biased = _biased(add) if add is not None else None
            product = producer(biased[0] if biased else value, "MatMul", "Gemm")
            factor = _factor(other, value, product) if product is not None else None
            if product is None or factor is None or (is_op(product, "Gemm") and factor.size > 1):
                continue
            if is_op(product, "MatMul") and _constant_weight(product) is None:
                return
            chain = [product, node] if biased is None or add is None else [product, add, node]
            for before, after in itertools.pairwise(chain):
                if next_node(before.outputs[0]) is not after:
                    outcome.refuse(node, _SCALE, f"{before.op_type} {before.name} is also used elsewhere")
                    return
            scaled = self._scaled_product(product, factor, is_op(node, "Div"), names, outcome)
            if scaled is None:
                return
            new, graph = [scaled], product.graph
            if biased is not None and isinstance(graph, ir.Graph):
                bias = add_initializer(graph, names, f"{node.name}_bias", _times(biased[1], factor, is_op(node, "Div")))
                name, output = names.fresh(f"{node.name}/bias"), names.fresh(f"{node.outputs[0].name}_biased")
                new.append(make_node("Add", [scaled.outputs[0], bias], name=name, output=output, like=node.outputs[0]))
            replace(node, new, by=self.name, gone=chain[:-1])
            outcome.counts["scale folded into " + ("Gemm" if is_op(product, "Gemm") else "weight")] += 1
            return

    def _scaled_product(
        self, product: ir.Node, factor: Array, divide: bool, names: Names, outcome: Outcome
    ) -> ir.Node | None:
        """A node like ``product`` whose result is ``factor`` times as large."""
        inputs = list(product.inputs)
        attributes: dict[str, Any] = {}
        if is_op(product, "Gemm"):
            if not _in_range(factor):
                outcome.refuse(product, _SCALE, "the factor would take the weight out of the range of its type")
                return None
            number = 1.0 / float(factor) if divide else float(factor)
            attributes = {key: attribute(product, key) for key in product.attributes}
            attributes |= {key: attribute(product, key, 1.0) * number for key in ("alpha", "beta")}
        else:
            inputs[1] = self._scaled_weight(product, factor, divide, names, outcome)
            if inputs[1] is None:
                return None
        name = names.fresh(f"{product.name}/scaled")
        value = product.outputs[0]
        output = names.fresh(f"{value.name}_scaled")
        return make_node(product.op_type, inputs, name=name, output=output, like=value, attributes=attributes)

    def _scale_before(self, node: ir.Node, names: Names, outcome: Outcome) -> None:
        """Rule 1, the number in front of the product."""
        scaled = producer(node.inputs[0], "Mul", "Div")
        if scaled is None or _constant_weight(node) is None:
            return
        for value, other in operands(scaled):
            factor = constant(other, limit=1)
            if factor is None or factor.size != 1 or (rank(other) or 0) > (rank(value) or 0):
                continue
            if next_node(scaled.outputs[0]) is not node:
                outcome.refuse(node, _SCALE, f"{scaled.outputs[0].name} is also used elsewhere")
                return
            weight = self._scaled_weight(node, factor.reshape(()), is_op(scaled, "Div"), names, outcome)
            if weight is not None:
                node.replace_input_with(1, weight)
                node.replace_input_with(0, value)
                self._mark(node, scaled)
                outcome.counts["scale folded into weight"] += 1
                if isinstance(scaled.graph, ir.Graph):
                    scaled.graph.remove(scaled, safe=True)  # another scale before it has one reader again
                self._scale_before(node, names, outcome)
            return

    def _scaled_weight(
        self, product: ir.Node, factor: Array, divide: bool, names: Names, outcome: Outcome
    ) -> ir.Value | None:
        weight = product.inputs[1]
        if weight is None or not isinstance(product.graph, ir.Graph):
            return None
        reason = ""
        if len(weight.uses()) != 1 or weight.graph is not product.graph:
            reason = f"the weight {weight.name} is also used elsewhere"
        elif weight.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            reason = f"the weight {weight.name} is {weight.dtype}: scaled, it would be rounded a second time"
        elif not _in_range(factor):
            reason = "the factor would take the weight out of the range of its type"
        array = constant(weight)
        if reason or array is None:
            outcome.refuse(product, _SCALE, reason)
            return None
        return add_initializer(product.graph, names, f"{weight.name}_scaled", _times(array, factor, divide))

    def _two_biases(self, node: ir.Node, names: Names, outcome: Outcome) -> None:
        """Rule 2."""
        outer = _biased(node)
        inner_node = producer(outer[0], "Add") if outer is not None else None
        inner = _biased(inner_node) if inner_node is not None else None
        if outer is None or inner is None or inner_node is None or not isinstance(node.graph, ir.Graph):
            return
        if next_node(outer[0]) is not node:
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
        self._mark(node, inner_node)
        outcome.counts["biases merged"] += 1

    def _mark(self, node: ir.Node, gone: ir.Node) -> None:
        """Says in a node that is kept where its new operands come from."""
        node.metadata_props[PASS_KEY] = self.name
        node.metadata_props[FROM_KEY] = f"{gone.op_type}:{gone.name}, {node.op_type}:{node.name}"

    def _gemm(self, node: ir.Node, names: Names, outcome: Outcome) -> None:
        """Rule 3."""
        found = _biased(node)
        product = producer(found[0], "MatMul") if found is not None else None
        if found is None or product is None or rank(product.inputs[0]) != 2 or rank(product.inputs[1]) != 2:
            return
        rule = "x W + b -> Gemm"
        if next_node(found[0]) is not node:
            outcome.refuse(node, rule, f"the product {found[0].name} is also used elsewhere")
            return
        if found[1].size not in (1, _columns(product)):
            outcome.refuse(node, rule, "the bias does not have one number per column of the product")
            return
        if any(producer(value, "DequantizeLinear") is not None for value in product.inputs):
            outcome.refuse(node, rule, "its operands are quantized: as MatMul it runs in integers, as Gemm it does not")
            return
        result, bias = node.outputs[0], other_operand(node, found[0])
        base = names.fresh(f"{product.name}/Gemm")
        output = names.fresh(f"{result.name}_gemm")
        new = make_node("Gemm", [*product.inputs, bias], name=base, output=output, like=result)
        replace(node, [new], by=self.name, gone=[product])
        outcome.counts["Gemm"] += 1


def _constant_weight(product: ir.Node) -> ir.Value | None:
    weight = product.inputs[1]
    good = weight is not None and weight.is_initializer() and not weight.is_graph_input() and rank(weight) == 2
    return weight if good else None


def _columns(product: ir.Node) -> int | None:
    """How many columns the result of a MatMul with a matrix, or of a Gemm, has."""
    shape = dims(product.inputs[1])
    if shape is None or len(shape) != 2:
        return None
    width = shape[0 if attribute(product, "transB", 0) else 1]
    return width if isinstance(width, int) else None


def _factor(other: ir.Value, value: ir.Value, product: ir.Node) -> Array | None:
    """``other`` as a number, or a vector with one number per column of ``product``."""
    columns = _columns(product)
    array = constant(other, limit=columns or 1)
    if array is None or array.ndim > (rank(value) or 0):
        return None
    if array.size == 1:
        return array.reshape(())
    return array.reshape(-1) if array.size == columns == array.shape[-1] else None


def _times(array: Array, factor: Array, divide: bool) -> Array:
    factor = factor.astype(array.dtype)
    return array / factor if divide else array * factor


def _in_range(factor: Array) -> bool:
    size = np.abs(factor.astype(np.float64))
    return bool(np.all((size >= _SMALLEST) & (size <= _LARGEST)))


def _biased(node: ir.Node) -> tuple[ir.Value, Array] | None:
    """For ``Add(y, b)`` with a constant number or vector b: y and b."""
    for value, other in operands(node):
        array = constant(other, limit=1 << 20)
        if array is not None and array.dtype.kind == "f" and array.ndim <= 1:
            return value, np.asarray(array)
    return None
