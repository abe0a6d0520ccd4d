"""Chains that fusions look for, spelled in many ways, with a chance of a wrong constant, axis or operand."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from .builder import Builder, Value
from .operators import Step, batch_norm, image


def _off(b: Builder, value: float) -> float:
    """``value``, now and then another one: a near miss."""
    return value * b.random.choice([1.1, 0.5, -1.0]) if b.chance(0.06) else value


def swap(b: Builder, x: Value, y: Value) -> list[Value]:
    """The operands in one order or the other."""
    return [y, x] if b.chance(0.4) else [x, y]


def gelu(b: Builder, x: Value | None = None) -> Value:
    """Gelu by Erf or Tanh, QuickGelu, SiLU."""
    x = x or b.pick()
    kind = b.random.choice(["erf", "erf", "tanh", "quick", "silu"])
    if kind in ("quick", "silu"):
        inner = b.op("Mul", swap(b, x, b.number(_off(b, 1.702), x))) if kind == "quick" else x
        return b.op("Mul", swap(b, x, b.op("Sigmoid", [inner])))
    if kind == "erf":
        root = math.sqrt(2)
        inner = b.op("Div", [x, b.number(_off(b, root), x)])
        if b.chance(0.4):
            inner = b.op("Mul", swap(b, x, b.number(_off(b, 1 / root), x)))
        curve = b.op("Erf", [inner])
    else:
        cube = b.op("Pow", [x, b.number(3.0, x)]) if b.chance(0.5) else b.op("Mul", [b.op("Mul", [x, x]), x])
        inner = b.op("Add", swap(b, x, b.op("Mul", swap(b, cube, b.number(_off(b, 0.044715), x)))))
        curve = b.op("Tanh", [b.op("Mul", swap(b, inner, b.number(_off(b, math.sqrt(2 / math.pi)), x)))])
    curve = b.op("Add", swap(b, curve, b.number(_off(b, 1.0), x)))
    half = b.number(_off(b, 0.5), x)
    order = b.random.choice(["x first", "half last", "half curve"])
    if order == "x first":
        return b.op("Mul", swap(b, b.op("Mul", swap(b, x, half)), curve))
    if order == "half last":
        return b.op("Mul", swap(b, b.op("Mul", swap(b, x, curve)), half))
    return b.op("Mul", swap(b, x, b.op("Mul", swap(b, curve, half))))


def _mean(b: Builder, x: Value, keep: bool = True) -> Value:
    axis = -1 if not b.chance(0.05) else len(x.shape) - 1
    shape = (*x.shape[:-1], 1) if keep else x.shape[:-1]
    if b.opset >= 18:
        return b.op("ReduceMean", [x, b.ints(axis)], shape, keepdims=int(keep))
    return b.op("ReduceMean", [x], shape, axes=[axis], keepdims=int(keep))


def normalization(b: Builder, x: Value | None = None) -> Value:
    """Layer or RMS normalization, written out or as the operator."""
    x = x or (b.stream() if b.chance(0.7) else b.rows())
    width = int(x.shape[-1])
    scale, bias = b.weight(width, scale=1.0), b.weight(width, scale=0.5)
    if b.opset >= 17 and b.chance(0.3):
        return b.op("LayerNormalization", [x, scale, bias] if b.chance(0.7) else [x, scale], axis=-1)
    if b.opset >= 23 and b.chance(0.2):
        return b.op("RMSNormalization", [x, scale], axis=-1)
    centred = b.chance(0.6)
    d = b.op("Sub", [x, _mean(b, x)]) if centred else x
    square = b.op("Pow", [d, b.number(_off(b, 2.0), d)]) if b.chance(0.5) else b.op("Mul", [d, d])
    variance = _mean(b, square)
    sum_ = b.op("Add", swap(b, variance, b.number(b.random.choice([1e-5, 1e-6, 1e-12]), variance)))
    root = b.random.choice(["div", "reciprocal", "one over", "pow"])
    if root == "pow":
        y = b.op("Mul", swap(b, d, b.op("Pow", [sum_, b.number(-0.5, sum_)])))
    else:
        deviation = b.op("Sqrt", [sum_])
        if root == "div":
            y = b.op("Div", [d, deviation], d.shape)
        elif root == "reciprocal":
            y = b.op("Mul", [d, b.op("Reciprocal", [deviation])])
        else:
            y = b.op("Mul", [d, b.op("Div", [b.number(1.0, x), deviation], deviation.shape)])
    y = Value(y.name, y.dtype, x.shape)
    b.values[-1] = y
    if b.chance(0.8):
        y = b.op("Mul", swap(b, y, scale), x.shape)
    if b.chance(0.7):
        y = b.op("Add", swap(b, y, bias), x.shape)
    return y


def linear(b: Builder, x: Value | None = None, out: int = 0) -> Value:
    """A product with constant weights, a bias, factors before or behind."""
    x = x or (b.stream() if b.chance(0.5) else b.rows())
    inner, out = int(x.shape[-1]), out or b.random.choice([b.width, 4, 2 * b.width])
    shape = (*x.shape[:-1], out)
    source = b.op("Mul", swap(b, x, b.number(0.5, x))) if b.chance(0.15) else x
    y = b.op("MatMul", [source, b.weight(inner, out)], shape)
    if b.chance(0.6):
        y = b.op("Add", swap(b, y, b.weight(out, scale=0.5)), shape)
    if b.chance(0.2):
        y = b.op(b.random.choice(["Mul", "Div"]), [y, b.number(b.random.choice([2.0, 0.125]), y)], shape)
    if b.chance(0.15):
        y = b.op("Mul", swap(b, y, b.weight(out, scale=1.0)), shape)
    if b.chance(0.15):
        y = b.op("Add", [y, b.weight(out, scale=0.5)], shape)
    return y


def conv_chain(b: Builder) -> Value:
    """Conv and what scales or shifts its channels."""
    x = image(b)
    channels, size = int(x.shape[1]), int(x.shape[2])
    out = b.random.choice([4, 8])
    w = b.weight(out, channels, 1, 1, scale=0.5) if b.chance(0.3) else b.weight(out, channels, 3, 3, scale=0.3)
    pad = int(w.shape[2] == 3)
    inputs = [x, w, b.weight(out, scale=0.3)] if b.chance(0.5) else [x, w]
    y = b.op("Conv", inputs, (x.shape[0], out, size, size), pads=[pad] * 4)
    for _ in range(b.random.randint(1, 2)):
        kind = b.random.choice(["bn", "mul", "add", "scalar", "relu"])
        if kind == "bn":
            y = batch_norm(b, y)
        elif kind == "relu":
            y = b.op(b.random.choice(["Relu", "Clip"]), [y])
        elif kind == "scalar":
            y = b.op(b.random.choice(["Mul", "Div", "Sub"]), [y, b.number(2.0, y)])
        else:
            channelwise = b.weight(1, out, 1, 1, scale=1.0) if b.chance(0.8) else b.weight(size, scale=1.0)
            y = b.op(kind.title(), swap(b, y, channelwise), y.shape)
    return y


def gated(b: Builder, x: Value | None = None) -> Value:
    """act(x Wg) * (x Wu), and the product down again."""
    x = x or b.stream()
    inner, hidden = int(x.shape[-1]), 2 * b.width
    shape = (*x.shape[:-1], hidden)
    gate = b.op("MatMul", [x, b.weight(inner, hidden)], shape)
    up = b.op("MatMul", [x, b.weight(inner, hidden)], shape)
    kind = b.random.choice(["silu", "Sigmoid", "gelu", "Relu"])
    if kind == "silu":
        act = b.op("Mul", swap(b, gate, b.op("Sigmoid", [gate])))
    else:
        act = gelu(b, gate) if kind == "gelu" else b.op(kind, [gate])
    return b.op("MatMul", [b.op("Mul", swap(b, act, up)), b.weight(hidden, inner)], x.shape)


def feed_forward(b: Builder, x: Value | None = None) -> Value:
    """Normalization, two products with an activation between, residual."""
    x = x or b.stream()
    h = linear(b, normalization(b, x), 2 * b.width)
    h = gelu(b, h) if b.chance(0.6) else b.op("Relu", [h])
    return residual(b, x, linear(b, h, b.width))


def residual(b: Builder, x: Value, y: Value) -> Value:
    """x + y, perhaps normalized, perhaps by ORT's fused operator."""
    if b.chance(0.25) and len(x.shape) == 3:
        scale, bias = b.weight(b.width, scale=1.0), b.weight(b.width, scale=0.5)
        rms = b.chance(0.4)
        op = "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization"
        inputs = [x, y, scale] if rms else [x, y, scale, bias]
        if b.chance(0.5):
            return b.op(op, inputs, x.shape, domain="com.microsoft", epsilon=1e-5)
        made, sum_ = Value(b.fresh("skip"), x.dtype, x.shape), Value(b.fresh("sum"), x.dtype, x.shape)
        names = [made, Value("", x.dtype, ()), Value("", x.dtype, ()), sum_]
        b.node(op, inputs, names, domain="com.microsoft", epsilon=1e-5)
        b.values[:] = [value for value in b.values if value.name]
        return b.op("Add", [made, sum_])
    total = b.op("Add", swap(b, x, y), x.shape)
    return normalization(b, total) if b.chance(0.6) else total


def quantized_linear(b: Builder) -> Value:
    """A product in QDQ form: activations with one scale, weights with one or one a column."""
    x = b.stream() if b.chance(0.6) else b.rows()
    inner, out = int(x.shape[-1]), b.width
    zero_type: Literal["uint8", "int8"] = b.random.choice(["uint8", "int8"])
    scale, zero = b.constant(np.float32(0.03)), b.constant(np.array(b.random.choice([0, 5])), zero_type)
    q = b.op("QuantizeLinear", [x, scale, zero], None, zero_type)
    a = b.op("DequantizeLinear", [q, scale, zero], None, "float32")
    columns = b.opset >= 13 and b.chance(0.6)
    codes = b.constant(np.clip(b.normal(inner, out) * 40, -127, 127).astype(np.int8))
    scales = b.constant(np.full(out, 0.01, np.float32) if columns else np.float32(0.01))
    zeros = b.constant(np.zeros(scales.shape, np.int8))
    w = b.op("DequantizeLinear", [codes, scales, zeros], (inner, out), "float32", **({"axis": 1} if columns else {}))
    y = b.op("MatMul", [a, w], (*x.shape[:-1], out))
    return b.op("Add", swap(b, y, b.weight(out, scale=0.5)), y.shape) if b.chance(0.7) else y


def mlp(b: Builder) -> Value:
    """Layers of Gemm and activations over rows."""
    x = b.rows()
    for _ in range(b.random.randint(2, 3)):
        out = b.random.choice([16, 32])
        x = b.op("Gemm", [x, b.weight(int(x.shape[1]), out), b.weight(out, scale=0.5)], (x.shape[0], out))
        x = b.op(b.random.choice(["Relu", "Tanh", "Sigmoid"]), [x])
    return x


def convnet(b: Builder) -> Value:
    """The front of a convolutional network, rows and columns static."""
    y = b.input(("n", 3, 16, 16))
    channels, size = 3, 16
    for _ in range(b.random.randint(2, 4)):
        out = b.random.choice([4, 8])
        w = b.weight(out, channels, 3, 3, scale=0.3)
        y = b.op("Conv", [y, w, b.weight(out, scale=0.3)], (y.shape[0], out, size, size), pads=[1, 1, 1, 1])
        y = batch_norm(b, y) if b.chance(0.5) else y
        y = b.op(b.random.choice(["Relu", "Relu", "Sigmoid"]), [y])
        if size > 4 and b.chance(0.6):
            size //= 2
            y = b.op("MaxPool", [y], (y.shape[0], out, size, size), kernel_shape=[2, 2], strides=[2, 2])
        channels = out
    return b.op("Flatten", [b.op("GlobalAveragePool", [y], (y.shape[0], channels, 1, 1))], (y.shape[0], channels))


PATTERNS: dict[Step, int] = {
    lambda b: void(gelu(b)): 3,
    lambda b: void(normalization(b)): 3,
    lambda b: void(linear(b)): 3,
    lambda b: void(conv_chain(b)): 2,
    lambda b: void(gated(b)): 1,
    lambda b: void(feed_forward(b)): 2,
    lambda b: void(quantized_linear(b)): 1,
    lambda b: void(mlp(b)): 1,
    lambda b: void(convnet(b)): 1,
}


def void(value: Value) -> None:
    """Patterns return what they made; steps return nothing."""
