"""Gathering by consecutive positions, which is no gathering at all: the rules that ``SimplifyShapes`` applies."""

from __future__ import annotations

import onnx_ir as ir

from ...compiler.graph import attribute, integers, is_op, producer
from ..symbolic import SymbolicShapes
from ..symbolic_dims import ONE, Dim


def grid_axes(node: ir.Node, shapes: SymbolicShapes) -> list[int] | None:
    """For GatherND over all positions of its data in order: the axes of size 1 that it inserts; else None.

    transformers' mask code, vectorized by torch, indexes ``mask[b, s]`` with one index tensor for the batch and one for
    the positions, both counting from 0 to the size of the mask and broadcast against each other: the result is the mask
    with axes of size 1 between.
    """
    if not is_op(node, "GatherND") or attribute(node, "batch_dims", 0) != 0:
        return None
    data, result = shapes.dims(node.inputs[0]), shapes.dims(node.outputs[0])
    joined = producer(node.inputs[1], "Concat")
    if data is None or joined is None or len(joined.inputs) != len(data):
        return None
    found = [_counted(value, shapes) for value in joined.inputs]
    known = [item for item in found if item is not None]
    if len(known) != len(found) or [limit for _, limit in known] != list(data):
        return None
    axes = [axis for axis, _ in known]
    if axes != sorted(set(axes)) or result is None:
        return None
    inserted = [axis for axis in range(len(result)) if axis not in axes]
    return inserted if all(result[axis] == ONE for axis in inserted) else None


def _counted(value: ir.Value | None, shapes: SymbolicShapes) -> tuple[int, Dim] | None:
    """For an index tensor [..., 1] that counts 0, 1, 2... along one axis and is constant along the others."""
    last = producer(value, "Unsqueeze")
    if last is None or (dims := shapes.dims(value)) is None:
        return None
    axes = integers(last.inputs[1]) if len(last.inputs) > 1 else attribute(last, "axes")
    if axes is None or list(axes) not in ([-1], [len(dims) - 1]):
        return None
    current = last.inputs[0]
    while (node := producer(current, "Expand")) is not None:
        current = node.inputs[0]
    narrow, wide = shapes.dims(current), shapes.dims(last.inputs[0])
    if narrow is None or wide is None or len(narrow) != len(wide):
        return None
    moving = [axis for axis, dim in enumerate(narrow) if dim != ONE]
    while (node := producer(current, "Unsqueeze", "Cast", "Identity")) is not None:
        current = node.inputs[0]
    counter = producer(current, "Range")
    limit = shapes.dims(current)
    if counter is None or limit is None or len(moving) != 1 or narrow[moving[0]] != limit[0]:
        return None
    start, step = shapes.content(counter.inputs[0]), shapes.content(counter.inputs[2])
    return (moving[0], limit[0]) if start == ((0, ()),) and step == (ONE,) else None
