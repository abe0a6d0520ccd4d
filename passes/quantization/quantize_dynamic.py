"""Dynamic quantization: weights as int8 now, scales of activations at run time, no calibration."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from ...compiler.base import Claim, Outcome, Pass, PassContext
from ...compiler.graph import (
    FROM_KEY,
    MICROSOFT,
    PASS_KEY,
    Array,
    Names,
    add_initializer,
    all_nodes,
    attribute,
    constant,
    is_op,
    make_node,
    producer,
    rank,
    remove_dead,
    replace,
    require_domain,
)
from ...runtime.quantization import QuantSpec
from ...runtime.quantization_support import has_vnni
from ..matching import next_node, other_operand
from .quantization_plan import RULE, Filter, selected
from .quantize_tables import quantize_tables

_Stored = tuple[ir.Value, ir.Value, ir.Value]


@dataclasses.dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Quantizes weights now and activations at run time, each with the range it has: no calibration.

    1. ``x W + b``, ``Gemm(x, W, b)`` -> ``MatMulIntegerToFloat(DynamicQuantizeLinear(x), W8, b)``; one
       DynamicQuantizeLinear serves all products of the same x.
    2. ``LSTM`` -> ``com.microsoft.DynamicQuantizeLSTM``.
    3. Float tables that Gather reads: see ``quantize_tables.py``.

    Refused: products of two activations, transposed activations, Gemm with alpha or beta, weights with NaN, GRU and
    RNN (no integer kernel), Conv (ConvInteger is slower than a float Conv).

    Pays on the CPU provider, a little less than ``quantize-static``, as the range of x is searched in every run. The
    weights are 7 bits where the CPU has no VNNI. Contract: onnxruntime docs/ContribOperators.md.

    Attributes:
        weight: type of weights.
        per_channel: one scale for each column.
        reduced: 7-bit weights; None: where the CPU needs it.
        embeddings: also the tables that Gather reads.
        include: only nodes of these operator types, name globs or callables; empty: all.
        exclude: none of these.
    """

    name: ClassVar[str] = "quantize-dynamic"
    claims: ClassVar[Claim] = Claim.APPROXIMATE

    weight: Literal["int8", "uint8"] = "int8"
    per_channel: bool = True
    reduced: bool | None = None
    embeddings: bool = True
    include: tuple[Filter, ...] = ()
    exclude: tuple[Filter, ...] = ()

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        if context.device != "cpu":
            outcome.notes.append("nothing done: the CUDA provider has no int8 products; use ConvertFloat16 there")
            return outcome
        work = _Dynamic(self, model, outcome)
        for node in all_nodes(model):
            if node.domain == "" and node.op_type in ("MatMul", "Gemm", "LSTM", "GRU", "RNN", "Conv"):
                work.quantize(node)
        if outcome.changed:
            require_domain(model, MICROSOFT)
            remove_dead(model)
        if self.embeddings:
            quantize_tables(model, self.include, self.exclude, self.name, outcome)
        return outcome


class _Dynamic:
    def __init__(self, options: QuantizeDynamic, model: ir.Model, outcome: Outcome) -> None:
        self.options, self.model, self.outcome = options, model, outcome
        self.names = Names(model)
        reduced = options.reduced if options.reduced is not None else not has_vnni()
        self.spec = QuantSpec(options.weight, symmetric=True, reduced=reduced)
        self.inputs: dict[tuple[ir.Graph, ir.Value], ir.Node] = {}
        self.weights: dict[tuple[ir.Value, int | None, bool], _Stored] = {}

    def quantize(self, node: ir.Node) -> None:
        if not selected(node, self.options.include, self.options.exclude):
            self.outcome.refuse(node, RULE, "left float by include or exclude")
            return
        reason = self._problem(node)
        if reason:
            self.outcome.refuse(node, RULE, reason)
        elif node.op_type == "LSTM":
            self._lstm(node)
        else:
            self._product(node)

    def _problem(self, node: ir.Node) -> str:
        if node.op_type == "Conv":
            return "ConvInteger is slower than a float Conv: use quantize-static"
        if node.op_type in ("GRU", "RNN"):
            return f"there is no integer kernel for {node.op_type}"
        x, weight = node.inputs[:2]
        if x is None or weight is None or x.dtype != ir.DataType.FLOAT or weight.dtype != ir.DataType.FLOAT:
            return "its operands are not float32"
        if producer(weight, "DequantizeLinear") or producer(x, "DequantizeLinear"):
            return "it is quantized already"
        if not weight.is_initializer() or weight.is_graph_input() or x.is_initializer():
            return "only products of an activation with a constant matrix on the right can be"
        if node.op_type == "LSTM":
            recurrent = node.inputs[2]
            plain = recurrent is not None and recurrent.is_initializer() and not attribute(node, "layout", 0)
            return "" if plain else "its recurrent weights are computed, or its layout is batch first"
        if rank(weight) != 2 or (node.op_type == "Gemm" and (attribute(node, "transA", 0) or rank(x) != 2)):
            return "the weight is not a matrix, or the activation is transposed"
        if node.op_type == "Gemm" and (attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0):
            return "Gemm with alpha or beta other than 1: run fuse-linear first"
        array = constant(weight)
        return "" if array is not None and np.isfinite(array).all() else f"{weight.name} holds NaN or infinity"

    def _product(self, node: ir.Node) -> None:
        """``x W + b`` -> ``MatMulIntegerToFloat(DynamicQuantizeLinear(x), W, b)``."""
        graph, x, weight = node.graph, node.inputs[0], node.inputs[1]
        if not isinstance(graph, ir.Graph) or x is None or weight is None:
            return
        source = self._source(graph, x)
        transposed = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
        integers, scale, zero = self._weight(graph, weight, transposed)
        bias, last = self._bias(node, integers)
        inputs = [source.outputs[0], integers, source.outputs[1], scale, source.outputs[2], zero]
        result = last.outputs[0]
        output = self.names.fresh(f"{result.name}_product")
        name = self.names.fresh(f"{node.name}/integer")
        inputs += [bias] if bias is not None else []
        new = make_node("MatMulIntegerToFloat", inputs, name=name, output=output, like=result, domain=MICROSOFT)
        replace(last, [new], by=self.options.name, gone=[node] if last is not node else [])
        self.outcome.counts[f"{node.op_type} on integers"] += 1

    def _source(self, graph: ir.Graph, x: ir.Value) -> ir.Node:
        """The node that quantizes ``x``: one for all that read it."""
        if (graph, x) in self.inputs:
            return self.inputs[graph, x]
        types = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
        parts = [
            ir.Value(
                name=self.names.fresh(f"{x.name}_{part}"),
                type=ir.TensorType(dtype),
                shape=ir.Shape([]) if part != "quantized" else None if x.shape is None else x.shape.copy(),
            )
            for part, dtype in zip(("quantized", "scale", "zero_point"), types, strict=True)
        ]
        node = ir.node("DynamicQuantizeLinear", [x], outputs=parts, name=self.names.fresh(f"{x.name}/quantize"))
        node.metadata_props[PASS_KEY] = self.options.name
        node.metadata_props[FROM_KEY] = x.name or ""
        maker = x.producer()
        if maker is not None and maker.graph is graph:
            graph.insert_after(maker, node)
        else:
            graph.insert_before(graph[0], node)
        self.inputs[graph, x] = node
        return node

    def _weight(self, graph: ir.Graph, weight: ir.Value, transposed: bool) -> _Stored:
        key = (weight, 1 if self.options.per_channel else None, transposed)
        array = constant(weight)
        if key not in self.weights and array is not None:
            spec = dataclasses.replace(self.spec, axis=key[1])
            self.weights[key] = self._store(weight, array.T if transposed else array, spec, graph)
        return self.weights[key]

    def _store(self, weight: ir.Value, array: Array, spec: QuantSpec, graph: ir.Graph) -> _Stored:
        scale, zero = spec.weight_parameters(array)
        owner = weight.graph if isinstance(weight.graph, ir.Graph) else graph
        return (
            add_initializer(owner, self.names, f"{weight.name}_quantized", spec.quantize(array, scale, zero)),
            add_initializer(owner, self.names, f"{weight.name}_scale", scale),
            add_initializer(owner, self.names, f"{weight.name}_zero_point", zero),
        )

    def _bias(self, node: ir.Node, integers: ir.Value) -> tuple[ir.Value | None, ir.Node]:
        """The constant vector added behind ``node``, and the last node of the two."""
        width = integers.shape[1] if integers.shape is not None else None
        graph = node.graph
        if node.op_type == "Gemm":
            bias, last = (*node.inputs, None)[2], node
        else:
            add = next_node(node.outputs[0])
            if add is None or not is_op(add, "Add"):
                return None, node
            bias, last = other_operand(add, node.outputs[0]), add
        if bias is None:
            return None, node
        array = constant(bias, limit=1 << 20)
        if array is None or array.size != width or array.shape[-1] != width or not isinstance(graph, ir.Graph):
            return None, node
        if array.ndim > 1:
            bias = add_initializer(graph, self.names, f"{bias.name}_row", array.reshape(-1))
        return bias, last

    def _lstm(self, node: ir.Node) -> None:
        """``LSTM`` -> ``com.microsoft.DynamicQuantizeLSTM``; its matrices are stored transposed."""
        graph = node.graph
        if not isinstance(graph, ir.Graph):
            return
        stored: list[_Stored] = []
        for value in node.inputs[1:3]:
            array = constant(value)
            if value is None or array is None:
                return
            turned = array.transpose(0, 2, 1)
            low, high = turned.min(axis=(1, 2)), turned.max(axis=(1, 2))
            spec = dataclasses.replace(self.spec, axis=0)
            scale, zero = spec.parameters(low, high)
            names = [self.names.fresh(f"{value.name}_{part}") for part in ("quantized", "scale", "zero_point")]
            arrays = (spec.quantize(turned, scale, zero), scale, zero)
            parts = [add_initializer(graph, self.names, n, a) for n, a in zip(names, arrays, strict=True)]
            stored.append((parts[0], parts[1], parts[2]))
        inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
        inputs[1], inputs[2] = stored[0][0], stored[1][0]
        inputs += [stored[0][1], stored[0][2], stored[1][1], stored[1][2]]
        attributes = {name: item.value for name, item in node.attributes.items() if name != "layout"}
        outputs = [ir.Value(name=f"{value.name}_dynamic", type=value.type, shape=value.shape) for value in node.outputs]
        new = ir.node(
            "DynamicQuantizeLSTM", inputs, attributes=attributes, domain=MICROSOFT, outputs=outputs,
            name=self.names.fresh(f"{node.name}/integer"),
        )  # fmt: skip
        new.metadata_props[PASS_KEY] = self.options.name
        new.metadata_props[FROM_KEY] = f"LSTM:{node.name}"
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, outputs)
        self.outcome.counts["LSTM on integers"] += 1
