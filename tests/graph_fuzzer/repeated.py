"""Graphs of repeated residual blocks, on which pruning and distillation have something to do."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import onnx

from .attention import attend
from .builder import Builder, Value
from .generate import Case, Feeds, decoder_of, draw, feeds_of
from .mutate import mutate
from .operators import batch_norm
from .patterns import gated, gelu, linear, normalization, residual, swap

Branch = Callable[[Builder, Value], Value]
_SIZES = (
    {"n": 2, "s": 5},
    {"n": 1, "s": 1},
    {"n": 3, "s": 4},
    {"n": 4, "s": 8},
    {"n": 2, "s": 7},
    {"n": 0, "s": 3},
)
_ACTIVATIONS = ("Relu", "Tanh", "Sigmoid", "LeakyRelu", "Elu", "Softplus", "HardSigmoid")
_FUSED = ("FastGelu", "QuickGelu", "Gelu")


def draw_blocks(random: Random) -> Case:
    """A random graph of two to four residual blocks."""
    return draw(random, _blocks)


def _blocks(random: Random) -> tuple[onnx.ModelProto, list[Feeds]]:
    if random.random() < 0.1:
        return decoder_of(random, layers=random.choice([2, 3]))
    b = Builder(random, random.randint(11, 24))
    b.as_nodes, b.shared = 0.02, 0.02
    outputs = [_convolutions(b)] if b.chance(0.15) else _transformer(b)
    proto = b.finish(outputs)
    if random.random() < 0.2:
        mutate(proto, random, 1)
    rng = np.random.default_rng(random.randrange(2**32))
    return proto, [feeds_of(proto, sizes, rng, number) for number, sizes in enumerate(_SIZES)]


def _transformer(b: Builder) -> list[Value]:
    if b.chance(0.4):
        ids = b.input(("n", "s"), "int64", "ids")
        x = b.op("Gather", [b.weight(20, b.width, scale=1.0), ids], ("n", "s", b.width), axis=0)
    else:
        x = linear(b, b.input(("n", "s", b.width)), b.width)
    attends = b.chance(0.6)
    if attends and b.chance(0.4):
        b.flags = b.input(("n", "s"), "int64", "attention_mask")
    branches: list[Branch] = [_attention] if attends else []
    branches += [_feed_forward] if not attends or b.chance(0.8) else []
    style, alike, random = b.random.choice(["pre", "pre", "post", "post", "none"]), b.chance(0.8), b.random
    seeds = [random.randrange(2**32)] * 4 if alike else [random.randrange(2**32) for _ in range(4)]
    middle: list[Value] = []
    for seed in seeds[: random.randint(2, 4)]:
        for number, branch in enumerate(branches):
            b.random = Random(f"{seed}/{number}")  # the same spelling for each
            x = _half(b, x, branch, style)
            middle.append(x)
        b.random = random
    x = normalization(b, x) if style == "pre" and b.chance(0.7) else x
    y = linear(b, x, b.random.choice([b.width, 10])) if b.chance(0.8) else b.op("Tanh", [x])
    outputs = [y, b.random.choice(middle)] if b.chance(0.1) else [y]
    return list(dict.fromkeys(outputs))


def _half(b: Builder, x: Value, branch: Branch, style: str) -> Value:
    y = branch(b, normalization(b, x) if style == "pre" else x)
    if b.chance(0.08):  # a scale a channel
        y = b.op("Mul", [y, b.weight(b.width, scale=1.0)])
    if b.chance(0.08):
        y = b.op("Dropout", [y])
    if b.chance(0.08):
        return residual(b, x, y)
    if style == "post" and b.chance(0.3):
        inputs = [x, y, b.weight(b.width, scale=1.0), b.weight(b.width, scale=0.5)]
        inputs += [b.weight(b.width, scale=0.5)] if b.chance(0.5) else []
        return b.op("SkipLayerNormalization", inputs, x.shape, domain="com.microsoft", epsilon=1e-5)
    total = b.op("Add", swap(b, x, y), x.shape)
    return normalization(b, total) if style == "post" else total


def _attention(b: Builder, x: Value) -> Value:
    return _product(b, attend(b, x, b.random.choice([2, 4])), b.width)


def _feed_forward(b: Builder, x: Value) -> Value:
    hidden, kind = b.random.choice([2, 3, 4]) * b.width, b.random.choice(["plain", "plain", "gated", "joined"])
    if kind == "gated":
        return gated(b, x)
    if kind == "plain":
        return _product(b, _activation(b, _product(b, x, hidden)), b.width)
    joined = _product(b, x, 2 * hidden)
    parts = [Value(b.fresh(name), x.dtype, (*x.shape[:-1], hidden)) for name in ("gate", "up")]
    if b.opset >= 13:
        b.node("Split", [joined, b.ints(hidden, hidden)], parts, axis=-1)
    else:
        b.node("Split", [joined], parts, axis=-1, split=[hidden, hidden])
    return _product(b, b.op("Mul", swap(b, _activation(b, parts[0]), parts[1])), b.width)


def _product(b: Builder, x: Value, out: int) -> Value:
    """A product with a bias or without; now and then one of the spellings that are nearly such."""
    if b.chance(0.15):
        return linear(b, x, out)
    shape = (*x.shape[:-1], out)
    y = b.op("MatMul", [x, b.weight(int(x.shape[-1]), out)], shape)
    return b.op("Add", swap(b, y, b.weight(out, scale=0.5)), shape) if b.chance(0.6) else y


def _activation(b: Builder, x: Value) -> Value:
    kind = b.random.choice(["operator", "operator", "spelled", "fused", "new"])
    if kind == "new" and b.opset >= 20:
        return b.op("Gelu", [x])
    if kind == "fused":
        return b.op(b.random.choice(_FUSED), [x], domain="com.microsoft")
    return gelu(b, x) if kind == "spelled" else b.op(b.random.choice(_ACTIVATIONS), [x])


def _convolutions(b: Builder) -> Value:
    """A residual network."""
    channels, size, random = b.random.choice([8, 12]), 6, b.random
    shape = ("n", channels, size, size)
    x = b.op("Conv", [b.input(("n", 3, size, size)), b.weight(channels, 3, 3, 3, scale=0.3)], shape, pads=[1] * 4)
    seed = random.randrange(2**32)
    for _ in range(random.randint(2, 4)):
        b.random = Random(seed)
        inner = b.random.choice([channels, 2 * channels])
        y = x
        for out in (inner, channels):
            inputs = [y, b.weight(out, int(y.shape[1]), 3, 3, scale=0.15)]
            inputs += [b.weight(out, scale=0.3)] if b.chance(0.5) else []
            y = b.op("Conv", inputs, ("n", out, size, size), pads=[1] * 4)
            y = batch_norm(b, y) if b.chance(0.5) else y
            y = b.op(b.random.choice(["Relu", "Sigmoid", "LeakyRelu"]), [y]) if out != channels or b.chance(0.3) else y
        x = b.op("Add", swap(b, x, y), shape)
        x = b.op("Relu", [x]) if b.chance(0.6) else x
        b.random = random
    pooled = b.op("Flatten", [b.op("GlobalAveragePool", [x], ("n", channels, 1, 1))], ("n", channels))
    return b.op("Gemm", [pooled, b.weight(channels, 5), b.weight(5, scale=0.5)], ("n", 5))
