"""QuantizeLinear and DequantizeLinear with a gradient: straight through the rounding, none beyond the range."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from ..graph import MICROSOFT, attribute
from .table import Call, given, operator

_BITS = {
    ir.DataType.INT2: 2,
    ir.DataType.UINT2: 2,
    ir.DataType.INT4: 4,
    ir.DataType.UINT4: 4,
    ir.DataType.INT8: 8,
    ir.DataType.UINT8: 8,
    ir.DataType.INT16: 16,
    ir.DataType.UINT16: 16,
    ir.DataType.INT32: 32,
}


def limits(dtype: ir.DataType) -> tuple[int, int]:
    """Smallest and largest number of an integer type."""
    bits = _BITS[dtype]
    signed = dtype.name.startswith("I")
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """The value ``rounded`` with the derivative of ``exact`` (Bengio et al., 1308.3432)."""
    return exact + (rounded - exact).detach()


def spread(values: Tensor, like: Tensor, axis: int, block_size: int) -> Tensor:
    """Scales or zero points, of the tensor, by channel or in blocks, as they broadcast over ``like``."""
    if values.numel() == 1:
        return values.reshape([1] * like.dim())
    if block_size:
        return values.repeat_interleave(block_size, axis).narrow(axis, 0, like.shape[axis])
    return values.reshape([-1 if at == axis % like.dim() else 1 for at in range(like.dim())])


def code_type(node: ir.Node) -> ir.DataType:
    """The integer type that a QuantizeLinear makes."""
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is not None and zero_point.dtype is not None:
        return zero_point.dtype
    named = node.attributes["output_dtype"].as_int() if "output_dtype" in node.attributes else 0
    return ir.DataType(named) if named else ir.DataType.UINT8


def _refuse_quantize(node: ir.Node) -> str:
    dtype = code_type(node)
    return "" if dtype in _BITS else f"codes of type {dtype}"


@operator("QuantizeLinear", refuse=_refuse_quantize)
@operator("QuantizeLinear", domain=MICROSOFT, refuse=_refuse_quantize)
def _quantize(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Codes as floats, so that a derivative can go through what moves them."""
    axis, block = call.get("axis", 1), call.get("block_size", 0)
    scaled = x / spread(scale, x, axis, block)
    zero = 0.0 if zero_point is None else spread(zero_point, x, axis, block).to(scaled.dtype)
    low, high = limits(code_type(call.node))
    rounded = (torch.round(scaled) + zero).clamp(low, high)
    return straight_through((scaled + zero).clamp(low, high), rounded)


@operator("DequantizeLinear")
@operator("DequantizeLinear", domain=MICROSOFT)
def _dequantize(call: Call, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    axis, block = call.get("axis", 1), call.get("block_size", 0)
    shifted = codes.to(scale.dtype)
    if zero_point is not None:
        shifted = shifted - spread(zero_point, codes, axis, block).to(scale.dtype)
    return shifted * spread(scale, codes, axis, block)


def _refuse_blocks(node: ir.Node) -> str:
    table = node.op_type == "GatherBlockQuantized"
    codes, scales = node.inputs[0 if table else 1], node.inputs[2]
    if codes is None or codes.dtype != ir.DataType.UINT8 or scales is None or scales.const_value is None:
        return "codes that are not packed in uint8, or no constants"
    zero_points = given(node, 3)
    if zero_points and node.inputs[3].dtype != ir.DataType.UINT8:  # pyright: ignore[reportOptionalMemberAccess]
        return "float zero points"
    if table:
        usual = attribute(node, "gather_axis", 0) == 0 and attribute(node, "quantize_axis", 1) == 1
        return "" if usual else "axes other than gather_axis=0, quantize_axis=1"
    return "the input g_idx" if given(node, 4) else ""


@operator("MatMulNBits", domain=MICROSOFT, refuse=_refuse_blocks)
def _matmul_blocks(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The weight comes dequantized, [N, K] (``weights.py``)."""
    return F.linear(x, weight, bias)


@operator("GatherBlockQuantized", domain=MICROSOFT, refuse=_refuse_blocks)
def _gather_blocks(call: Call, table: Tensor, indices: Tensor) -> Tensor:
    """The table comes dequantized, [rows, K]."""
    rows = torch.where(indices < 0, indices + table.shape[0], indices).long()
    return table.index_select(0, rows.reshape(-1)).reshape([*indices.shape, table.shape[1]])
