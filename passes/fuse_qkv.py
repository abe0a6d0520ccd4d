"""Three projections of one tensor as one matrix product."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..compiler.base import Outcome, Pass, PassContext
from ..compiler.graph import (
    FROM_KEY,
    MICROSOFT,
    PASS_KEY,
    Names,
    add_initializer,
    constant,
    dims,
    is_op,
    make_node,
    only_consumer,
    opset,
    producer,
    remove_dead,
)

_RULE = "three MatMul of one input -> MatMul + Split"


@dataclasses.dataclass(frozen=True)
class FuseQKV(Pass):
    """Merges the Q, K and V projections in front of ``com.microsoft.MultiHeadAttention``.

    ``x Wq, x Wk, x Wv -> Split(x [Wq | Wk | Wv])``, where

    1. all three are MatMul of the same input with constant 2-D weights that nothing else uses, and
    2. only the attention reads the products.

    One large product uses the cores better for few rows (one token, short inputs), but Split copies: for many rows it
    costs more than it gains on the CPU provider, so the speed gate decides.
    """

    name: ClassVar[str] = "fuse-qkv"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        anchors = [
            node for graph in model.graphs() for node in graph if is_op(node, "MultiHeadAttention", domain=MICROSOFT)
        ]
        names = Names(model) if anchors else None
        for attention in anchors:
            products = [producer(value, "MatMul") for value in attention.inputs[:3]]
            found = [node for node in products if node is not None]
            reason = _obstacle(found)
            if reason:
                outcome.refuse(attention, _RULE, reason)
            elif names is not None and reason is None:
                _merge(found, names, opset(model), self.name)
                outcome.counts["QKV merged"] += 1
        if outcome.changed:
            remove_dead(model)
        return outcome


def _obstacle(products: list[ir.Node]) -> str | None:
    """Why the products cannot be merged; empty where there is nothing to report, None where they can."""
    if len(products) != 3 or len(set(products)) != 3:
        return ""
    if len({node.inputs[0] for node in products}) != 1:
        return "Q, K and V are projected from different inputs (cross attention)"
    for node in products:
        weight = node.inputs[1]
        if weight is None or weight.shape is None or len(weight.shape) != 2 or not weight.is_initializer():
            return f"the weight of {node.name} is not a constant matrix"
        if len(weight.uses()) != 1:
            return f"the weight of {node.name} is also used elsewhere: merging would store it twice"
        if only_consumer(node.outputs[0]) is None:
            return f"the result of {node.name} is also used elsewhere"
    return None


def _merge(products: list[ir.Node], names: Names, version: int, by: str) -> None:
    first = products[0]
    graph, source = first.graph, first.inputs[0]
    arrays = [constant(node.inputs[1]) for node in products]
    known = [array for array in arrays if array is not None]
    if not isinstance(graph, ir.Graph) or len(known) != 3:
        raise ValueError("checked by _obstacle")
    widths = [array.shape[1] for array in known]
    base = names.fresh(f"{first.name}/qkv")
    weight = add_initializer(graph, names, f"{base}.weight", np.concatenate(known, axis=1))
    product = products[0].outputs[0]
    shape = dims(product)
    merged = make_node(
        "MatMul",
        [source, weight],
        name=base,
        output=names.fresh(f"{base}_out"),
        dtype=product.dtype,
        shape=[*shape[:-1], sum(widths)] if shape is not None else None,
    )
    sizes = [add_initializer(graph, names, f"{base}.widths", np.array(widths, np.int64))] if version >= 13 else []
    outputs = [
        ir.Value(name=names.fresh(f"{node.name}_part"), shape=value.shape, type=value.type)
        for node in products
        for value in node.outputs
    ]
    split = ir.node(
        "Split",
        [merged.outputs[0], *sizes],
        attributes={"axis": -1} if sizes else {"axis": -1, "split": widths},
        outputs=outputs,
        name=names.fresh(f"{base}/split"),
    )
    maker = producer(source)
    if maker is not None and maker.graph is graph:
        graph.insert_after(maker, [merged, split])
    else:  # a graph input, or a value of an enclosing graph: available from the start
        graph.insert_before(graph[0], [merged, split])
    for node, value in zip(products, outputs, strict=True):
        node.outputs[0].replace_all_uses_with(value)
    for node in (merged, split):
        node.metadata_props[PASS_KEY] = by
        node.metadata_props[FROM_KEY] = ", ".join(f"MatMul:{node.name}" for node in products)
