"""Which constants of a graph are weights: those that stand where weights stand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_MATRIX = {"MatMul": (0, 1), "Gemm": (0, 1), "FusedMatMul": (0, 1), "Conv": (1,), "ConvTranspose": (1,), "Gather": (0,)}
_VECTOR = {
    "Gemm": (2,),
    "Conv": (2,),
    "ConvTranspose": (2,),
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3, 4),
    "SkipSimplifiedLayerNormalization": (2, 3),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "PRelu": (1,),
    "BiasGelu": (1,),
    "FastGelu": (1,),
    "MultiHeadAttention": (3,),
    "MatMulNBits": (5,),
}
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")
_PRODUCTS = ("MatMul", "Mul")
_VIEWS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast", "QuantizeLinear", "DequantizeLinear")
_LARGEST = 1e4
"""A constant added with larger numbers is a mask."""


def is_constant(value: ir.Value) -> bool:
    """Whether ``value`` is an initializer that callers cannot override, or a Constant."""
    return not value.is_graph_input() and ir.convenience.get_const_tensor(value) is not None


def kind_of(value: ir.Value) -> str:
    """``matrix`` or ``vector`` for a constant that is a weight by all its uses; empty for any other."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype not in FLOATS or not value.is_initializer():
        return ""
    kinds = {_use(use.node, use.idx, value) for use in value.uses()}
    if not kinds or "" in kinds:
        return ""
    return "matrix" if "matrix" in kinds else "vector"


def _use(node: ir.Node, index: int, value: ir.Value) -> str:
    if any(_counts(other) for at, other in enumerate(node.inputs) if at != index and node.op_type in _PRODUCTS):
        return ""  # frequencies, which positions are multiplied with
    if node.op_type == "Gather" and any(use.node.op_type == "RotaryEmbedding" for use in node.outputs[0].uses()):
        return ""
    if index in _MATRIX.get(node.op_type, ()):
        return "matrix"
    if index in _VECTOR.get(node.op_type, ()):
        return "vector"
    if node.op_type in _ARITHMETIC:
        tensor = ir.convenience.get_const_tensor(value)
        array = tensor.numpy().astype(np.float32) if tensor is not None else np.zeros(1)
        return "vector" if array.size > 1 and bool((np.abs(array) < _LARGEST).all()) else ""
    if node.op_type in _VIEWS and index == 0:
        kinds = {_use(use.node, use.idx, value) for use in node.outputs[0].uses()}
        if kinds and "" not in kinds:
            return "matrix" if "matrix" in kinds else "vector"
    return ""


def _counts(value: ir.Value | None) -> bool:
    """Whether ``value`` is integers, cast: positions."""
    maker = value.producer() if value is not None else None
    while maker is not None and maker.op_type in (*_VIEWS, "Expand"):
        source = maker.inputs[0]
        if maker.op_type == "Cast" and source is not None and source.dtype in (ir.DataType.INT64, ir.DataType.INT32):
            return True
        maker = source.producer() if source is not None else None
    return False
