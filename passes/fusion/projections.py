"""Linear projections ``x W + b`` with constant weights, as several passes look at them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.graph import Array, Names, constant, only_consumer, producer


def join_columns(
    graph: ir.Graph, names: Names, base: str, parts: Sequence[tuple[ir.Value | None, Array | None]]
) -> ir.Value:
    """The columns of several constant [rows, columns] weights side by side, as one initializer of ``graph``.

    Joined when something reads them, so that a compile does not hold a second copy of a model's weights.

    Args:
        graph: receives the initializer.
        names: source of fresh names.
        base: its name.
        parts: each weight with the columns to take of it, None for all.
    """
    tensors = [(value.const_value, columns) for value, columns in parts if value is not None]
    sources = [(tensor, columns) for tensor, columns in tensors if tensor is not None]
    name = names.fresh(base)

    def join() -> ir.TensorProtocol:
        arrays = [tensor.numpy() for tensor, _ in sources]
        taken = [a if c is None else a[:, c] for a, (_, c) in zip(arrays, sources, strict=True)]
        return ir.Tensor(np.concatenate(taken, axis=1), name=name)

    sizes = [tensor.shape.numpy() for tensor, _ in sources]
    width = sum(size[1] if columns is None else columns.size for size, (_, columns) in zip(sizes, sources, strict=True))
    shape, dtype = ir.Shape([sizes[0][0], width]), sources[0][0].dtype
    joined = ir.LazyTensor(join, dtype=dtype, shape=shape, name=name)
    value = ir.Value(name=name, shape=shape.copy(), type=ir.TensorType(dtype), const_value=joined)
    graph.register_initializer(value)
    return value


def biased_product(value: ir.Value, *, shared: bool = False) -> tuple[ir.Value, Array] | None:
    """For ``MatMul(x, W) + b`` with a constant vector b: the product and b.

    Only one node reads it; several may where ``shared``.
    """
    node = producer(value, "Add")
    if node is None or (len({use.node for use in value.uses()}) != 1 and not shared) or value.is_graph_output():
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
