"""Single operators with valid operands. Each step adds one or a few nodes to a builder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .builder import FLOATS, Builder, NoSuchValue, Shape, Value, broadcast

Step = Callable[[Builder], None]
_NUMBERS = (*FLOATS, "int64", "int32")
_UNARY = [
    "Abs",
    "Neg",
    "Relu",
    "LeakyRelu",
    "Elu",
    "Selu",
    "Sigmoid",
    "Tanh",
    "Erf",
    "Floor",
    "Ceil",
    "Round",
    "Sign",
    "Sin",
    "Cos",
    "Atan",
    "Softplus",
    "Softsign",
    "HardSigmoid",
    "Identity",
    "Identity",
]
_UNARY_SINCE = {"Celu": 12, "HardSwish": 14, "Mish": 18, "Gelu": 20}
_REDUCTIONS = [
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceSumSquare",
    "ReduceL2",
    "ReduceL1",
    "ReduceProd",
    "ReduceSum",
    "ReduceSum",
]


def unary(b: Builder) -> None:
    """One input, the same shape."""
    since = [op for op, version in _UNARY_SINCE.items() if b.opset >= version]
    op = b.random.choice([*_UNARY, *since])
    x = b.pick(dtype=_NUMBERS if op in ("Abs", "Neg", "Identity", "Relu") else FLOATS)
    if op == "Relu" and x.dtype.startswith("int"):
        op = "Neg"
    b.op(op, [x])


def bounded(b: Builder) -> None:
    """Operators with a limited domain, in front of which the domain is made sure of."""
    x = b.pick()
    op = b.random.choice(["Exp", "Log", "Sqrt", "Reciprocal", "Asin", "Atanh", "Pow"])
    if op == "Exp":
        b.op("Exp", [b.op("Tanh", [x])])
    elif op in ("Asin", "Atanh"):
        b.op(op, [b.op("Mul", [b.op("Tanh", [x]), b.number(0.9, x)])])
    elif op == "Pow":
        b.op("Pow", [b.op("Tanh", [x]), b.number(b.random.choice([2.0, 3.0, 1.0]), x)])
    else:
        b.op(op, [b.op("Add", [b.op("Abs", [x]), b.number(b.random.choice([1.0, 1e-3]), x)])])


def clip(b: Builder) -> None:
    """Clip with both bounds, one or none."""
    x = b.pick(dtype=("float32", "float64", "int64"))
    low, high = b.constant(np.array(-1), x.dtype), b.constant(np.array(2), x.dtype)
    b.op("Clip", b.random.choice([[x, low, high], [x, low], [x, None, high], [x]]))


def _pair(b: Builder, dtypes: tuple[str, ...]) -> tuple[Value, Value, Shape]:
    x = b.pick(dtype=dtypes)
    if b.chance(0.35) and x.dtype != "bool":
        y = b.number(b.random.choice([0.0, 1.0, 1.0, 2.0, -1.0, 3.0]), x)
    elif b.chance(0.3) and x.dtype == "float32" and x.shape and isinstance(x.shape[-1], int):
        y = b.weight(x.shape[-1], scale=1.0)
    else:
        y = b.pick(dtype=x.dtype, where=lambda value: broadcast(x.shape, value.shape) is not None)
    shape = broadcast(x.shape, y.shape)
    if shape is None:
        raise NoSuchValue
    return (y, x, shape) if b.chance(0.3) else (x, y, shape)


def binary(b: Builder) -> None:
    """Arithmetic of two values, with broadcasting."""
    op = b.random.choice(["Add", "Add", "Mul", "Mul", "Sub", "Max", "Min", "Sum", "Mean", "Div", "Pow", "Mod"])
    x, y, shape = _pair(b, ("float32",) if op in ("Sum", "Mean", "Div", "Pow", "Mod") else _NUMBERS)
    if op in ("Max", "Min") and x.dtype == "float16":
        op = "Add"
    if op == "Div":
        y = b.op("Add", [b.op("Abs", [y]), b.number(1.0, y)]) if b.chance(0.8) else y
    if op == "Pow":
        x, y = b.op("Abs", [b.op("Tanh", [x])]), b.op("Tanh", [y])
    b.op(op, [x, y], shape, **({"fmod": 1} if op == "Mod" else {}))


def integer_division(b: Builder) -> None:
    """Div and Mod of whole numbers, as index arithmetic has them."""
    x = b.pick(dtype=("int64", "int32"))
    b.op(b.random.choice(["Div", "Mod", "Mul"]), [x, b.number(b.random.choice([1, 2, 3]), x)])


def comparison(b: Builder) -> None:
    """Comparisons and logic, and Where upon them."""
    op = b.random.choice(["Less", "Greater", "Equal", "LessOrEqual", "GreaterOrEqual"])
    if op.endswith("OrEqual") and b.opset < 12:
        op = "Less"
    x, y, shape = _pair(b, ("float32", "int64"))
    flag = b.op(op, [x, y], shape, "bool")
    if b.chance(0.3):
        flag = b.op("Not", [flag])
    if b.chance(0.3):
        other = b.pick(dtype="bool", where=lambda value: broadcast(shape, value.shape) == shape)
        flag = b.op(b.random.choice(["And", "Or", "Xor"]), [flag, other], shape)
    if b.chance(0.6):
        yes = b.number(b.random.choice([0.0, 1.0, -1e9]), x) if b.chance(0.5) else y
        full = broadcast(broadcast(shape, x.shape) or shape, yes.shape)
        if full is not None:
            b.op("Where", [flag, yes, x] if b.chance(0.5) else [flag, x, yes], full, x.dtype)


def special(b: Builder) -> None:
    """NaN and infinity, on purpose."""
    x = b.pick()
    bad = b.op("Log", [x]) if b.chance(0.5) else b.op("Div", [x, b.op("Relu", [x])])
    flag = b.op(b.random.choice(["IsNaN", "IsInf"]), [bad], None, "bool")
    b.op("Where", [flag, b.number(0.0, bad), bad], None, "float32")


def cast(b: Builder) -> None:
    """Casts, there and back again, lossless or not."""
    x = b.pick(dtype=("float32", "float32", "int64", "int32", "bool", "float16", "float64"))
    targets = {"float32": ["float32", "float64", "float16", "bool"], "bool": ["float32", "int64", "int32"]}
    target = b.random.choice(targets.get(x.dtype, ["float32", "float64", "int64"]))
    y = _cast(b, x, target)
    if b.chance(0.6):
        _cast(b, y, x.dtype if b.chance(0.7) else "float32")


def _cast(b: Builder, x: Value, target: str) -> Value:
    if b.opset >= 15 and b.chance(0.2):
        return b.op("CastLike", [x, b.constant(np.zeros(1), target)], None, target)
    code = {"float32": 1, "float16": 10, "float64": 11, "int64": 7, "int32": 6, "bool": 9}[target]
    return b.op("Cast", [x], None, target, to=code)


def reduction(b: Builder) -> None:
    """Reductions, with axes as attribute or input as the opset wants it."""
    op = b.random.choice(_REDUCTIONS)
    x = b.pick(dtype=("float32", "float64", "int64") if op in ("ReduceSum", "ReduceMax", "ReduceMean") else "float32")
    if not x.shape:
        raise NoSuchValue
    axis, keep = b.random.randrange(len(x.shape)), int(b.chance(0.6))
    if isinstance(x.shape[axis], str):  # reducing nothing is an error of its own
        axis = len(x.shape) - 1
    shape = (*x.shape[:axis], *((1,) if keep else ()), *x.shape[axis + 1 :])
    given = axis - len(x.shape) if b.chance(0.5) else axis
    if b.opset >= (13 if op == "ReduceSum" else 18):
        b.op(op, [x, b.ints(given)], shape, keepdims=keep)
    else:
        b.op(op, [x], shape, axes=[given], keepdims=keep)


def softmax(b: Builder) -> None:
    """Softmax and its relatives, ArgMax, CumSum, TopK."""
    x = b.pick(rank=(1, 2, 3, 4))
    op = b.random.choice(["Softmax", "Softmax", "LogSoftmax", "Hardmax", "ArgMax", "CumSum", "TopK", "LpNormalization"])
    last = x.shape[-1]
    if op == "ArgMax":
        b.op("ArgMax", [x], (*x.shape[:-1], 1), "int64", axis=-1)
    elif op == "CumSum":
        b.op("CumSum", [x, b.constant(np.array(-1), "int64")])
    elif op == "TopK":
        if not isinstance(last, int) or last < 3:
            raise NoSuchValue
        shape = (*x.shape[:-1], 2)
        b.node("TopK", [x, b.ints(2)], [Value(b.fresh("top"), x.dtype, shape), Value(b.fresh("at"), "int64", shape)])
    else:
        b.op(op, [x], axis=-1 if b.chance(0.8) or op == "LpNormalization" else len(x.shape) - 1)


def matmul(b: Builder) -> None:
    """MatMul, Gemm, Einsum with a constant, or of two values."""
    if b.chance(0.3):
        x = b.pick(rank=3)
        if b.opset >= 12 and b.chance(0.4):
            b.op("Einsum", [x, x], (x.shape[0], x.shape[1], x.shape[1]), equation="bij,bkj->bik")
        else:
            other = b.op("Transpose", [x], (x.shape[0], x.shape[2], x.shape[1]), perm=[0, 2, 1])
            b.op("MatMul", [x, other], (x.shape[0], x.shape[1], x.shape[1]))
        return
    x = b.rows()
    inner, out = int(x.shape[1]), b.random.choice([4, b.width])
    shape = (x.shape[0], out)
    bias = b.random.choice([b.weight(out, scale=0.5), b.weight(1, out, scale=0.5), None, b.constant(np.float32(0.5))])
    turned = b.chance(0.5)
    w = b.weight(out, inner) if turned else b.weight(inner, out)
    scale = b.random.choice([{}, {"alpha": 0.5}, {"alpha": 2.0, "beta": 0.25}])
    b.op("Gemm", [x, w] if bias is None else [x, w, bias], shape, transB=int(turned), **scale)


def convolution(b: Builder) -> None:
    """Images: Conv, ConvTranspose, pools, BatchNormalization, DepthToSpace."""
    x = image(b)
    channels, size = int(x.shape[1]), int(x.shape[2])
    op = b.random.choice(["Conv", "Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "BatchNormalization", "LRN"])
    if op == "Conv":
        group = b.random.choice([1, channels])
        out = b.random.choice([4, 8]) if group == 1 else channels
        w = b.weight(out, channels // group, 3, 3, scale=0.3)
        inputs = [x, w, b.weight(out, scale=0.3)] if b.chance(0.5) else [x, w]
        b.op("Conv", inputs, (x.shape[0], out, size, size), pads=[1, 1, 1, 1], group=group)
    elif op == "GlobalAveragePool":
        b.op(op, [x], (x.shape[0], channels, 1, 1))
    elif op == "BatchNormalization":
        batch_norm(b, x)
    elif op == "LRN":
        b.op(op, [x], size=3)
    elif size >= 4:
        b.op(op, [x], (x.shape[0], channels, size // 2, size // 2), kernel_shape=[2, 2], strides=[2, 2])


def image(b: Builder) -> Value:
    """A value [n, channels, size, size]."""
    try:
        return b.pick(
            rank=4, where=lambda v: all(isinstance(d, int) and d > 1 for d in v.shape[1:]) and v.shape[1] <= 8
        )
    except NoSuchValue:
        return b.input(("n", 4, 8, 8))


def batch_norm(b: Builder, x: Value) -> Value:
    """BatchNormalization over channels with positive variances."""
    channels = int(x.shape[1])
    variance = b.constant(np.abs(b.normal(channels)) + 0.5)
    parts = [b.weight(channels, scale=1.0), b.weight(channels, scale=0.5), b.weight(channels, scale=0.5), variance]
    return b.op("BatchNormalization", [x, *parts], epsilon=b.random.choice([1e-5, 1e-3]))


def quantized(b: Builder) -> None:
    """A Q/DQ pair, or DynamicQuantizeLinear and back."""
    x = b.pick()
    scale = b.constant(np.float32(b.random.choice([0.05, 0.1])))
    if b.chance(0.3):
        q, s, z = (
            Value(b.fresh("q"), "uint8", x.shape),
            Value(b.fresh("s"), "float32", ()),
            Value(b.fresh("z"), "uint8", ()),
        )
        b.node("DynamicQuantizeLinear", [x], [q, s, z])
        b.op("DequantizeLinear", [q, s, z], x.shape, "float32")
        return
    zero = b.constant(np.array(b.random.choice([0, 3])), b.random.choice(["uint8", "int8"]))
    q = b.op("QuantizeLinear", [x, scale, zero], None, zero.dtype)
    b.op("DequantizeLinear", [q, scale, zero], None, "float32")


OPERATORS: dict[Step, int] = {
    unary: 4,
    bounded: 2,
    clip: 1,
    binary: 5,
    integer_division: 1,
    comparison: 2,
    special: 1,
    cast: 2,
    reduction: 2,
    softmax: 2,
    matmul: 2,
    convolution: 2,
    quantized: 1,
}
