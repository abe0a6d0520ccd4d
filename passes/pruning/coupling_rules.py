"""What operators link and freeze (``coupling.py``): elementwise, products, convolutions, normalizations, reductions."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from ...compiler.graph import MICROSOFT, attribute, constant, integers, opset
from ..symbolic_dims import ONE
from .attention_rules import ATTENTION_RULES
from .coupling import Coupling
from .moving_rules import MOVING_RULES
from .units import Place

Rule = Callable[[Coupling, ir.Node], None]

_ELEMENTWISE = """Abs Acos Acosh Add And Asin Asinh Atan Atanh BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike
    Ceil Celu Clip Cos Cosh Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish
    Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu
    Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor"""
_CONTRIB_ELEMENTWISE = "BiasGelu FastGelu Gelu QuickGelu"
_POOLS = "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool"
_REDUCTIONS = """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare"""


def coupling_of(model: ir.Model, caches: Collection[str] = ()) -> Coupling:
    """The coupling of ``model`` with all operators known here; ``caches`` as in ``Coupling``."""
    return Coupling(model, RULES, caches)


def broadcast(c: Coupling, node: ir.Node) -> None:
    """Axes of one index mean the same, counted from the last; axes of size 1 are repeated."""
    places = [place for index in range(len(node.inputs)) if (place := c.operand(node, index)) is not None]
    outputs = [place for index in range(len(node.outputs)) if (place := c.result(node, index)) is not None]
    for out in outputs:
        for axis in range(out.rank):
            aligned = [(p, axis - out.rank + p.rank) for p in places if axis - out.rank + p.rank >= 0]
            for place, index in aligned:
                if place.dim(index) != ONE:
                    c.link_axes(place, index, out, axis)


def _softmax(c: Coupling, node: ir.Node) -> None:
    x, out = c.operand(node, 0), c.result(node)
    if x is None or out is None:
        return
    first = attribute(node, "axis", -1 if opset(c.model) >= 13 else 1) % x.rank
    for axis in range(x.rank):
        inside = axis == first if opset(c.model) >= 13 else axis >= first
        c.link_axes(x, axis, out, axis)
        if inside:
            c.freeze_axis(x, axis, f"{node.op_type} {node.name} normalizes over it")


def _normalization(c: Coupling, node: ir.Node) -> None:
    """LayerNormalization and its relatives: the leading axes pass, those that are normalized stay."""
    x = c.operand(node, 0)
    if x is None:
        return
    first = (attribute(node, "axis", -1) if not node.op_type.startswith("Skip") else -1) % x.rank
    places = [c.operand(node, index) for index in range(1, len(node.inputs))]
    places += [c.result(node, index) for index in range(len(node.outputs))]
    reason = f"{node.op_type} {node.name} normalizes over it"
    for axis in range(first, x.rank):
        c.freeze_axis(x, axis, reason)
    for place in places:
        if place is None:
            continue
        same = place.rank == x.rank and place.reader is None
        for axis in range(place.rank):
            if same and axis < first:
                c.link_axes(x, axis, place, axis)
            else:
                c.freeze_axis(place, axis, reason)


def _batch_normalization(c: Coupling, node: ir.Node) -> None:
    x, out = c.operand(node, 0), c.result(node)
    if x is None or out is None:
        return
    for axis in range(x.rank):
        c.link_axes(x, axis, out, axis)
    for index in range(1, 5):
        place = c.operand(node, index)
        if place is not None:
            c.link_axes(x, 1, place, 0)


def _pool(c: Coupling, node: ir.Node) -> None:
    x, out = c.operand(node, 0), c.result(node)
    if x is None or out is None or len(node.outputs) > 1:
        c.freeze_node(node, f"{node.op_type} {node.name} has more than one output")
        return
    for axis in range(x.rank):
        if axis < 2:
            c.link_axes(x, axis, out, axis)
        else:
            c.freeze_axis(x, axis, f"{node.op_type} {node.name} pools over it")
            c.freeze_axis(out, axis, f"{node.op_type} {node.name} pools over it")


def _reduce(c: Coupling, node: ir.Node) -> None:
    x, out = c.operand(node, 0), c.result(node)
    if x is None or out is None:
        return
    given = integers(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else attribute(node, "axes")
    if given is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        c.freeze_node(node, f"{node.op_type} {node.name} finds its axes at run time")
        return
    none = not given and bool(attribute(node, "noop_with_empty_axes", 0))
    axes = {axis % x.rank for axis in given} if given else set[int]() if none else set(range(x.rank))
    rest = [axis for axis in range(x.rank) if axis not in axes]
    for axis in axes:
        c.freeze_axis(x, axis, f"{node.op_type} {node.name} reduces it")
    for number, axis in enumerate(rest):
        c.link_axes(x, axis, out, axis if attribute(node, "keepdims", 1) else number)


def _matmul(c: Coupling, node: ir.Node) -> None:
    a, b, out = c.operand(node, 0), c.operand(node, 1), c.result(node)
    if a is None or b is None or out is None or a.rank < 2 or b.rank < 2 or attribute(node, "transBatchA", 0):
        c.freeze_node(node, f"{node.op_type} {node.name} is not a product of matrices")
        return
    turned = [bool(attribute(node, name, 0)) for name in ("transA", "transB")]
    a_row, a_sum = (a.rank - 1, a.rank - 2) if turned[0] else (a.rank - 2, a.rank - 1)
    b_sum, b_column = (b.rank - 1, b.rank - 2) if turned[1] else (b.rank - 2, b.rank - 1)
    c.link_axes(a, a_row, out, out.rank - 2)
    c.link_axes(b, b_column, out, out.rank - 1)
    for place in (a, b):
        for axis in range(place.rank - 2):
            if place.dim(axis) != ONE:
                c.link_axes(place, axis, out, axis + out.rank - place.rank)
                c.mark(c.elements(place, axis), "heads")
    if node.domain:
        _no_layer(c, node, a, a_sum, b, b_sum)
    else:
        _contract(c, node, a, a_sum, b, b_sum, b_column)


def _no_layer(c: Coupling, node: ir.Node, a: Place, i: int, b: Place, j: int) -> None:
    c.link_axes(a, i, b, j)
    c.freeze_axis(a, i, f"{node.op_type} {node.name} is a product whose weight is not fitted here")


def _contract(c: Coupling, node: ir.Node, a: Place, i: int, b: Place, j: int, column: int) -> None:
    """The axis that a product sums over."""
    if b.value.is_initializer() and not b.value.is_graph_input():
        c.sum_over(node, a, i, b, j, column)
        return
    c.link_axes(a, i, b, j)
    c.freeze_axis(a, i, f"{node.op_type} {node.name} is a product of two activations, or of a weight computed first")


def _gemm(c: Coupling, node: ir.Node) -> None:
    a, b, bias, out = (c.operand(node, 0), c.operand(node, 1), c.operand(node, 2), c.result(node))
    if a is None or b is None or out is None:
        return
    row, total = (1, 0) if attribute(node, "transA", 0) else (0, 1)
    inner, column = (1, 0) if attribute(node, "transB", 0) else (0, 1)
    c.link_axes(a, row, out, 0)
    c.link_axes(b, column, out, 1)
    _contract(c, node, a, total, b, inner, column)
    for axis in range(bias.rank if bias is not None else 0):
        if bias is not None and bias.dim(axis) != ONE:
            c.link_axes(bias, axis, out, axis + 2 - bias.rank)


def _conv(c: Coupling, node: ir.Node) -> None:
    x, w, bias, out = (c.operand(node, 0), c.operand(node, 1), c.operand(node, 2), c.result(node))
    if x is None or w is None or out is None:
        return
    groups, channels = attribute(node, "group", 1), x.dim(1)
    reason = f"{node.op_type} {node.name} moves over it"
    for axis in range(2, x.rank):
        for place in (x, w, out):
            c.freeze_axis(place, axis, reason)
    c.link_axes(x, 0, out, 0)
    c.link_axes(w, 0, out, 1)
    if bias is not None:
        c.link_axes(bias, 0, out, 1)
    c.mark(c.elements(out, 1), "channels")
    c.mark(c.elements(x, 1), "channels")
    if groups == 1:
        _contract(c, node, x, 1, w, 1, 0)
    elif channels == (groups, ()) and w.dim(1) == ONE:  # depthwise, i makes m outputs
        each = len(c.elements(w, 0)) // groups
        c.link(c.elements(w, 0), np.repeat(c.elements(x, 1), each))
    else:
        for place, axis in ((x, 1), (w, 0), (w, 1)):
            c.freeze_axis(place, axis, f"{node.op_type} {node.name} has groups of several channels")


def _resize(c: Coupling, node: ir.Node) -> None:
    """Scales of 1 for batch and channels let these pass; sizes do not, as they would have to change."""
    x, out = c.operand(node, 0), c.result(node)
    scales = node.inputs[2] if len(node.inputs) > 2 else node.inputs[1] if node.op_type == "Upsample" else None
    values = constant(scales, limit=16)
    if x is None or out is None or values is None or len(values) != x.rank or attribute(node, "axes") is not None:
        c.freeze_node(node, f"{node.op_type} {node.name} has no constant scales")
        return
    for axis in range(x.rank):
        if values[axis] == 1:
            c.link_axes(x, axis, out, axis)
        else:
            c.freeze_axis(x, axis, f"{node.op_type} {node.name} resizes it")
            c.freeze_axis(out, axis, f"{node.op_type} {node.name} resizes it")


def _pad(c: Coupling, node: ir.Node) -> None:
    x, out = c.operand(node, 0), c.result(node)
    pads = integers(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "pads")
    if x is None or out is None or pads is None or len(pads) != 2 * x.rank:
        c.freeze_node(node, f"{node.op_type} {node.name} has no constant pads")
        return
    for axis in range(x.rank):
        if pads[axis] == pads[axis + x.rank] == 0:
            c.link_axes(x, axis, out, axis)
        else:
            c.freeze_axis(x, axis, f"{node.op_type} {node.name} pads it")
            c.freeze_axis(out, axis, f"{node.op_type} {node.name} pads it")


RULES: dict[tuple[str, str], Rule] = {
    **{("", op): broadcast for op in _ELEMENTWISE.split()},
    **{(MICROSOFT, op): broadcast for op in _CONTRIB_ELEMENTWISE.split()},
    **{("", op): _pool for op in _POOLS.split()},
    **{("", op): _reduce for op in _REDUCTIONS.split()},
    **{("", op): _softmax for op in ("Softmax", "LogSoftmax")},
    **{("", op): _normalization for op in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")},
    **{
        (MICROSOFT, op): _normalization
        for op in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization")
    },
    ("", "BatchNormalization"): _batch_normalization,
    ("", "MatMul"): _matmul,
    (MICROSOFT, "FusedMatMul"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "Conv"): _conv,
    ("", "Resize"): _resize,
    ("", "Upsample"): _resize,
    ("", "Pad"): _pad,
    **MOVING_RULES,
    **ATTENTION_RULES,
}
