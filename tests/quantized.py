"""A QDQ form of small float models, written from the operator specification, for tests of what comes after it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxlathe.compiler.graph import attribute, constant
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.verify import run_reference
from onnxlathe.runtime.inference import expose


def quantize(
    model: ir.Model,
    feeds: list,
    *,
    bits: int = 8,
    per_channel: bool = True,
    activations: bool = True,
    bias: bool = False,
) -> ir.Model:
    """Every MatMul, Gemm and Conv with constant weights gets integer weights, and uint8 activations by min and max.

    ``bias`` also stores the third input of Gemm and Conv as int32 with the scale of input times weight.
    """
    copy = model.clone()
    infer_shapes(copy)
    graph = copy.graph
    nodes = [node for node in graph if node.op_type in ("MatMul", "Gemm", "Conv")]
    inputs = {value.name for value in graph.inputs}
    names = [node.inputs[0].name for node in nodes if node.inputs[0].name not in inputs]
    shown = run_reference(expose(model, names), feeds)
    for node in nodes:
        x, w = node.inputs[0], node.inputs[1]
        array, top = constant(w), 2 ** (bits - 1) - 1
        axis = 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1
        others = tuple(index for index in range(array.ndim) if index != axis)
        size = np.abs(array).max(axis=others) if per_channel else np.abs(array).max()
        scale = np.maximum(np.asarray(size, np.float32) / np.float32(top), np.float32(1e-20))
        shape = [-1 if index == axis else 1 for index in range(array.ndim)] if per_channel else []
        codes = np.clip(np.rint(array / scale.reshape(shape)), -top, top).astype(np.int8)
        node.replace_input_with(1, _dequantize(graph, node, w.name, codes, scale, np.int8, axis))
        step = np.float32(1)
        if activations:
            seen = [
                feed[x.name] if x.name in inputs else result[x.name] for feed, result in zip(feeds, shown, strict=True)
            ]
            low, high = min(0.0, *(a.min() for a in seen)), max(0.0, *(a.max() for a in seen))
            step = np.float32((high - low) / 255)
            zero = np.uint8(np.rint(-low / step))
            parts = [_constant(graph, f"{node.name}_x{kind}", part) for kind, part in (("s", step), ("z", zero))]
            q = ir.node("QuantizeLinear", [x, *parts], name=f"{node.name}_q")
            dq = ir.node("DequantizeLinear", [q.outputs[0], *parts], name=f"{node.name}_dq")
            q.outputs[0].name, dq.outputs[0].name = f"{node.name}_xq", f"{node.name}_xd"
            graph.insert_before(node, [q, dq])
            node.replace_input_with(0, dq.outputs[0])
        if bias and len(node.inputs) > 2:
            b = node.inputs[2]
            total = (scale * step).astype(np.float32)
            stored = np.rint(constant(b) / total).astype(np.int32)
            node.replace_input_with(2, _dequantize(graph, node, b.name, stored, total, np.int32, 0))
    infer_shapes(copy)
    return copy


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.asarray(array), name=name))
    value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
    graph.register_initializer(value)
    return value


def _dequantize(
    graph: ir.Graph, node: ir.Node, name: str, codes: np.ndarray, scale: np.ndarray, kind: type, axis: int
) -> ir.Value:
    parts = [(f"{name}_quantized", codes), (f"{name}_scale", scale), (f"{name}_zero", np.zeros(scale.shape, kind))]
    values = [_constant(graph, f"{part}_{node.name}" if part in graph.initializers else part, a) for part, a in parts]
    dq = ir.node("DequantizeLinear", values, attributes={"axis": axis}, name=f"{node.name}_{name}_dq")
    dq.outputs[0].name = f"{node.name}_{name}_d"
    graph.insert_before(node, dq)
    return dq.outputs[0]
