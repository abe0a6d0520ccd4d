"""Quantized products with their bias as one operator, from the QDQ form of any quantizer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ...compiler.base import Claim, Outcome, Pass, PassContext
from ...compiler.graph import (
    MICROSOFT,
    Names,
    all_nodes,
    attribute,
    constant,
    dims,
    is_fixed,
    is_op,
    make_node,
    only_consumer,
    producer,
    rank,
    remove_dead,
    replace,
    require_domain,
)
from ..matching import as_vector, next_node, other_operand

_RULE = "MatMul(DQ(x), DQ(W)) + b -> MatMulIntegerToFloat"
_BYTES = (ir.DataType.UINT8, ir.DataType.INT8)
_BIAS = 1 << 20  # elements; no bias is larger


@dataclasses.dataclass(frozen=True)
class FuseIntegerProduct(Pass):
    """Writes quantized products as ``com.microsoft.MatMulIntegerToFloat``, which takes the bias too.

    1. ``MatMul(DQ(x), DQ(W)) + b -> MatMulIntegerToFloat(x, W, scales, zero points, b)``; also without b.

    ONNX Runtime does this when it loads a QDQ model, but without the bias: the same integer kernel runs, and an Add
    over the whole result is saved. Works on the QDQ form of any tool. x has one scale, W is a constant matrix with one
    scale or one for each column, both have 8 bits, b is a constant with one number for each column.

    One product changes by float rounding only (1e-6); but a value on the border of two codes of a QuantizeLinear
    further down may fall to the other side, as it may when ONNX Runtime fuses, so this does not claim to be exact.

    Refused: products whose result is quantized right away, where ONNX Runtime's QLinearMatMul does not leave the
    integers; scales in blocks, or by row; weights with other dimensions than two.

    Pays on the CPU provider; the CUDA provider has no kernel for it (nothing is done there).
    """

    name: ClassVar[str] = "fuse-integer-product"
    claims: ClassVar[Claim] = Claim.APPROXIMATE

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        if context.device != "cpu":
            outcome.notes.append("nothing done: the CUDA provider has no kernel for MatMulIntegerToFloat")
            return outcome
        names = Names(model)
        for node in all_nodes(model):
            if is_op(node, "MatMul"):
                self._fuse(node, names, outcome)
        if outcome.changed:
            require_domain(model, MICROSOFT)
            remove_dead(model)
        return outcome

    def _fuse(self, node: ir.Node, names: Names, outcome: Outcome) -> None:
        left, right = (producer(value, "DequantizeLinear") for value in node.inputs)
        graph = node.graph
        if left is None or right is None or not isinstance(graph, ir.Graph):
            return
        if not is_fixed(right.inputs[0]):
            return  # a product of two activations: ONNX Runtime fuses it, and there is no bias
        problem = _problem(left, right, node)
        if problem:
            outcome.refuse(node, _RULE, problem)
            return
        add = next_node(node.outputs[0])
        bias = _bias(add, node) if add is not None and is_op(add, "Add") else None
        last = add if bias is not None and add is not None else node
        reader = only_consumer(last.outputs[0])
        if bias is None and is_op(reader, "QuantizeLinear"):
            outcome.refuse(node, _RULE, "its result is quantized right away, which QLinearMatMul does by itself")
            return
        parts = [(source.inputs[0], *source.inputs[1:], None, None)[:3] for source in (left, right)]
        inputs = [part[index] for index in range(3) for part in parts]
        if bias is not None:
            inputs.append(as_vector(bias, graph, names))
        while inputs[-1] is None:
            inputs.pop()
        result = last.outputs[0]
        new = make_node(
            "MatMulIntegerToFloat", inputs, name=names.fresh(f"{node.name}/integer"),
            output=names.fresh(f"{result.name}_product"), like=result, domain=MICROSOFT,
        )  # fmt: skip
        replace(last, [new], by=self.name, gone=[node] if last is not node else [])
        outcome.counts["product on integers" + (" with its bias" if bias is not None else "")] += 1


def _problem(left: ir.Node, right: ir.Node, node: ir.Node) -> str:
    """Why the kernel does not take this pair; empty if it does."""
    x, weight = left.inputs[0], right.inputs[0]
    if any(value is None or value.dtype not in _BYTES for value in (x, weight)):
        return "its operands do not have 8 bits"
    if node.outputs[0].dtype != ir.DataType.FLOAT:
        return "its result is not float32"
    if rank(weight) != 2:
        return "its weight is no matrix"
    if rank(left.inputs[1]) != 0:
        return "its activation has more than one scale"
    if attribute(right, "block_size", 0):
        return "its weight has scales in blocks"
    if rank(right.inputs[1]) == 1 and attribute(right, "axis", 1) not in (1, -1):
        return "its weight has a scale for each row: the kernel knows columns"
    return "" if rank(right.inputs[1]) in (0, 1) else "the scales of its weight have no known rank"


def _bias(add: ir.Node, product: ir.Node) -> ir.Value | None:
    """The constant with one number per column that ``add`` adds to ``product``."""
    bias = other_operand(add, product.outputs[0])
    width = (dims(product.inputs[1]) or [None])[-1]
    array = constant(bias, limit=_BIAS)
    if bias is None or array is None or array.ndim == 0 or array.size != width or array.shape[-1] != width:
        return None
    return bias if rank(add.outputs[0]) == rank(product.outputs[0]) else None
