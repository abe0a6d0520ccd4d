"""Operators that work element by element, and reductions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from ..graph import MICROSOFT
from .table import DTYPES, Call, only, operator

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}
_REDUCE: dict[str, Callable[..., Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype),
}


def _unary(function: Callable[[Tensor], Tensor], call: Call, x: Tensor) -> Tensor:
    return function(x)


def _binary(function: Callable[[Tensor, Tensor], Tensor], call: Call, a: Tensor, b: Tensor) -> Tensor:
    return function(a, b)


def _reduce(function: Callable[..., Tensor], call: Call, x: Tensor, axes: Any = None) -> Tensor:
    chosen = call.get("axes") if axes is None else axes
    if not chosen:
        if call.get("noop_with_empty_axes", 0):
            return x
        chosen = list(range(x.dim()))
    return function(x, list(chosen), bool(call.get("keepdims", 1)))


for _name, _function in _UNARY.items():
    operator(_name)(functools.partial(_unary, _function))
for _name, _function in _BINARY.items():
    operator(_name)(functools.partial(_binary, _function))
for _name, _function in _REDUCE.items():
    operator(_name, host=(1,))(functools.partial(_reduce, _function))


@operator("Div")
def _div(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("Mod")
def _mod(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if call.get("fmod", 0) else torch.remainder(a, b)


@operator("Pow")
def _pow(call: Call, x: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(x, exponent).to(x.dtype)


@operator("Max")
def _max(call: Call, *items: Tensor) -> Tensor:
    return functools.reduce(torch.maximum, items)


@operator("Min")
def _min(call: Call, *items: Tensor) -> Tensor:
    return functools.reduce(torch.minimum, items)


@operator("Sum")
def _sum(call: Call, *items: Tensor) -> Tensor:
    return functools.reduce(torch.add, items)


@operator("Mean")
def _mean(call: Call, *items: Tensor) -> Tensor:
    return functools.reduce(torch.add, items) / len(items)


@operator("Where")
def _where(call: Call, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@operator("Clip")
def _clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Bounds are attributes below opset 11."""
    for bound, name, function in ((low, "min", torch.maximum), (high, "max", torch.minimum)):
        limit = torch.tensor(call.get(name), dtype=x.dtype) if bound is None and call.get(name) is not None else bound
        if limit is not None:
            x = function(x, limit.to(x.device))
    return x


@operator("Cast")
def _cast(call: Call, x: Tensor) -> Tensor:
    return x.to(DTYPES[ir.DataType(call.get("to"))])


@operator("CastLike")
def _cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


@operator("Identity", "Dropout")
def _identity(call: Call, x: Tensor, *ignored: Tensor | None) -> Tensor:
    """Dropout as at inference."""
    return x


@operator("LeakyRelu")
def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.get("alpha", 0.01))


@operator("PRelu")
def _prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


@operator("Elu")
def _elu(call: Call, x: Tensor) -> Tensor:
    return F.elu(x, call.get("alpha", 1.0))


@operator("Selu")
def _selu(call: Call, x: Tensor) -> Tensor:
    alpha, gamma = call.get("alpha", 1.6732632), call.get("gamma", 1.0507010)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


@operator("HardSigmoid")
def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return (call.get("alpha", 0.2) * x + call.get("beta", 0.5)).clamp(0, 1)


@operator("Gelu")
@operator("Gelu", domain=MICROSOFT)
def _gelu(call: Call, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=call.get("approximate", "none"))


@operator("BiasGelu", domain=MICROSOFT)
def _bias_gelu(call: Call, x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


@operator("FastGelu", domain=MICROSOFT)
def _fast_gelu(call: Call, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("QuickGelu", domain=MICROSOFT)
def _quick_gelu(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.get("alpha", 1.702) * x)


def masked_softmax(scores: Tensor, axis: int = -1) -> Tensor:
    """Softmax that has no gradient where a whole row is -inf; there it is NaN, as ONNX Runtime computes it.

    Exporters replace such NaN by 0 afterwards, but 0 times the NaN of torch's derivative would spoil every weight.
    """
    dead = (scores == float("-inf")).all(axis, keepdim=True)
    return scores.masked_fill(dead, 0.0).softmax(axis).masked_fill(dead, float("nan"))


@operator("Softmax")
def _softmax(call: Call, x: Tensor) -> Tensor:
    return _over_axis(call, x, masked_softmax)


@operator("LogSoftmax")
def _log_softmax(call: Call, x: Tensor) -> Tensor:
    return _over_axis(call, x, torch.log_softmax)


def _over_axis(call: Call, x: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Below opset 13 all axes from ``axis`` on count as one."""
    if call.opset >= 13:
        return function(x, call.get("axis", -1))
    axis = call.get("axis", 1) % x.dim()
    return function(x.flatten(axis), axis).reshape(x.shape)


@operator("ArgMax", refuse=only(select_last_index=0))
def _arg_max(call: Call, x: Tensor) -> Tensor:
    return x.argmax(call.get("axis", 0), bool(call.get("keepdims", 1)))


@operator("ArgMin", refuse=only(select_last_index=0))
def _arg_min(call: Call, x: Tensor) -> Tensor:
    return x.argmin(call.get("axis", 0), bool(call.get("keepdims", 1)))


@operator("CumSum", host=(1,))
def _cumsum(call: Call, x: Tensor, axis: Any) -> Tensor:
    axis = axis if isinstance(axis, int) else axis[0]
    flipped = x.flip(axis) if call.get("reverse", 0) else x
    total = flipped.cumsum(axis, dtype=x.dtype)
    total = total - flipped if call.get("exclusive", 0) else total
    return total.flip(axis) if call.get("reverse", 0) else total
