"""Three projections of one tensor as one matrix product."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...compiler.base import Gate, Outcome, Pass, PassContext
from ...compiler.graph import (
    MICROSOFT,
    Array,
    Names,
    add_initializer,
    attribute,
    constant,
    dims,
    is_fixed,
    is_op,
    make_node,
    only_consumer,
    opset,
    producer,
    remove_dead,
)
from .projections import biased_product, join_columns, place_joined, split_columns

_RULE = "three projections of one input -> MatMul + Split"


class _Refused(Exception):
    """Ends one match; the message is the reason, empty where there is nothing to report."""


@dataclasses.dataclass(frozen=True)
class _Projection:
    """``value = (product + bias)[..., columns]``, ``product = x weight``."""

    value: ir.Value
    product: ir.Node
    bias: Array | None
    columns: Array | None
    read_elsewhere: bool

    def select(self, array: Array) -> Array:
        """The columns of a weight or bias that ``value`` is made of."""
        return array if self.columns is None else np.ascontiguousarray(array[..., self.columns])


@dataclasses.dataclass(frozen=True)
class FuseQKV(Pass):
    """Merges the Q, K and V projections in front of a fused attention.

    1. Attention, MultiHeadAttention: ``x Wq + bq, x Wk + bk, x Wv + bv -> Split(x [Wq | Wk | Wv] + [bq | bk | bv])``.
    2. GroupQueryAttention takes the product as it is: no Split. Parts gathered from one product in another order
       (GPT-NeoX has Q, K and V of each head together) become columns of the weight in the kernel's order.

    Where all three are MatMul of the same input with constant 2-D weights that nothing else uses, all three or none add
    a constant bias, and only the attention reads the results.

    One large product uses the cores better for few rows (short inputs, one token), but Split copies: for many rows it
    costs more than it gains on the CPU provider, so the speed gate decides.
    """

    name: ClassVar[str] = "fuse-qkv"
    gate: ClassVar[Gate] = "faster"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        names = Names(model)
        for attention in self.anchors(model):
            try:
                _merge(attention, _projections(attention), names, opset(model), self.name)
                outcome.counts["QKV merged"] += 1
            except _Refused as refusal:
                if str(refusal):
                    outcome.refuse(attention, _RULE, str(refusal))
        if outcome.changed:
            remove_dead(model)
        return outcome

    def anchors(self, model: ir.Model) -> list[ir.Node]:
        """The attentions whose projections are merged."""
        contrib = ("MultiHeadAttention", "GroupQueryAttention")
        nodes = [node for graph in model.graphs() for node in graph]
        return [node for node in nodes if is_op(node, "Attention") or is_op(node, *contrib, domain=MICROSOFT)]


def _projections(attention: ir.Node) -> list[_Projection]:
    found = [_projection(value) for value in attention.inputs[:3]]
    packs = is_op(attention, "GroupQueryAttention", domain=MICROSOFT)
    if len({item.product for item in found}) != 3 and not packs:
        raise _Refused("")
    if len({item.product.inputs[0] for item in found}) != 1:
        raise _Refused("Q, K and V are projected from different inputs (cross attention)")
    if len({item.bias is None for item in found}) != 1:
        raise _Refused("only some of the three projections have a bias")
    for item in found:
        weight = item.product.inputs[1]
        if weight is None or weight.shape is None or len(weight.shape) != 2 or not is_fixed(weight):
            raise _Refused(f"the weight of {item.product.name} is not a constant matrix")
        if len(weight.uses()) != 1:
            raise _Refused(f"the weight of {item.product.name} is also used elsewhere: merging would store it twice")
        if only_consumer(item.value) is None or item.read_elsewhere:
            raise _Refused(f"the result of {item.product.name} is also used elsewhere")
    return found


def _projection(value: ir.Value | None) -> _Projection:
    node = producer(value, "MatMul", "Add", "Gather")
    if node is None or value is None:
        raise _Refused("")
    columns: Array | None = None
    source = value
    if is_op(node, "Gather"):
        columns = constant(node.inputs[1])
        last_axis = attribute(node, "axis", 0) == -1
        node = producer(node.inputs[0], "MatMul", "Add")
        if node is None or columns is None or columns.ndim != 1 or not last_axis:
            raise _Refused("")
        source = node.outputs[0]
    biased = biased_product(source, shared=columns is not None) if is_op(node, "Add") else None
    product = producer(biased[0], "MatMul") if biased is not None else node if is_op(node, "MatMul") else None
    if product is None:
        raise _Refused("")
    bias = biased[1] if biased is not None else None
    gathers = source is value or all(is_op(use.node, "Gather") for use in source.uses())
    return _Projection(value, product, bias, columns, not gathers or (source is not value and source.is_graph_output()))


def _merge(attention: ir.Node, projections: list[_Projection], names: Names, version: int, by: str) -> None:
    first = projections[0].product
    graph, source = first.graph, first.inputs[0]
    if not isinstance(graph, ir.Graph):
        raise _Refused("it lies in a model-local function; inline functions first")
    products = [item.product for item in projections]
    widths = [_width(item) for item in projections]
    base = names.fresh(f"{first.name}/qkv")
    weights = [(item.product.inputs[1], item.columns) for item in projections]
    weight = join_columns(graph, names, f"{base}.weight", weights)
    shape = dims(first.outputs[0])
    merged_shape = [*shape[:-1], sum(widths)] if shape is not None else None
    dtype = first.outputs[0].dtype
    output = names.fresh(f"{base}_out")
    nodes = [make_node("MatMul", [source, weight], name=base, output=output, dtype=dtype, shape=merged_shape)]
    biases = [item.select(item.bias) for item in projections if item.bias is not None]
    if biases:
        bias = add_initializer(graph, names, f"{base}.bias", np.concatenate(biases))
        operands = [nodes[-1].outputs[0], bias]
        add = names.fresh(f"{base}/bias_add")
        nodes.append(make_node("Add", operands, name=add, output=f"{add}_out", dtype=dtype, shape=merged_shape))
    merged = nodes[-1].outputs[0]
    if is_op(attention, "GroupQueryAttention", domain=MICROSOFT):
        for index, value in enumerate((merged, None, None)):
            attention.replace_input_with(index, value)
        place_joined(nodes, products, by)
        return
    split = split_columns(graph, names, base, merged, [item.value for item in projections], widths, version)
    place_joined([*nodes, split], products, by)
    for item, part in zip(projections, split.outputs, strict=True):
        item.value.replace_all_uses_with(part)


def _width(item: _Projection) -> int:
    if item.columns is not None:
        return item.columns.size
    width = (dims(item.product.inputs[1]) or [None])[-1]
    if not isinstance(width, int):
        raise _Refused(f"the weight of {item.product.name} has no shape")
    return width
