"""Symbolic shapes: what exporters compute with Shape/Gather/Concat chains, followed to the dims they mean.

Dims nothing is known about get a symbol of their own, so that two values of the same origin still compare equal.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from ..compiler.graph import attribute, integers, subgraphs
from .symbolic_dims import CONTENT_RULES, ONE, Dim, Dims, divide, multiply, number, own_symbol

_SAME = """Abs BiasGelu Cast Clip Dropout Elu Erf Exp FastGelu Gelu HardSigmoid HardSwish Identity IsNaN
    LayerNormalization LeakyRelu Log LpNormalization Neg Not QuickGelu RMSNormalization Relu Round Sigmoid Sign
    SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization Softmax Softplus Sqrt Tanh
    MultiHeadAttention Reciprocal RotaryEmbedding"""
_BROADCAST = """Add And BitwiseAnd Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or Pow Sub
    Sum Where Xor"""
_REDUCE = "ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"


class SymbolicShapes:
    """Dims of every value of a model, found in one forward sweep over each graph (linear in its size).

    Args:
        model: the model; shape annotations are used where they are there, and derived from the operators elsewhere.
    """

    def __init__(self, model: ir.Model) -> None:
        self._dims: dict[ir.Value, Dims | None] = {}
        self._content: dict[ir.Value, Dims] = {}
        self._sweep(model.graph)

    def dims(self, value: ir.Value | None) -> Dims | None:
        """Symbolic shape of ``value``, or None if its rank is unknown."""
        if value is None:
            return None
        if value not in self._dims:  # an initializer or a graph input
            self._dims[value] = self._declared(value)
        return self._dims[value]

    def content(self, value: ir.Value | None) -> Dims | None:
        """The numbers inside a small integer tensor (a shape, a dim), or None if they are not known."""
        if value is None:
            return None
        if value not in self._content:
            found = integers(value)
            if found is None:
                return None
            self._content[value] = tuple(number(item) for item in found)
        return self._content[value]

    def _declared(self, value: ir.Value) -> Dims | None:
        if value.shape is None:
            return None
        return tuple(
            number(dim) if isinstance(dim, int) else (1, (dim.value or own_symbol(value, axis),))
            for axis, dim in enumerate(value.shape)
        )

    def _sweep(self, graph: ir.Graph) -> None:
        for node in graph:
            for body in subgraphs(node):
                self._sweep(body)
            content = self._content_of(node)
            if content is not None:
                self._content[node.outputs[0]] = content
            rule = _RULES.get(node.op_type) if node.domain in ("", "com.microsoft") else None
            for index, value in enumerate(node.outputs):
                derived = rule(self, node) if rule is not None and index == 0 else None
                self._dims[value] = self._join(value, derived)

    def _join(self, value: ir.Value, derived: Dims | None) -> Dims | None:
        """Numbers win over symbols, derived symbols over annotated ones (which shape inference may have invented)."""
        declared = self._declared(value)
        if derived is None or (declared is not None and len(declared) != len(derived)):
            return declared
        if declared is None:
            return derived
        return tuple(a if not a[1] or _invented(d, value) else d for a, d in zip(declared, derived, strict=True))

    def _content_of(self, node: ir.Node) -> Dims | None:
        rule = CONTENT_RULES.get(node.op_type) if not node.domain and len(node.outputs) == 1 else None
        if rule is None:
            return None
        if node.op_type == "Shape":
            dims = self.dims(node.inputs[0])
            return None if dims is None else dims[slice(attribute(node, "start", 0), attribute(node, "end"))]
        contents = [self.content(value) for value in node.inputs]
        known = [content for content in contents if content is not None]
        return rule(node, known) if len(known) == len(contents) else None


def _invented(derived: Dim, value: ir.Value) -> bool:
    """Whether a derived dim is only the opaque symbol of this very value, so that its annotation says more."""
    return any(name.startswith(f"{value.name}@") for name in derived[1])


def _same(shapes: SymbolicShapes, node: ir.Node) -> Dims | None:
    return shapes.dims(node.inputs[0])


def _broadcast(shapes: SymbolicShapes, node: ir.Node) -> Dims | None:
    parts = [shapes.dims(value) for value in node.inputs]
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        return None
    rank = max(len(part) for part in known)
    padded = [(ONE,) * (rank - len(part)) + part for part in known]
    result: list[Dim] = []
    for axis, column in enumerate(zip(*padded, strict=True)):
        different = {dim for dim in column if dim != ONE}
        numbers = {dim for dim in different if not dim[1]}
        if len(different) <= 1:
            result.append(next(iter(different), ONE))
        elif len(numbers) == 1:
            result.append(next(iter(numbers)))
        else:
            result.append((1, (own_symbol(node.outputs[0], axis),)))
    return tuple(result)


def _matmul(shapes: SymbolicShapes, node: ir.Node) -> Dims | None:
    left, right = shapes.dims(node.inputs[0]), shapes.dims(node.inputs[1])
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    if node.op_type == "Gemm":
        return (left[1 if attribute(node, "transA", 0) else 0], right[0 if attribute(node, "transB", 0) else 1])
    lead = left[:-2] if len(left) >= len(right) else right[:-2]
    return (*lead, left[-2], right[-1])


def _transpose(shapes: SymbolicShapes, node: ir.Node) -> Dims | None:
    dims = shapes.dims(node.inputs[0])
    if dims is None:
        return None
    perm = attribute(node, "perm")
    return tuple(dims[axis] for axis in perm) if perm is not None else tuple(reversed(dims))


def _reshape(shapes: SymbolicShapes, node: ir.Node) -> Dims | None:
    return reshaped(shapes.dims(node.inputs[0]), shapes.content(node.inputs[1]), bool(attribute(node, "allowzero", 0)))


def reshaped(source: Dims | None, target: Dims | None, allowzero: bool) -> Dims | None:
    """The shape that Reshape gives: zeros copied, -1 solved by exact symbolic division."""
    if target is None:
        return None
    dims = list(target)
    for axis, dim in enumerate(dims):
        if dim == (0, ()) and not allowzero:
            if source is None or axis >= len(source):
                return None
            dims[axis] = source[axis]
    if (-1, ()) in dims:
        hole = dims.index((-1, ()))
        if source is None:
            return None
        rest = divide(multiply(source), multiply([dim for axis, dim in enumerate(dims) if axis != hole]))
        if rest is None:
            return None
        dims[hole] = rest
    return tuple(dims)


def _unsqueeze(shapes: SymbolicShapes, node: ir.Node) -> Dims | None:
    dims = shapes.dims(node.inputs[0])
    axes = squeezed_axes(node)
    if dims is None or axes is None:
        return None
    rank = len(dims) + len(axes)
    new = {axis % rank for axis in axes}
    rest = iter(dims)
    return tuple(ONE if axis in new else next(rest) for axis in range(rank))


def _squeeze(shapes: SymbolicShapes, node: ir.Node) -> Dims | None:
    dims = shapes.dims(node.inputs[0])
    axes = squeezed_axes(node)
    if dims is None or axes is None:
        return None
    gone = {axis % len(dims) for axis in axes}
    return tuple(dim for axis, dim in enumerate(dims) if axis not in gone)


def squeezed_axes(node: ir.Node) -> list[int] | None:
    """The constant axes of Unsqueeze, Squeeze or a reduction, whatever the opset; None where they are not known."""
    if len(node.inputs) > 1:
        return integers(node.inputs[1])
    axes = attribute(node, "axes")
    return list(axes) if axes is not None else None


def _reduce(shapes: SymbolicShapes, node: ir.Node) -> Dims | None:
    dims = shapes.dims(node.inputs[0])
    axes = squeezed_axes(node)
    if dims is None or not axes:
        return None
    reduced = {axis % len(dims) for axis in axes}
    keep = attribute(node, "keepdims", 1)
    return tuple(ONE if axis in reduced else dim for axis, dim in enumerate(dims) if keep or axis not in reduced)


def _gather(shapes: SymbolicShapes, node: ir.Node) -> Dims | None:
    table, indices = shapes.dims(node.inputs[0]), shapes.dims(node.inputs[1])
    if table is None or indices is None:
        return None
    axis = attribute(node, "axis", 0) % len(table)
    return (*table[:axis], *indices, *table[axis + 1 :])


def _expand(shapes: SymbolicShapes, node: ir.Node) -> Dims | None:
    source, target = shapes.dims(node.inputs[0]), shapes.content(node.inputs[1])
    if source is None or target is None:
        return None
    rank = max(len(source), len(target))
    left, right = (ONE,) * (rank - len(source)) + source, (ONE,) * (rank - len(target)) + target
    return tuple(b if a == ONE else a for a, b in zip(left, right, strict=True))


def _range(shapes: SymbolicShapes, node: ir.Node) -> Dims | None:
    start, limit, step = (shapes.content(value) for value in node.inputs)
    return limit if start == (number(0),) and step == (ONE,) and limit is not None else None


def _attention(shapes: SymbolicShapes, node: ir.Node) -> Dims | None:
    if node.domain:
        return _packed_attention(shapes, node)
    query, value = shapes.dims(node.inputs[0]), shapes.dims(node.inputs[2])
    if query is None or value is None:
        return None
    if len(query) == 4:
        return (*query[:3], value[3])
    size = divide(value[2], number(attribute(node, "kv_num_heads", 1)))
    return None if size is None else (*query[:2], multiply([number(attribute(node, "q_num_heads", 1)), size]))


def _packed_attention(shapes: SymbolicShapes, node: ir.Node) -> Dims | None:
    """com.microsoft.Attention multiplies its input with [Wq | Wk | Wv] itself."""
    source, weight = shapes.dims(node.inputs[0]), shapes.dims(node.inputs[1])
    if source is None or weight is None:
        return None
    sizes = attribute(node, "qkv_hidden_sizes")
    return (*source[:2], number(sizes[2]) if sizes else number(weight[1][0] // 3))


def _group_query_attention(shapes: SymbolicShapes, node: ir.Node) -> Dims | None:
    query = shapes.dims(node.inputs[0])
    if query is None or node.inputs[1] is not None:
        return query
    heads, kv_heads = attribute(node, "num_heads", 1), attribute(node, "kv_num_heads", 1)
    return (*query[:2], number(query[2][0] * heads // (heads + 2 * kv_heads)))


_RULES: dict[str, Callable[[SymbolicShapes, ir.Node], Dims | None]] = {
    **dict.fromkeys(_SAME.split(), _same),
    **dict.fromkeys(_BROADCAST.split(), _broadcast),
    **dict.fromkeys(_REDUCE.split(), _reduce),
    "Attention": _attention,
    "GroupQueryAttention": _group_query_attention,
    "MatMul": _matmul,
    "Gemm": _matmul,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Gather": _gather,
    "Expand": _expand,
    "Range": _range,
    "ConstantOfShape": lambda shapes, node: shapes.content(node.inputs[0]),
}
