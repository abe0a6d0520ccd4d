"""Attention without a cache: written out or as operators, masked, grouped, rotated; and If and Loop around parts."""

from __future__ import annotations

from random import Random

import numpy as np

from .builder import Builder, Value
from .operators import Step, unary
from .patterns import feed_forward, gated, gelu, linear, normalization, residual, void

LOW = float(np.finfo(np.float32).min)


def attention(b: Builder, x: Value | None = None) -> Value:
    """Projections, heads, scores, mask, softmax, merge, product."""
    x = x or b.stream()
    heads = b.random.choice([1, 2, 4])
    y = attend(b, normalization(b, x) if b.chance(0.3) else x, heads)
    y = linear(b, y, b.width) if b.chance(0.7) else y
    return residual(b, x, y) if b.chance(0.6) else y


def attend(b: Builder, x: Value, heads: int) -> Value:
    """Projections of ``x``, heads, scores, mask, softmax, merge."""
    q, k, v = _projections(b, x)
    if b.opset >= 23 and b.chance(0.15):
        return b.op("Attention", [q, k, v], x.shape, q_num_heads=heads, kv_num_heads=heads)
    if b.chance(0.1):
        return b.op("MultiHeadAttention", [q, k, v], x.shape, domain="com.microsoft", num_heads=heads)
    return _written_out(b, q, k, v, heads, b.width // heads)


def _projections(b: Builder, x: Value) -> list[Value]:
    if b.chance(0.2):  # one product, split
        joined = b.op("MatMul", [x, b.weight(b.width, 3 * b.width)], (*x.shape[:-1], 3 * b.width))
        parts = [Value(b.fresh(name), x.dtype, x.shape) for name in ("q", "k", "v")]
        if b.opset >= 13:
            b.node("Split", [joined, b.ints(*[b.width] * 3)], parts, axis=-1)
        else:
            b.node("Split", [joined], parts, axis=-1, split=[b.width] * 3)
        return parts
    biased = b.chance(0.5)
    found: list[Value] = []
    for _ in "qkv":
        y = b.op("MatMul", [x, b.weight(b.width, b.width)], x.shape)
        found.append(b.op("Add", [y, b.weight(b.width, scale=0.5)]) if biased and b.chance(0.95) else y)
    return found


def _heads(b: Builder, x: Value, heads: int, size: int, perm: list[int]) -> Value:
    target = b.ints(0, b.random.choice([0, -1]), heads, size) if b.chance(0.95) else b.ints(0, 0, heads, -1)
    y = b.op("Reshape", [x, target], (x.shape[0], x.shape[1], heads, size))
    return b.op("Transpose", [y], tuple(y.shape[axis] for axis in perm), perm=perm)


def _written_out(b: Builder, q: Value, k: Value, v: Value, heads: int, size: int) -> Value:
    n, s = q.shape[:2]
    q4 = _heads(b, q, heads, size, [0, 2, 1, 3])
    v4 = _heads(b, v, heads, size, [0, 2, 1, 3])
    if size % 2 == 0 and b.chance(0.25):
        k4 = _heads(b, k, heads, size, [0, 2, 1, 3])
        q4, k4 = rotate(b, [q4, k4], size)
        kt = b.op("Transpose", [k4], (n, heads, size, s), perm=[0, 1, 3, 2])
    else:
        kt = _heads(b, k, heads, size, [0, 2, 3, 1])
    scale = b.number(size**-0.5, q)
    place = b.random.choice(["scores", "divide", "q", "none"])
    if place == "q":
        q4 = b.op("Mul", [q4, scale])
    scores = b.op("MatMul", [q4, kt], (n, heads, s, s))
    if place == "scores":
        scores = b.op("Mul", [scores, scale])
    elif place == "divide":
        scores = b.op("Div", [scores, b.number(size**0.5, q)])
    scores = _masked(b, scores)
    probabilities = b.op("Softmax", [scores], axis=-1 if not b.chance(0.04) or b.opset < 13 else 2)
    if b.chance(0.1):
        probabilities = b.op("Dropout", [probabilities])
    c = b.op("MatMul", [probabilities, v4], (n, heads, s, size))
    c = b.op("Transpose", [c], (n, s, heads, size), perm=[0, 2, 1, 3])
    return b.op("Reshape", [c, b.ints(0, b.random.choice([0, -1]), heads * size)], (n, s, heads * size))


def _masked(b: Builder, scores: Value) -> Value:
    kind = b.random.choice(["none", "none", "padding", "input", "causal"])
    if kind == "none":
        return scores
    if kind == "input":
        return b.op("Add", [scores, b.input(("n", 1, "s", "s"), name=b.fresh("bias"))])
    low = b.constant(np.float32(b.random.choice([LOW, -10000.0])))
    if kind == "padding":
        flags = b.flags or b.input(("n", "s"), "int64", b.fresh("mask"))
        axes = [1, 2]
        if b.opset >= 13:
            wide = b.op("Unsqueeze", [flags, b.ints(*axes)], ("n", 1, 1, "s"))
        else:
            wide = b.op("Unsqueeze", [flags], ("n", 1, 1, "s"), axes=axes)
        kept = b.op("Cast", [wide], None, "float32", to=1)
        away = b.op("Sub", [b.constant(np.float32(1)), kept], kept.shape)
        return b.op("Add", [scores, b.op("Mul", [away, low])])
    length = b.op("Shape", [scores], (4,), "int64")
    last = b.op("Gather", [length, b.constant(np.array(3), "int64")], (), "int64", axis=0)
    zero, one = b.constant(np.array(0), "int64"), b.constant(np.array(1), "int64")
    places = b.op("Range", [zero, last, one], ("s",), "int64")
    if b.opset >= 13:
        column = b.op("Unsqueeze", [places, b.ints(1)], ("s", 1))
    else:
        column = b.op("Unsqueeze", [places], ("s", 1), axes=[1])
    later = b.op("Greater", [places, column], ("s", "s"), "bool")
    return b.op("Where", [later, low, scores], scores.shape, "float32")


def rotate(b: Builder, parts: list[Value], size: int) -> list[Value]:
    """Half-rotated rotary embedding of [n, heads, s, size] with angles from a Range."""
    length = b.op("Shape", [parts[0]], (4,), "int64")
    last = b.op("Gather", [length, b.constant(np.array(2), "int64")], (), "int64", axis=0)
    zero, one = b.constant(np.array(0), "int64"), b.constant(np.array(1), "int64")
    places = b.op("Cast", [b.op("Range", [zero, last, one], ("s",), "int64")], None, "float32", to=1)
    if b.opset >= 13:
        column = b.op("Unsqueeze", [places, b.ints(1)], ("s", 1))
    else:
        column = b.op("Unsqueeze", [places], ("s", 1), axes=[1])
    half = size // 2
    speeds = b.constant((100.0 ** (-np.arange(half) / half)).astype(np.float32))
    angles = b.op("Mul", [column, speeds], ("s", half))
    full = b.op("Concat", [angles, angles], ("s", size), axis=-1)
    cos, sin = b.op("Cos", [full]), b.op("Sin", [full])
    results: list[Value] = []
    for x in parts:
        shape = (*x.shape[:-1], half)
        first = b.op("Slice", [x, b.ints(0), b.ints(half), b.ints(3)], shape)
        second = b.op("Slice", [x, b.ints(half), b.ints(2**31 - 1), b.ints(3)], shape)
        turned = b.op("Concat", [b.op("Neg", [second]), first], x.shape, axis=-1)
        results.append(b.op("Add", [b.op("Mul", [x, cos]), b.op("Mul", [turned, sin])]))
    return results


def branch(b: Builder) -> None:
    """If, both branches of which work on values of the outer graph."""
    x = b.stream() if b.chance(0.6) else b.rows()
    take = b.input((), "bool", b.fresh("take")) if not b.depth else b.constant(np.array(True))

    def fill() -> list[Value]:
        y = b.random.choice([gelu, normalization, _mixed, _mixed])(b, x)
        return [b.op("Relu", [y]) if b.chance(0.5) else y]

    then, other = b.body(fill), b.body(fill)
    b.op("If", [take], x.shape, x.dtype, then_branch=then, else_branch=other)


def _mixed(b: Builder, x: Value) -> Value:
    """Something of the shape of ``x`` that also reads other values of the outer graph and constants of its own."""
    y = b.op("Tanh", [x])
    for _ in range(b.random.randint(1, 3)):
        unary(b)
    y = b.op("Mul", [y, b.weight(int(x.shape[-1]), scale=1.0)])
    return b.op("Add", [y, b.op("Identity", [x])]) if b.chance(0.7) else linear(b, y, int(x.shape[-1]))


def loop(b: Builder) -> None:
    """Loop with a carried value and outer values in its body."""
    x = b.rows()
    step, go = Value(b.fresh("step"), "int64", ()), Value(b.fresh("go"), "bool", ())
    carried = Value(b.fresh("carried"), x.dtype, x.shape)

    def fill() -> list[Value]:
        y = b.random.choice([_mixed, gelu])(b, carried)
        factor = b.op("Cast", [step], None, "float32", to=1)
        y = b.op("Add", [b.op("Tanh", [y]), factor])
        return [b.op("Identity", [go]), y]

    body = b.body(fill, [step, go, carried])
    times, always = b.constant(np.array(b.random.choice([1, 2, 3])), "int64"), b.constant(np.array(True))
    b.op("Loop", [times, always, x], x.shape, x.dtype, body=body)


def blocks(b: Builder) -> None:
    """The same block several times, as transformers have it."""
    x, seed, random = b.stream(), b.random.randrange(2**32), b.random
    for _ in range(random.randint(2, 3)):
        b.random = Random(seed)  # the same spelling for each
        x = attention(b, x) if seed % 4 else x
        x = feed_forward(b, x) if seed % 3 else gated(b, x)
    b.random = random


ATTENTION: dict[Step, int] = {lambda b: void(attention(b)): 4, blocks: 1}
CONTROL: dict[Step, int] = {branch: 2, loop: 1}
