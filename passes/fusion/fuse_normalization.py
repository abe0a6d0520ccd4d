"""LayerNormalization and RMSNormalization in all spellings, to one operator."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...compiler.base import Outcome, Pass, PassContext
from ...compiler.graph import (
    Names,
    add_initializer,
    all_nodes,
    attribute,
    constant,
    integers,
    is_op,
    is_scalar,
    make_node,
    opset,
    producer,
    rank,
    remove_dead,
    replace,
    scalar,
)
from ..matching import MORE_AXES, as_vector, grows_rank, next_node, other_operand, until_nothing_fires
from ..symbolic import SymbolicShapes

_LAYER_OPSET, _RMS_OPSET = 17, 23
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class _Refused(Exception):
    """Ends one match; the message is the reason, empty where there is nothing to report."""


@dataclasses.dataclass
class _Match:
    """``(x - mean?) / sqrt(variance + epsilon) * scale? + bias?``, parts found so far."""

    x: ir.Value
    centred: bool
    epsilon: float
    last: ir.Node
    nodes: list[ir.Node]
    scale: ir.Value | None = None
    bias: ir.Value | None = None


@dataclasses.dataclass(frozen=True)
class FuseNormalization(Pass):
    """Recognizes normalizations over the last axis, anchored at the mean of a square.

    1. ``d / sqrt(mean(d^2) + eps) * scale + bias`` with ``d = x - mean(x)`` -> LayerNormalization (opset >= 17).
    2. ``x / sqrt(mean(x^2) + eps) * scale`` -> RMSNormalization (opset >= 23).
    3. The square is Pow or Mul; the mean is ReduceMean, or a sum (ReduceSum, ReduceSumSquare) over the width; the root
       is Sqrt with Div, Sqrt with Reciprocal or 1/s and Mul, or Pow(-0.5) and Mul.
    4. Casts to float and back around the statistics (half-precision models) are the operators' own ``stash_type``.
    5. Scale and bias are vectors of the last axis; a missing scale is ones, a missing bias is left out. The scale may
       be multiplied to the inverse root first.

    Refused: other axes, dropped axes (keepdims=0), intermediates used elsewhere, opsets without the operator (run
    ``upgrade-opset`` first: ONNX Runtime also runs LayerNormalization below opset 17, and SimplifiedLayerNormalization
    as an ONNX operator, but such files are not valid ONNX; the latter is no faster than RMSNormalization).

    Pays on CPU and CUDA: one pass over memory instead of six to nine. Sources: Ba et al. 2016 (arXiv 1607.06450), Zhang
    and Sennrich 2019 (arXiv 1910.07467); ONNX operators LayerNormalization-17, RMSNormalization-23.
    """

    name: ClassVar[str] = "fuse-normalization"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        ready = sum(is_op(node, "LayerNormalization", "RMSNormalization") for node in all_nodes(model))
        if ready:
            outcome.notes.append(f"{ready} normalizations were there already")
        # What is fused may tell the shapes behind it.
        until_nothing_fires(outcome, lambda: self._round(model, context, outcome))
        return outcome

    def _round(self, model: ir.Model, context: PassContext, outcome: Outcome) -> None:
        anchors = [node for node in all_nodes(model) if _squared(node) is not None]
        if not anchors:
            return
        names, shapes = Names(model), SymbolicShapes(model)
        halves = _HALVES if context.device == "cuda" else _HALVES[:1]  # the CPU provider has no bfloat16 kernels
        for anchor in anchors:
            rule = "x / sqrt(mean(x^2) + eps) -> normalization"
            try:
                match = _find(anchor, shapes, halves)
                kind = "LayerNormalization" if match.centred else "RMSNormalization"
                needed = _LAYER_OPSET if match.centred else _RMS_OPSET
                if opset(model) < needed:
                    raise _Refused(f"{kind} needs opset {needed}, not {opset(model)}: run upgrade-opset first")
                self._write(kind, match, names, shapes)
                outcome.counts[kind] += 1
            except _Refused as refusal:
                if str(refusal):
                    outcome.refuse(anchor, rule, str(refusal))
        if outcome.changed:
            remove_dead(model)

    def _write(self, kind: str, match: _Match, names: Names, shapes: SymbolicShapes) -> None:
        graph, result = match.last.graph, match.last.outputs[0]
        if not isinstance(graph, ir.Graph):
            raise _Refused("it lies in a model-local function; inline functions first")
        base = names.fresh(f"{match.nodes[0].name}/{kind}")
        scale = match.scale
        if scale is None:
            width = _width(match.x, shapes)
            if width is None or match.x.dtype is None:
                raise _Refused("it has no scale, and the size of the last axis is unknown")
            scale = add_initializer(graph, names, f"{base}.ones", np.ones(width, match.x.dtype.numpy()))
        node = make_node(
            kind,
            [match.x, as_vector(scale, graph, names), *([as_vector(match.bias, graph, names)] if match.bias else [])],
            name=base,
            output=names.fresh(f"{result.name}_normalized"),
            like=result,
            attributes={"axis": -1, "epsilon": match.epsilon},
        )
        replace(match.last, [node], by=self.name, gone=[item for item in match.nodes if item is not match.last])


def _squared(node: ir.Node) -> ir.Value | None:
    """v for a mean or sum of ``Pow(v, 2)`` or ``Mul(v, v)``, and for ReduceSumSquare(v)."""
    if is_op(node, "ReduceSumSquare"):
        return node.inputs[0]
    square = producer(node.inputs[0], "Pow", "Mul") if is_op(node, "ReduceMean", "ReduceSum") else None
    if square is None:
        return None
    if is_op(square, "Pow"):
        return square.inputs[0] if is_scalar(square.inputs[1], 2.0) else None
    return square.inputs[0] if square.inputs[0] is square.inputs[1] else None


def _find(anchor: ir.Node, shapes: SymbolicShapes, halves: Sequence[ir.DataType]) -> _Match:
    value = _squared(anchor)
    square = producer(anchor.inputs[0])
    if value is None:
        raise _Refused("")
    nodes = [anchor] if square is None or is_op(anchor, "ReduceSumSquare") else [square, anchor]
    _over_last_axis(anchor, value)
    mean = anchor if is_op(anchor, "ReduceMean") else _divided_by_width(anchor, value, shapes, nodes)
    node, epsilon = _epsilon(mean, nodes)
    match = _Match(value, False, epsilon, node, nodes)
    _divide(match, shapes)
    difference = producer(value, "Sub")
    centre = producer(difference.inputs[1], "ReduceMean") if difference is not None else None
    if difference is not None and centre is not None and centre.inputs[0] is difference.inputs[0] is not None:
        _over_last_axis(centre, value)
        if {use.node for use in value.uses()} - {*nodes} or value.is_graph_output():
            raise _Refused("the centred input is also used elsewhere")
        match.centred, match.x = True, difference.inputs[0] or value
        nodes += [centre, difference]
    for item in nodes:
        if item is not match.last and item is not difference and next_node(item.outputs[0]) is None:
            raise _Refused(f"{item.op_type} {item.name} inside it is also used elsewhere")
    if match.scale is None:
        _absorb_casts(match, halves)
    _scale_and_bias(match, shapes)
    if grows_rank(match.x, match.last.outputs[0]):
        raise _Refused(MORE_AXES)
    return match


def _over_last_axis(reduce: ir.Node, value: ir.Value) -> None:
    axes = integers(reduce.inputs[1]) if len(reduce.inputs) > 1 else attribute(reduce, "axes")
    last = (rank(value) or 0) - 1
    if axes is None or list(axes) not in ([-1], [last]):
        raise _Refused(f"{reduce.name} runs over axes {axes}, not the last")
    if attribute(reduce, "keepdims", 1) != 1:
        raise _Refused(f"{reduce.name} drops its axis")


def _divided_by_width(total: ir.Node, value: ir.Value, shapes: SymbolicShapes, nodes: list[ir.Node]) -> ir.Node:
    """From the sum of squares to the mean of squares."""
    following = next_node(total.outputs[0])
    number = scalar(other_operand(following, total.outputs[0])) if following is not None else None
    width = _width(value, shapes)
    if following is None or number is None or width is None:
        raise _Refused("")
    divides = is_op(following, "Div") and following.inputs[0] is total.outputs[0]
    if not (divides and number == width) and not (
        is_op(following, "Mul") and math.isclose(number * width, 1.0, rel_tol=1e-6)
    ):
        raise _Refused(f"the sum of squares {total.outputs[0].name} is not divided by the width {width}")
    nodes.append(following)
    return following


def _epsilon(mean: ir.Node, nodes: list[ir.Node]) -> tuple[ir.Node, float]:
    add = next_node(mean.outputs[0])
    if add is None and any(is_op(use.node, "Add") for use in mean.outputs[0].uses()):
        raise _Refused(f"the mean of squares {mean.outputs[0].name} is also used elsewhere")
    if add is None or not is_op(add, "Add"):
        raise _Refused("")
    number = scalar(other_operand(add, mean.outputs[0]))
    if number is None:
        raise _Refused("what is added to the mean of squares is not one number")
    nodes.append(add)
    return add, number


def _divide(match: _Match, shapes: SymbolicShapes) -> None:
    """From ``mean + eps`` to ``x / sqrt(mean + eps)``, or to ``x * (scale / sqrt(mean + eps))``."""
    root = next_node(match.last.outputs[0])
    power = scalar(root.inputs[1]) if root is not None and is_op(root, "Pow") else None
    if root is None or not (is_op(root, "Sqrt") or power in (0.5, -0.5)):
        raise _Refused("")
    match.nodes.append(root)
    inverse, node = power == -0.5, root
    following = next_node(root.outputs[0])
    if not inverse and following is not None:
        inverse = is_op(following, "Reciprocal") or (is_op(following, "Div") and is_scalar(following.inputs[0], 1.0))
        if inverse:
            match.nodes.append(following)
            node, following = following, next_node(following.outputs[0])
    if inverse and following is not None and match.x not in following.inputs:
        scaled = _with_vector(node, "Mul", match.x, shapes)
        if scaled is not None:
            node, match.scale = scaled
            match.nodes.append(node)
            following = next_node(node.outputs[0])
    if following is None:
        raise _Refused(f"the inverse root {node.outputs[0].name} is also used elsewhere")
    if not (is_op(following, "Mul") and inverse) and not (is_op(following, "Div") and not inverse):
        raise _Refused("")
    if match.x not in (following.inputs if inverse else following.inputs[:1]):
        raise _Refused("")
    match.nodes.append(following)
    match.last = following


def _absorb_casts(match: _Match, halves: Sequence[ir.DataType]) -> None:
    """Float statistics inside a half-precision model: the casts around them belong to the operator."""
    before = producer(match.x, "Cast")
    after = next_node(match.last.outputs[0])
    if before is None or after is None or not is_op(after, "Cast") or before.inputs[0] is None:
        return
    kind = before.inputs[0].dtype
    if match.x.dtype == ir.DataType.FLOAT and kind in halves and kind == after.outputs[0].dtype:
        match.x = before.inputs[0]
        match.nodes.append(after)
        match.last = after


def _scale_and_bias(match: _Match, shapes: SymbolicShapes) -> None:
    scaled = _with_vector(match.last, "Mul", match.x, shapes) if match.scale is None else None
    if scaled is not None:
        match.last, match.scale = scaled
        match.nodes.append(match.last)
    shifted = _with_vector(match.last, "Add", match.x, shapes) if match.centred else None
    if shifted is not None:
        match.last, match.bias = shifted
        match.nodes.append(match.last)


def _with_vector(node: ir.Node, op: str, x: ir.Value, shapes: SymbolicShapes) -> tuple[ir.Node, ir.Value] | None:
    """The only reader of ``node`` if it is ``op`` with a vector over the last axis of ``x``, and that vector."""
    following = next_node(node.outputs[0])
    other = other_operand(following, node.outputs[0]) if following is not None and is_op(following, op) else None
    if following is None or other is None or other.shape is None or other.dtype != x.dtype:
        return None
    sizes = list(other.shape)
    is_row = len(sizes) == 1 or (constant(other, limit=1 << 20) is not None and set(sizes[:-1]) == {1})
    return (following, other) if is_row and sizes[-1] == _width(x, shapes) else None


def _width(x: ir.Value, shapes: SymbolicShapes) -> int | None:
    """The size of the last axis, if it is known."""
    dims = shapes.dims(x)
    return dims[-1][0] if dims and not dims[-1][1] else None
