"""Linear projections ``x W + b`` with constant weights, as several passes look at them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.graph import (
    FROM_KEY,
    PASS_KEY,
    Array,
    Names,
    add_initializer,
    constant,
    only_consumer,
    producer,
    unmap,
)


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
        whole = np.concatenate(taken, axis=1)
        del arrays, taken
        for tensor, _ in sources:
            unmap(tensor)
        return ir.Tensor(whole, name=name)

    sizes = [tensor.shape.numpy() for tensor, _ in sources]
    width = sum(size[1] if columns is None else columns.size for size, (_, columns) in zip(sizes, sources, strict=True))
    shape, dtype = ir.Shape([sizes[0][0], width]), sources[0][0].dtype
    joined = ir.LazyTensor(join, dtype=dtype, shape=shape, name=name)
    value = ir.Value(name=name, shape=shape.copy(), type=ir.TensorType(dtype), const_value=joined)
    graph.register_initializer(value)
    return value


def split_columns(
    graph: ir.Graph,
    names: Names,
    base: str,
    joined: ir.Value,
    results: Sequence[ir.Value],
    widths: Sequence[int],
    version: int,
) -> ir.Node:
    """A Split of ``joined``, not yet in the graph, whose outputs are like ``results``, ``widths`` columns each.

    Args:
        graph: receives the sizes as an initializer, where the opset takes them as an input.
        names: source of fresh names.
        base: what names begin with.
        joined: [..., sum of widths].
        results: what the parts stand for.
        widths: columns of each part.
        version: opset.
    """
    sizes = [add_initializer(graph, names, f"{base}.widths", np.array(widths, np.int64))] if version >= 13 else []
    attributes = {"axis": -1} if sizes else {"axis": -1, "split": list(widths)}
    parts = [ir.Value(name=names.fresh(f"{value.name}_part"), shape=value.shape, type=value.type) for value in results]
    return ir.node("Split", [joined, *sizes], attributes=attributes, outputs=parts, name=names.fresh(f"{base}/split"))


def place_joined(nodes: Sequence[ir.Node], products: Sequence[ir.Node], by: str) -> None:
    """Puts ``nodes``, made of the matrix ``products`` of one input, right behind what makes that input."""
    graph, source = products[0].graph, products[0].inputs[0]
    if graph is None:
        raise ValueError(f"{products[0].name} is not in a graph")
    for node in nodes:
        node.metadata_props[PASS_KEY] = by
        node.metadata_props[FROM_KEY] = ", ".join(f"MatMul:{product.name}" for product in products)
    maker = producer(source)
    if maker is not None and maker.graph is graph:
        graph.insert_after(maker, nodes)
    else:  # a graph input, or a value of an enclosing graph: available from the start
        graph.insert_before(graph[0], nodes)


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
