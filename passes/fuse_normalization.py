"""LayerNormalization and RMSNormalization in all spellings, to one operator."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..compiler.base import Outcome, Pass, PassContext
from ..compiler.graph import (
    Names,
    add_initializer,
    all_nodes,
    attribute,
    constant,
    integers,
    is_op,
    is_scalar,
    make_node,
    only_consumer,
    opset,
    producer,
    rank,
    remove_dead,
    replace,
    scalar,
)
from .symbolic import SymbolicShapes

_LAYER_OPSET, _RMS_OPSET = 17, 23


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
    """Recognizes normalizations over the last axis, anchored at the ReduceMean of a square.

    1. ``d / sqrt(mean(d^2) + eps) * scale + bias`` with ``d = x - mean(x)`` -> LayerNormalization (opset >= 17).
    2. ``x / sqrt(mean(x^2) + eps) * scale`` -> RMSNormalization (opset >= 23).
    3. The square is Pow or Mul; the root is Sqrt with Div, Sqrt with Reciprocal or 1/s and Mul, or Pow(-0.5) and Mul.
    4. Casts to float and back around the statistics (half-precision models) are the operators' own ``stash_type``.
    5. Scale and bias are vectors of the last axis; a missing scale is ones, a missing bias is left out.

    Refused: other axes, dropped axes (keepdims=0), intermediates used elsewhere, opsets without the operator (run
    ``upgrade-opset`` first).

    Pays on CPU and CUDA: one pass over memory instead of six to nine. Sources: Ba et al. 2016 (arXiv 1607.06450), Zhang
    and Sennrich 2019 (arXiv 1910.07467); ONNX operators LayerNormalization-17, RMSNormalization-23.
    """

    name: ClassVar[str] = "fuse-normalization"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        anchors = [node for node in all_nodes(model) if is_op(node, "ReduceMean") and _square(node.inputs[0])]
        if not anchors:
            return outcome
        names, shapes = Names(model), SymbolicShapes(model)
        for anchor in anchors:
            rule = "x / sqrt(mean(x^2) + eps) -> normalization"
            try:
                match = _find(anchor)
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
        return outcome

    def _write(self, kind: str, match: _Match, names: Names, shapes: SymbolicShapes) -> None:
        graph, result = match.last.graph, match.last.outputs[0]
        if not isinstance(graph, ir.Graph):
            raise _Refused("it lies in a model-local function; inline functions first")
        base = names.fresh(f"{match.nodes[0].name}/{kind}")
        scale = match.scale
        if scale is None:
            dims = shapes.dims(match.x)
            if dims is None or dims[-1][1] or match.x.dtype is None:
                raise _Refused("it has no scale, and the size of the last axis is unknown")
            scale = add_initializer(graph, names, f"{base}.ones", np.ones(dims[-1][0], match.x.dtype.numpy()))
        node = make_node(
            kind,
            [match.x, _vector(scale, graph, names), *([_vector(match.bias, graph, names)] if match.bias else [])],
            name=base,
            output=names.fresh(f"{result.name}_normalized"),
            like=result,
            attributes={"axis": -1, "epsilon": match.epsilon},
        )
        replace(match.last, [node], by=self.name, gone=[item for item in match.nodes if item is not match.last])


def _square(value: ir.Value | None) -> ir.Value | None:
    """v for ``Pow(v, 2)`` or ``Mul(v, v)``."""
    node = producer(value, "Pow", "Mul")
    if node is None:
        return None
    if is_op(node, "Pow"):
        return node.inputs[0] if is_scalar(node.inputs[1], 2.0) else None
    return node.inputs[0] if node.inputs[0] is node.inputs[1] else None


def _find(anchor: ir.Node) -> _Match:
    value = _square(anchor.inputs[0])
    square = producer(anchor.inputs[0])
    if value is None or square is None:
        raise _Refused("")
    nodes = [square, anchor]
    _over_last_axis(anchor, value)
    node, epsilon = _epsilon(anchor, nodes)
    node = _divided(node, value, nodes)
    match = _Match(value, False, epsilon, node, nodes)
    difference = producer(value, "Sub")
    mean = producer(difference.inputs[1], "ReduceMean") if difference is not None else None
    if difference is not None and mean is not None and mean.inputs[0] is difference.inputs[0] is not None:
        _over_last_axis(mean, value)
        if {use.node for use in value.uses()} - {*nodes} or value.is_graph_output():
            raise _Refused("the centred input is also used elsewhere")
        match.centred, match.x = True, difference.inputs[0] or value
        nodes += [mean, difference]
    for item in nodes:
        if item is not match.last and item is not difference and only_consumer(item.outputs[0]) is None:
            raise _Refused(f"{item.op_type} {item.name} inside it is also used elsewhere")
    _casts(match)
    _scale_and_bias(match)
    return match


def _over_last_axis(reduce: ir.Node, value: ir.Value) -> None:
    axes = integers(reduce.inputs[1]) if len(reduce.inputs) > 1 else attribute(reduce, "axes")
    last = (rank(value) or 0) - 1
    if axes is None or list(axes) not in ([-1], [last]):
        raise _Refused(f"{reduce.name} runs over axes {axes}, not the last")
    if attribute(reduce, "keepdims", 1) != 1:
        raise _Refused(f"{reduce.name} drops its axis")


def _epsilon(anchor: ir.Node, nodes: list[ir.Node]) -> tuple[ir.Node, float]:
    add = only_consumer(anchor.outputs[0])
    if add is None and any(is_op(use.node, "Add") for use in anchor.outputs[0].uses()):
        raise _Refused(f"the mean of squares {anchor.outputs[0].name} is also used elsewhere")
    if add is None or not is_op(add, "Add"):
        raise _Refused("")
    numbers = [number for number in map(scalar, add.inputs) if number is not None]
    if len(numbers) != 1:
        raise _Refused("what is added to the mean of squares is not one number")
    nodes.append(add)
    return add, numbers[0]


def _divided(node: ir.Node, value: ir.Value, nodes: list[ir.Node]) -> ir.Node:
    """From ``mean + eps`` to ``value / sqrt(mean + eps)``."""
    root = only_consumer(node.outputs[0])
    if root is None or not (is_op(root, "Sqrt") or (is_op(root, "Pow") and scalar(root.inputs[1]) in (0.5, -0.5))):
        raise _Refused("")
    nodes.append(root)
    inverse = is_op(root, "Pow") and scalar(root.inputs[1]) == -0.5
    following = only_consumer(root.outputs[0])
    if (
        not inverse
        and following is not None
        and (is_op(following, "Reciprocal") or (is_op(following, "Div") and is_scalar(following.inputs[0], 1.0)))
    ):
        nodes.append(following)
        inverse, following = True, only_consumer(following.outputs[0])
    if following is None:
        raise _Refused("the inverse root is also used elsewhere")
    if inverse:
        good = is_op(following, "Mul") and value in following.inputs
    else:
        good = is_op(following, "Div") and following.inputs[0] is value
    if not good:
        raise _Refused("")
    nodes.append(following)
    return following


def _casts(match: _Match) -> None:
    """Float statistics inside a half-precision model: the casts around them belong to the operator."""
    before = producer(match.x, "Cast")
    after = only_consumer(match.last.outputs[0])
    if before is None or after is None or not is_op(after, "Cast") or before.inputs[0] is None:
        return
    if match.x.dtype == ir.DataType.FLOAT and before.inputs[0].dtype == after.outputs[0].dtype:
        match.x = before.inputs[0]
        match.nodes.append(after)
        match.last = after


def _scale_and_bias(match: _Match) -> None:
    scaled = _with_vector(match.last, "Mul", match.x)
    if scaled is None:
        return
    match.last, match.scale = scaled
    match.nodes.append(match.last)
    shifted = _with_vector(match.last, "Add", match.x) if match.centred else None
    if shifted is not None:
        match.last, match.bias = shifted
        match.nodes.append(match.last)


def _with_vector(node: ir.Node, op: str, x: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The only reader of ``node`` if it is ``op`` with a vector over the last axis, and that vector."""
    following = only_consumer(node.outputs[0])
    if following is None or not is_op(following, op):
        return None
    other = following.inputs[1] if following.inputs[0] is node.outputs[0] else following.inputs[0]
    if other is None or other.shape is None or not other.shape.is_static() or other.dtype != x.dtype:
        return None
    sizes = [size for size in other.shape.numpy() if size != 1]
    is_row = len(other.shape) == 1 or (constant(other, limit=1 << 20) is not None and other.shape[-1] != 1)
    if len(sizes) > 1 or not is_row or x.shape is None or x.shape[-1] != other.shape[-1]:
        return None
    return following, other


def _vector(value: ir.Value | None, graph: ir.Graph, names: Names) -> ir.Value | None:
    """``value`` as a 1-D tensor: a constant [1, 1, D] is written anew as [D]."""
    if value is None or value.shape is None or len(value.shape) == 1:
        return value
    array = constant(value)
    return value if array is None else add_initializer(graph, names, f"{value.name}_row", array.reshape(-1))
