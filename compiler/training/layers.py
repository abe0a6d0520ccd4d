"""Products, convolutions, pooling and normalizations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from ..graph import MICROSOFT, attribute
from .table import Call, given, only, operator

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@operator("MatMul")
def _matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@operator("FusedMatMul", domain=MICROSOFT, refuse=only(transBatchA=0, transBatchB=0))
def _fused_matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    a = a.transpose(-1, -2) if call.get("transA", 0) else a
    b = b.transpose(-1, -2) if call.get("transB", 0) else b
    return call.get("alpha", 1.0) * (a @ b)


@operator("Gemm")
def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    product = (a.T if call.get("transA", 0) else a) @ (b.T if call.get("transB", 0) else b)
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    product = product if alpha == 1.0 else alpha * product
    return product if c is None else product + (c if beta == 1.0 else beta * c)


def _padded(call: Call, x: Tensor, kernel: Sequence[int], value: float = 0.0) -> Tensor:
    """``x`` with the padding that a convolution or pooling with ``kernel`` asks for."""
    spatial = len(kernel)
    strides = call.get("strides") or [1] * spatial
    dilations = call.get("dilations") or [1] * spatial
    mode = call.get("auto_pad", "NOTSET")
    pads = list(call.get("pads") or [0] * (2 * spatial))
    if mode == "VALID":
        return x
    if mode != "NOTSET":
        for axis in range(spatial):
            size = x.shape[2 + axis]
            reach = dilations[axis] * (kernel[axis] - 1) + 1
            total = max((math.ceil(size / strides[axis]) - 1) * strides[axis] + reach - size, 0)
            small, large = total // 2, total - total // 2
            first, last = (small, large) if mode == "SAME_UPPER" else (large, small)
            pads[axis], pads[spatial + axis] = first, last
    if not any(pads):
        return x
    return F.pad(x, [pads[side * spatial + axis] for axis in reversed(range(spatial)) for side in (0, 1)], value=value)


@operator("Conv")
def _conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    spatial = weight.dim() - 2
    strides, dilations = call.get("strides") or [1] * spatial, call.get("dilations") or [1] * spatial
    padded = _padded(call, x, weight.shape[2:])
    return _CONV[spatial](padded, weight, bias, list(strides), 0, list(dilations), call.get("group", 1))


def _refuse_conv_transpose(node: ir.Node) -> str:
    pads = list(attribute(node, "pads", ()))
    if pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
        return "pads that are not the same on both sides"
    return "output_shape" if "output_shape" in node.attributes else only(auto_pad="NOTSET")(node)


@operator("ConvTranspose", refuse=_refuse_conv_transpose)
def _conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    spatial = weight.dim() - 2
    ones, zeros = [1] * spatial, [0] * spatial
    strides, dilations = list(call.get("strides") or ones), list(call.get("dilations") or ones)
    pads, extra = list(call.get("pads") or zeros)[:spatial], list(call.get("output_padding") or zeros)
    return _CONV_TRANSPOSE[spatial](x, weight, bias, strides, pads, extra, call.get("group", 1), dilations)


@operator("MaxPool", refuse=lambda node: "the output Indices" if len(node.outputs) > 1 else "")
def _max_pool(call: Call, x: Tensor) -> Tensor:
    kernel = call.get("kernel_shape")
    strides = call.get("strides") or [1] * len(kernel)
    dilations = call.get("dilations") or [1] * len(kernel)
    padded = _padded(call, x, kernel, float("-inf"))
    ceil = bool(call.get("ceil_mode", 0))
    return _MAX_POOL[len(kernel)](padded, list(kernel), list(strides), 0, list(dilations), ceil)


@operator("AveragePool", refuse=only(ceil_mode=0, dilations=None))
def _average_pool(call: Call, x: Tensor) -> Tensor:
    kernel = call.get("kernel_shape")
    strides = list(call.get("strides") or [1] * len(kernel))
    average = _AVERAGE_POOL[len(kernel)](_padded(call, x, kernel), list(kernel), strides)
    if call.get("count_include_pad", 0):
        return average
    counted = _padded(call, torch.ones_like(x[:1, :1]), kernel)
    return average / _AVERAGE_POOL[len(kernel)](counted, list(kernel), strides)


@operator("GlobalAveragePool")
def _global_average_pool(call: Call, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def _global_max_pool(call: Call, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


@operator("BatchNormalization", refuse=only(training_mode=0))
def _batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """With the running statistics, as at inference."""
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, call.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def _instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=call.get("epsilon", 1e-5))


def _stashed(call: Call, x: Tensor) -> Tensor:
    """Statistics of 16-bit floats are taken in float32 unless the node says otherwise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) and call.get("stash_type", 1) == 1 else x


def _normalized(x: Tensor, axis: int, epsilon: float, centred: bool) -> Tensor:
    axes = list(range(axis % x.dim(), x.dim()))
    if centred:
        x = x - x.mean(axes, keepdim=True)
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon)


@operator("LayerNormalization", refuse=lambda node: "outputs beyond Y" if len(node.outputs) > 1 else "")
def _layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    normal = _normalized(_stashed(call, x), call.get("axis", -1), call.get("epsilon", 1e-5), True).to(x.dtype)
    return normal * scale if bias is None else normal * scale + bias


@operator("RMSNormalization")
@operator("SimplifiedLayerNormalization", refuse=lambda node: "outputs beyond Y" if len(node.outputs) > 1 else "")
def _rms_norm(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    normal = _normalized(_stashed(call, x), call.get("axis", -1), call.get("epsilon", 1e-5), False)
    return normal.to(x.dtype) * scale


def _refuse_statistics(node: ir.Node) -> str:
    return "outputs mean or inv_std_var" if any(output.name for output in node.outputs[1:3]) else ""


@operator("SkipLayerNormalization", domain=MICROSOFT, refuse=_refuse_statistics)
def _skip_layer_norm(
    call: Call, x: Tensor, skip: Tensor, scale: Tensor, shift: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    total = x + skip if bias is None else x + skip + bias
    normal = _normalized(_stashed(call, total), -1, call.get("epsilon", 1e-12), True).to(x.dtype) * scale
    return normal if shift is None else normal + shift, None, None, total


@operator("SkipSimplifiedLayerNormalization", domain=MICROSOFT, refuse=_refuse_statistics)
def _skip_rms_norm(
    call: Call, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    total = x + skip if bias is None else x + skip + bias
    normal = _normalized(_stashed(call, total), -1, call.get("epsilon", 1e-12), False).to(x.dtype)
    return normal * scale, None, None, total


def _refuse_group_norm(node: ir.Node) -> str:
    return "" if len(given(node, 1, 2)) == 2 else "no scale or bias"


@operator("GroupNormalization", refuse=_refuse_group_norm)
def _group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Below opset 21 scale and bias are one number a group."""
    groups = call.get("num_groups")
    normal = F.group_norm(x, groups, eps=call.get("epsilon", 1e-5))
    repeat = x.shape[1] // scale.shape[0]
    shape = [1, -1] + [1] * (x.dim() - 2)
    return normal * scale.repeat_interleave(repeat).reshape(shape) + bias.repeat_interleave(repeat).reshape(shape)
