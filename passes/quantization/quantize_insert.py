"""Writes a quantization plan into a graph: scales, QuantizeLinear / DequantizeLinear, integer weights and biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ...compiler.graph import (
    FROM_KEY,
    PASS_KEY,
    Array,
    Names,
    add_initializer,
    constant,
    dims,
    make_node,
    rank,
    remove_dead,
    replace,
)
from ...runtime.quantization import QuantSpec
from ...runtime.ranges import TensorRange
from ..matching import next_node, other_operand
from .integer_data import clip_bounds, data_inputs
from .quantization_plan import QuantPlan

_INT32 = 2**31 - 1


@dataclasses.dataclass
class _Quantized:
    """A value in its integer form.

    Attributes:
        integers: the quantized value.
        floats: what DequantizeLinear makes of it.
        scale: its scale, as an initializer.
        zero_point: its zero point.
        step: the scale as a number, or one per channel.
    """

    integers: ir.Value
    floats: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    step: Array


def insert(model: ir.Model, plan: QuantPlan, ranges: Mapping[str, TensorRange], by: str) -> None:
    """Rewrites ``model`` as ``plan`` says.

    Args:
        model: the graph the plan was made for, or a clone of it.
        plan: what is quantized.
        ranges: for every activation of the plan, except those that share another's.
        by: name of the pass, for the metadata of new nodes.
    """
    _Inserter(model, plan, ranges, by).run()


class _Inserter:
    def __init__(self, model: ir.Model, plan: QuantPlan, ranges: Mapping[str, TensorRange], by: str) -> None:
        self.model, self.graph, self.plan, self.ranges, self.by = model, model.graph, plan, ranges, by
        self.names = Names(model)
        self.activations: dict[str, _Quantized] = {}
        self.weights: dict[tuple[ir.Value, QuantSpec], _Quantized] = {}

    def run(self) -> None:
        values = {value.name or "": value for value in self.graph.inputs}
        nodes = list(self.graph)
        values |= {value.name or "": value for node in nodes for value in node.outputs}
        for name in values:  # in the order they are made, so that a shared scale is there before it is shared
            if name in self.plan.activations:
                self._activation(values[name])
        for node in nodes:
            if node.name in self.plan.nodes:
                self._constants(node)
        for node in nodes:
            if node.name in self.plan.nodes and node.op_type == "MatMul":
                self._product(node)
        remove_dead(self.model)

    def _activation(self, value: ir.Value) -> None:
        name = value.name or ""
        spec = self.plan.activations[name]
        shared = self.activations.get(self.plan.same_as.get(name, ""))
        maker = value.producer()
        start = value
        if maker is not None and (maker.name or "") in self.plan.absorbed and maker.inputs[0] is not None:
            start = maker.inputs[0]
        uses = tuple(value.uses())
        if shared is None:
            scale, zero = self._parameters(name, spec, maker)
            scales = add_initializer(self.graph, self.names, f"{name}_scale", scale)
            zeros = add_initializer(self.graph, self.names, f"{name}_zero_point", zero)
        else:
            scale, scales, zeros = shared.step, shared.scale, shared.zero_point
        quantized, restored = self._pair(value, start, scales, zeros)
        self._place(maker, quantized, restored)
        item = _Quantized(quantized.outputs[0], restored.outputs[0], scales, zeros, scale)
        self.activations[name] = item
        everything = name in self.plan.replaced
        for use in uses:
            reads = (use.node.name or "") in self.plan.nodes and value in data_inputs(use.node)
            if everything or reads:
                use.node.replace_input_with(use.idx, item.floats)
        if everything and value.is_graph_output():
            value.replace_all_uses_with(item.floats, replace_graph_outputs=True)
            quantized.replace_input_with(0, start)
            value.name, item.floats.name = item.floats.name, value.name

    def _parameters(self, name: str, spec: QuantSpec, maker: ir.Node | None) -> tuple[Array, Array]:
        seen = self.ranges[self.plan.source(name)]
        low, high = seen.low, seen.high
        if maker is not None and (maker.name or "") in self.plan.absorbed:
            top = clip_bounds(maker)[1]
            low, high = 0.0, high if top is None else min(high, top)
        return spec.parameters(low, high)

    def _pair(self, value: ir.Value, start: ir.Value, scale: ir.Value, zero: ir.Value) -> tuple[ir.Node, ir.Node]:
        name = value.name or ""
        quantize = make_node(
            "QuantizeLinear", [start, scale, zero], name=self.names.fresh(f"{name}/quantize"),
            output=self.names.fresh(f"{name}_quantized"), like=value, dtype=zero.dtype,
        )  # fmt: skip
        restore = make_node(
            "DequantizeLinear", [quantize.outputs[0], scale, zero], name=self.names.fresh(f"{name}/dequantize"),
            output=self.names.fresh(f"{name}_dequantized"), like=value,
        )  # fmt: skip
        return quantize, restore

    def _place(self, maker: ir.Node | None, *new: ir.Node) -> None:
        """Puts new nodes behind ``maker``, or at the start."""
        for node in new:
            self._mark(node, f"{maker.op_type}:{maker.name}" if maker is not None else "input")
        if maker is not None:
            self.graph.insert_after(maker, new)
        else:
            self.graph.insert_before(self.graph[0], new)

    def _mark(self, node: ir.Node, origin: str) -> None:
        node.metadata_props[PASS_KEY] = self.by
        node.metadata_props[FROM_KEY] = origin

    def _constants(self, node: ir.Node) -> None:
        """Weights, and the bias in the scale of the product."""
        weight: _Quantized | None = None
        for index, value in enumerate(node.inputs):
            spec = self.plan.weights.get((node.name or "", index))
            if spec is None or value is None:
                continue
            weight = self._weight(value, spec, node)
            node.replace_input_with(index, weight.floats)
        bias = node.inputs[2] if len(node.inputs) > 2 and node.op_type in ("Conv", "Gemm") else None
        source = self._operand(node)
        if bias is not None and weight is not None and source is not None:
            node.replace_input_with(2, self._bias(bias, source, weight, node))

    def _operand(self, node: ir.Node) -> _Quantized | None:
        """The quantized activation that ``node`` reads first."""
        restored = node.inputs[0]
        return next((item for item in self.activations.values() if item.floats is restored), None)

    def _weight(self, value: ir.Value, spec: QuantSpec, node: ir.Node) -> _Quantized:
        if (value, spec) not in self.weights:
            array = constant(value)
            if array is None:
                raise ValueError(f"{value.name} is no constant")
            scale, zero = spec.weight_parameters(array)
            scale = self._room_for_bias(node, scale)
            self.weights[value, spec] = self._stored(value, spec.quantize(array, scale, zero), scale, zero, spec.axis)
        return self.weights[value, spec]

    def _room_for_bias(self, node: ir.Node, scale: Array) -> Array:
        """Weight scales no smaller than what lets the bias fit into 32 bits."""
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 and node.op_type in ("Conv", "Gemm") else None
        source = self._operand(node)
        if bias is None or source is None:
            return scale
        needed = np.abs(bias.astype(np.float64)) / (float(source.step) * _INT32)
        needed = needed.reshape(-1) if scale.ndim else np.max(needed, initial=0.0)
        return np.maximum(scale, needed).astype(np.float32)

    def _bias(self, bias: ir.Value, source: _Quantized, weight: _Quantized, node: ir.Node) -> ir.Value:
        array = constant(bias)
        if array is None:
            raise ValueError(f"{bias.name} is no constant")
        step = (source.step.astype(np.float64) * weight.step).astype(np.float32)
        flat = array.reshape(-1).astype(np.float64)
        if node.op_type == "Gemm" and flat.size == 1 and step.size > 1:
            flat = np.repeat(flat, step.size)
        stored = np.clip(np.rint(flat / step), -_INT32, _INT32).astype(np.int32)
        zero = np.zeros(step.shape, np.int32)
        return self._stored(bias, stored, step, zero, 0 if step.ndim else None).floats

    def _stored(self, value: ir.Value, stored: Array, scale: Array, zero: Array, axis: int | None) -> _Quantized:
        """An integer initializer with its DequantizeLinear."""
        name = value.name or ""
        integers = add_initializer(self.graph, self.names, f"{name}_quantized", stored)
        scales = add_initializer(self.graph, self.names, f"{name}_scale", scale)
        zeros = add_initializer(self.graph, self.names, f"{name}_zero_point", zero)
        restore = make_node(
            "DequantizeLinear", [integers, scales, zeros], name=self.names.fresh(f"{name}/dequantize"),
            output=self.names.fresh(f"{name}_dequantized"), shape=stored.shape, dtype=ir.DataType.FLOAT,
            attributes={} if axis is None else {"axis": axis},
        )  # fmt: skip
        self._place(None, restore)
        return _Quantized(integers, restore.outputs[0], scales, zeros, scale)

    def _product(self, node: ir.Node) -> None:
        """``x W + b``: in a form that ONNX Runtime does not turn back into a float Gemm."""
        source = self._operand(node)
        weight = next((item for item in self.weights.values() if item.floats is node.inputs[1]), None)
        if source is None or weight is None or rank(weight.floats) != 2:
            return
        add = next_node(node.outputs[0])
        bias = other_operand(add, node.outputs[0]) if add is not None and add.op_type == "Add" else None
        array = constant(bias, limit=1 << 20)
        width = (dims(weight.floats) or [0])[-1]
        if array is None or bias is None or array.size != width or array.shape[-1] != width or add is None:
            return
        self._safe_bias(node, source, weight, add, bias, array)

    def _safe_bias(
        self, node: ir.Node, source: _Quantized, weight: _Quantized, add: ir.Node, bias: ir.Value, array: Array
    ) -> None:
        result, x = add.outputs[0], node.inputs[0]
        size = rank(x)
        if size == 2:
            stored = self._bias(bias, source, weight, node)
            name = self.names.fresh(f"{node.name}/gemm")
            output = self.names.fresh(f"{result.name}_gemm")
            gemm = make_node("Gemm", [node.inputs[0], node.inputs[1], stored], name=name, output=output, like=result)
            replace(add, [gemm], by=self.by, gone=[node])
        elif size is not None and array.ndim < size and all(isinstance(dim, int) for dim in dims(x) or []):
            shaped = array.reshape([1] * (size - 1) + [-1])
            wide = add_initializer(self.graph, self.names, f"{bias.name}_row", shaped)
            add.replace_input_with(list(add.inputs).index(bias), wide)
