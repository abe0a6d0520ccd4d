"""Steps that move, cut, join and reshape; shape arithmetic as exporters write it; what constant folding finds."""

from __future__ import annotations

import numpy as np

from .builder import Builder, NoSuchValue, Value
from .operators import Step, unary

_END = (2**31 - 1, 2**63 - 1)


def transpose(b: Builder) -> None:
    """Transpose, alone or followed by its inverse or another."""
    x = b.pick(dtype=("float32", "int64"), rank=(2, 3, 4))
    for _ in range(b.random.choice([1, 2, 2])):
        perm = list(range(len(x.shape)))
        b.random.shuffle(perm)
        if b.chance(0.3):
            perm.reverse()
        x = b.op("Transpose", [x], tuple(x.shape[axis] for axis in perm), perm=perm)


def reshape(b: Builder) -> None:
    """Split or merge of the last axes: constant targets with 0 and -1, or computed by Shape, Gather, Concat."""
    x = b.pick(rank=(2, 3), where=lambda value: isinstance(value.shape[-1], int) and value.shape[-1] % 4 == 0)
    last = int(x.shape[-1])
    lead = x.shape[:-1]
    kind = b.random.choice(["split", "same", "flat", "dynamic", "flatten"])
    if kind == "split":
        target = [*(0 for _ in lead), b.random.choice([4, -1]), last // 4]
        y = b.op("Reshape", [x, b.ints(*target)], (*lead, 4, last // 4))
        if b.chance(0.5):
            b.op("Reshape", [y, b.ints(*(0 for _ in lead), b.random.choice([-1, last]))], x.shape)
    elif kind == "same":
        b.op("Reshape", [x, b.ints(*(0 for _ in x.shape))], x.shape)
    elif kind == "dynamic":
        y = b.op("Reshape", [x, _target(b, x, [4, last // 4])], (*lead, 4, last // 4))
        if b.chance(0.6):
            b.op("Reshape", [y, _target(b, x, [last])], x.shape)
    elif len(x.shape) == 3:
        merged = (f"{lead[0]}*{lead[1]}", last)
        flat = (
            b.op("Flatten", [x], merged, axis=2)
            if kind == "flatten"
            else b.op("Reshape", [x, b.ints(-1, last)], merged)
        )
        b.op("Reshape", [b.op("Relu", [flat]) if b.chance(0.5) else flat, _target(b, x, [last])], x.shape)


def _target(b: Builder, x: Value, tail: list[int]) -> Value:
    """The leading dims of ``x``, read from its Shape, and ``tail``."""
    parts: list[Value] = []
    shared = b.op("Shape", [x], (len(x.shape),), "int64")
    for axis in range(len(x.shape) - 1):
        source = shared if b.chance(0.7) else b.op("Shape", [x], (len(x.shape),), "int64")
        if b.opset >= 15 and b.chance(0.3):
            parts.append(b.op("Shape", [x], (1,), "int64", start=axis, end=axis + 1))
        elif b.chance(0.4):
            parts.append(b.op("Slice", [source, b.ints(axis), b.ints(axis + 1), b.ints(0)], (1,), "int64"))
        else:
            dim = b.op("Gather", [source, b.constant(np.array(axis), "int64")], (), "int64", axis=0)
            parts.append(_unsqueeze(b, dim, [0], (1,)))
    return b.op("Concat", [*parts, b.ints(*tail)], (len(x.shape) - 1 + len(tail),), "int64", axis=0)


def _unsqueeze(b: Builder, x: Value, axes: list[int], shape: tuple[int | str, ...]) -> Value:
    if b.opset >= 13:
        return b.op("Unsqueeze", [x, b.ints(*axes)], shape)
    return b.op("Unsqueeze", [x], shape, axes=axes)


def squeeze(b: Builder) -> None:
    """Unsqueeze, something in between or not, Squeeze."""
    x = b.pick(dtype=("float32", "int64", "bool"), rank=(0, 1, 2, 3))
    axis = b.random.randint(0, len(x.shape))
    y = _unsqueeze(b, x, [axis], (*x.shape[:axis], 1, *x.shape[axis:]))
    if b.chance(0.4) and x.dtype == "float32":
        y = b.op("Relu", [y])
    axis = axis - len(y.shape) if b.chance(0.3) else axis
    if b.opset >= 13:
        b.op("Squeeze", [y, b.ints(axis)], x.shape)
    else:
        b.op("Squeeze", [y], x.shape, axes=[axis])


def slicing(b: Builder) -> None:
    """Slice (also of nothing), Split and Concat again, Gather."""
    x = b.pick(rank=(2, 3), where=lambda value: isinstance(value.shape[-1], int) and value.shape[-1] % 2 == 0)
    last, axis = int(x.shape[-1]), len(x.shape) - 1
    half = (*x.shape[:-1], last // 2)
    kind = b.random.choice(["slice", "whole", "reversed", "split", "gather", "halves"])
    if kind == "slice":
        b.op("Slice", [x, b.ints(last // 2), b.ints(b.random.choice(_END)), b.ints(b.random.choice([axis, -1]))], half)
    elif kind == "whole":
        b.op("Slice", [x, b.ints(0), b.ints(b.random.choice([*_END, last])), b.ints(axis), b.ints(1)], x.shape)
    elif kind == "reversed":
        b.op("Slice", [x, b.ints(-1), b.ints(-(2**31)), b.ints(axis), b.ints(-1)], x.shape)
    elif kind == "gather":
        index = np.array([0, last - 1, -1]) if b.chance(0.5) else np.array(1)
        b.op("Gather", [x, b.constant(index, "int64")], (*x.shape[:-1], *index.shape), axis=axis)
    elif kind == "halves":
        ends = b.ints(last // 2)
        first = b.op("Slice", [x, b.ints(0), ends, b.ints(axis)], half)
        second = b.op("Slice", [x, ends, b.ints(_END[0]), b.ints(axis)], half)
        b.op("Concat", [b.op("Neg", [second]), first] if b.chance(0.7) else [first, second], x.shape, axis=axis)
    else:
        parts = [Value(b.fresh("part"), x.dtype, half) for _ in range(2)]
        if b.opset >= 13:
            b.node("Split", [x, b.ints(last // 2, last // 2)], parts, axis=axis)
        else:
            b.node("Split", [x], parts, axis=axis, split=[last // 2, last // 2])
        if b.chance(0.5):
            b.op("Concat", parts if b.chance(0.7) else parts[::-1], x.shape, axis=axis)


def joining(b: Builder) -> None:
    """Concat, Tile, Pad, Expand."""
    x = b.pick(rank=(2, 3), where=lambda value: isinstance(value.shape[-1], int))
    last, rank = int(x.shape[-1]), len(x.shape)
    kind = b.random.choice(["concat", "single", "tile", "pad", "expand", "expand ones", "expand shape"])
    if kind == "concat":
        b.op("Concat", [x, x], (*x.shape[:-1], 2 * last), axis=-1)
    elif kind == "single":
        b.op("Concat", [x], axis=0)
    elif kind == "tile":
        times = b.random.choice([1, 2])
        b.op("Tile", [x, b.ints(*(1,) * (rank - 1), times)], (*x.shape[:-1], times * last))
    elif kind == "pad":
        more = b.random.choice([0, 0, 1])
        pads = b.ints(*(0,) * (2 * rank - 1), more)
        inputs = [x, pads, b.constant(np.float32(0.5))] if b.chance(0.5) else [x, pads]
        b.op("Pad", inputs, (*x.shape[:-1], last + more), mode="constant")
    elif kind == "expand":
        y = _unsqueeze(b, x, [rank - 1], (*x.shape[:-1], 1, last))
        y = b.op("Expand", [y, b.ints(*(1,) * (rank - 1), 2, 1)], (*x.shape[:-1], 2, last))
        b.op("Reshape", [y, b.ints(*(0,) * (rank - 1), -1)], (*x.shape[:-1], 2 * last))
    elif kind == "expand ones":
        b.op("Expand", [x, b.ints(*(1,) * b.random.randint(1, rank))], x.shape)
    else:
        b.op("Expand", [x, b.op("Shape", [x], (rank,), "int64")], x.shape)


def nothing(b: Builder) -> None:
    """Nodes that do nothing."""
    x = b.pick()
    kind = b.random.choice(["dropout", "mul", "add", "div", "sub", "sum", "where"])
    if kind == "dropout":
        if b.opset >= 12 and b.chance(0.5):
            b.op("Dropout", [x, b.constant(np.float32(0.3)), b.constant(np.array(False))])
        else:
            b.op("Dropout", [x])
    elif kind == "sum":
        b.op(b.random.choice(["Sum", "Max", "Min", "Mean"]), [x])
    elif kind == "where":
        flag = b.constant(np.ones((1,) * len(x.shape), bool))
        b.op("Where", [flag, x, b.number(0.0, x)])
    else:
        op, number = {"mul": ("Mul", 1.0), "add": ("Add", 0.0), "div": ("Div", 1.0), "sub": ("Sub", 0.0)}[kind]
        operands = [x, b.number(number, x)]
        b.op(op, operands[::-1] if kind in ("mul", "add") and b.chance(0.4) else operands)


def constants(b: Builder) -> None:
    """Nodes over constants only."""
    kind = b.random.choice(["range", "fill", "eye", "add", "transpose", "onehot", "trilu", "cast", "table"])
    rows = b.random.choice([3, 4])
    if kind == "range":
        start, end, step = (b.constant(np.array(number), "int64") for number in (0, rows, 1))
        b.op("Range", [start, end, step], (rows,), "int64")
    elif kind == "fill":
        import onnx  # the attribute is a tensor

        filler = onnx.helper.make_tensor("value", 1, [1], [0.5])
        b.op("ConstantOfShape", [b.ints(rows, b.width)], (rows, b.width), "float32", value=filler)
    elif kind == "onehot":
        depth, values = b.constant(np.array(b.width), "int64"), b.constant(np.array([0.0, 2.0], np.float32))
        b.op("OneHot", [b.ints(1, 0, 3), depth, values], (3, b.width), "float32", axis=-1)
    elif kind == "trilu" and b.opset >= 14:
        b.op("Trilu", [b.weight(rows, b.width)], upper=int(b.chance(0.5)))
    elif kind == "cast":
        b.op("Cast", [b.weight(b.width, dtype=b.random.choice(["float16", "float64"]))], None, "float32", to=1)
    elif kind == "table":
        b.op("Gather", [b.weight(16, b.width), _ids(b)], ("n", "s", b.width), "float32", axis=0)
    elif kind == "eye":
        b.op("EyeLike", [b.weight(b.width, b.width)], (b.width, b.width))
    elif kind == "transpose":
        w = b.op("Transpose", [b.weight(b.width, b.width)], (b.width, b.width), perm=[1, 0])
        x = b.stream()
        b.op("MatMul", [x, w])
    else:
        b.op("Add", [b.op("Sqrt", [b.constant(np.full(b.width, 2.0, np.float32))]), b.weight(b.width)])


def _ids(b: Builder) -> Value:
    try:
        return b.pick(dtype="int64", shape=("n", "s"), where=lambda value: value.name.startswith("ids"))
    except NoSuchValue:
        return b.input(("n", "s"), "int64", b.fresh("ids"))


def spatial(b: Builder) -> None:
    """DepthToSpace and back, GatherElements, ScatterElements."""
    x = b.pick(rank=(2, 3), where=lambda value: isinstance(value.shape[-1], int) and value.shape[-1] >= 4)
    if b.chance(0.4):
        try:
            y = b.pick(rank=4, where=lambda v: isinstance(v.shape[1], int) and v.shape[1] % 4 == 0)
        except NoSuchValue:
            y = b.input(("n", 4, 8, 8))
        c, h, w = (int(dim) if isinstance(dim, int) else 0 for dim in y.shape[1:])
        if h and w:
            z = b.op("DepthToSpace", [y], (y.shape[0], c // 4, 2 * h, 2 * w), blocksize=2)
            b.op("SpaceToDepth", [z], y.shape, blocksize=2)
        return
    index = b.op("ArgMax", [x], (*x.shape[:-1], 1), "int64", axis=-1)
    picked = b.op("GatherElements", [x, index], index.shape, axis=-1)
    b.op("ScatterElements", [x, index, b.op("Neg", [picked])], x.shape, axis=-1)


def twice(b: Builder) -> None:
    """The same node again, as a common subexpression."""
    unary(b)
    node = b.nodes[-1]
    made = b.values[-1]
    sources = [value for value in b.values if value.name in node.input]
    attributes = {item.name: item for item in node.attribute}
    again = b.op(node.op_type, sources, made.shape, made.dtype)
    b.nodes[-1].attribute.extend(attributes.values())
    b.op(b.random.choice(["Add", "Mul"]), [made, again])


SHAPING: dict[Step, int] = {
    transpose: 2,
    reshape: 3,
    squeeze: 1,
    slicing: 2,
    joining: 2,
    nothing: 2,
    constants: 2,
    spatial: 1,
    twice: 1,
}
