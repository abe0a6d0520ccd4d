"""Three projections of one tensor as one matrix product."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..compiler.base import Gate, Outcome, Pass, PassContext
from ..compiler.graph import (
    FROM_KEY,
    MICROSOFT,
    PASS_KEY,
    Array,
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
from .projections import biased_product

_RULE = "three projections of one input -> MatMul + Split"


class _Refused(Exception):
    """Ends one match; the message is the reason, empty where there is nothing to report."""


@dataclasses.dataclass(frozen=True)
class _Projection:
    """``value = product (+ bias)``, ``product = x weight``."""

    value: ir.Value
    product: ir.Node
    bias: Array | None


@dataclasses.dataclass(frozen=True)
class FuseQKV(Pass):
    """Merges the Q, K and V projections in front of a fused attention (``Attention`` or ``MultiHeadAttention``).

    ``x Wq + bq, x Wk + bk, x Wv + bv -> Split(x [Wq | Wk | Wv] + [bq | bk | bv])``, where

    1. all three are MatMul of the same input with constant 2-D weights that nothing else uses,
    2. all three or none add a constant bias, and
    3. only the attention reads the results.

    One large product uses the cores better for few rows (short inputs, one token), but Split copies: for many rows it
    costs more than it gains on the CPU provider, so the speed gate decides.
    """

    name: ClassVar[str] = "fuse-qkv"
    gate: ClassVar[Gate] = "faster"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        anchors = [node for graph in model.graphs() for node in graph if _is_attention(node)]
        names = Names(model)
        for attention in anchors:
            try:
                _merge(_projections(attention), names, opset(model), self.name)
                outcome.counts["QKV merged"] += 1
            except _Refused as refusal:
                if str(refusal):
                    outcome.refuse(attention, _RULE, str(refusal))
        if outcome.changed:
            remove_dead(model)
        return outcome


def _is_attention(node: ir.Node) -> bool:
    return is_op(node, "Attention") or is_op(node, "MultiHeadAttention", domain=MICROSOFT)


def _projections(attention: ir.Node) -> list[_Projection]:
    found: list[_Projection] = []
    for value in attention.inputs[:3]:
        node = producer(value, "MatMul", "Add")
        if node is None or value is None:
            raise _Refused("")
        biased = biased_product(value) if is_op(node, "Add") else None
        product = producer(biased[0], "MatMul") if biased is not None else node if is_op(node, "MatMul") else None
        if product is None:
            raise _Refused("")
        found.append(_Projection(value, product, biased[1] if biased is not None else None))
    if len({item.product for item in found}) != 3:
        raise _Refused("")
    if len({item.product.inputs[0] for item in found}) != 1:
        raise _Refused("Q, K and V are projected from different inputs (cross attention)")
    if len({item.bias is None for item in found}) != 1:
        raise _Refused("only some of the three projections have a bias")
    for item in found:
        weight = item.product.inputs[1]
        if weight is None or weight.shape is None or len(weight.shape) != 2 or not weight.is_initializer():
            raise _Refused(f"the weight of {item.product.name} is not a constant matrix")
        if len(weight.uses()) != 1:
            raise _Refused(f"the weight of {item.product.name} is also used elsewhere: merging would store it twice")
        if only_consumer(item.value) is None:
            raise _Refused(f"the result of {item.product.name} is also used elsewhere")
    return found


def _merge(projections: list[_Projection], names: Names, version: int, by: str) -> None:
    first = projections[0].product
    graph, source = first.graph, first.inputs[0]
    weights = [array for item in projections if (array := constant(item.product.inputs[1])) is not None]
    if not isinstance(graph, ir.Graph) or len(weights) != 3:
        raise _Refused("the weights are not constants of this graph")
    widths = [array.shape[1] for array in weights]
    base = names.fresh(f"{first.name}/qkv")
    weight = add_initializer(graph, names, f"{base}.weight", np.concatenate(weights, axis=1))
    shape = dims(first.outputs[0])
    merged_shape = [*shape[:-1], sum(widths)] if shape is not None else None
    dtype = first.outputs[0].dtype
    output = names.fresh(f"{base}_out")
    nodes = [make_node("MatMul", [source, weight], name=base, output=output, dtype=dtype, shape=merged_shape)]
    biases = [item.bias for item in projections if item.bias is not None]
    if biases:
        bias = add_initializer(graph, names, f"{base}.bias", np.concatenate(biases))
        operands = [nodes[-1].outputs[0], bias]
        add = names.fresh(f"{base}/bias_add")
        nodes.append(make_node("Add", operands, name=add, output=f"{add}_out", dtype=dtype, shape=merged_shape))
    sizes = [add_initializer(graph, names, f"{base}.widths", np.array(widths, np.int64))] if version >= 13 else []
    parts = [
        ir.Value(name=names.fresh(f"{item.value.name}_part"), shape=item.value.shape, type=item.value.type)
        for item in projections
    ]
    attributes = {"axis": -1} if sizes else {"axis": -1, "split": widths}
    operands = [nodes[-1].outputs[0], *sizes]
    nodes.append(ir.node("Split", operands, attributes=attributes, outputs=parts, name=names.fresh(f"{base}/split")))
    for node in nodes:
        node.metadata_props[PASS_KEY] = by
        node.metadata_props[FROM_KEY] = ", ".join(f"MatMul:{item.product.name}" for item in projections)
    maker = producer(source)
    if maker is not None and maker.graph is graph:
        graph.insert_after(maker, nodes)
    else:  # a graph input, or a value of an enclosing graph: available from the start
        graph.insert_before(graph[0], nodes)
    for item, part in zip(projections, parts, strict=True):
        item.value.replace_all_uses_with(part)
