"""Linear projections ``x W + b`` with constant weights, as several passes look at them."""

from __future__ import annotations

import onnx_ir as ir

from ..compiler.graph import Array, constant, only_consumer, producer


def biased_product(value: ir.Value) -> tuple[ir.Value, Array] | None:
    """For ``MatMul(x, W) + b`` with a constant vector b that only the attention reads: the product and b."""
    node = producer(value, "Add")
    if node is None or len({use.node for use in value.uses()}) != 1 or value.is_graph_output():
        return None
    for left, right in (node.inputs, node.inputs[::-1]):
        product = producer(left, "MatMul")
        bias = constant(right, limit=1 << 16)
        if product is None or left is None or bias is None or bias.ndim != 1 or only_consumer(left) is not node:
            continue
        weight = product.inputs[1]
        if weight is not None and weight.shape is not None and weight.shape[-1] == bias.size:
            return left, bias
    return None
