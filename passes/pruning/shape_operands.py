"""Where the numbers in shape operands (of Reshape, Expand, Slice) come from, and which of them can be rewritten."""

from __future__ import annotations

import onnx_ir as ir

from ...compiler.graph import attribute, dims, integers, is_fixed, is_op, producer

_SHAPE_MOVES = ("Slice", "Gather", "Squeeze", "Unsqueeze", "Concat", "Cast", "Identity", "Reshape")
_SHAPE_READERS = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}


def target_parts(value: ir.Value | None) -> list[tuple[ir.Value, int]] | None:
    """A shape operand as the 1-D tensors it is joined of, each with its position; None if it cannot be rewritten."""
    node = producer(value)
    if value is None or (node is None and not is_fixed(value)):
        return None
    parts: list[tuple[ir.Value, int]] = []
    position = 0
    for part in [value] if node is None or not is_op(node, "Concat") else node.inputs:
        length = (dims(part) or [None])[0]
        if part is None or not isinstance(length, int):
            return None
        parts.append((part, position))
        position += length
    return parts


def size_origin(value: ir.Value | None, position: int) -> tuple[ir.Value, int] | None:
    """The tensor and axis whose size is the number at ``position`` of ``value``; None if that is not how it is made."""
    node = producer(value)
    if node is None:
        return None
    x = node.inputs[0]
    if is_op(node, "Shape"):
        start = attribute(node, "start", 0)
        return (x, start + position) if x is not None and start >= 0 else None
    if is_op(node, "Squeeze", "Unsqueeze", "Cast", "Identity"):
        return size_origin(x, position)
    if is_op(node, "Reshape"):
        return size_origin(x, position) if x is not None and x.shape is not None and x.shape.numpy() == (1,) else None
    if is_op(node, "Gather"):
        indices = integers(node.inputs[1])
        return size_origin(x, indices[position]) if indices is not None and min(indices) >= 0 else None
    length = (dims(x) or [None])[0]
    if is_op(node, "Slice") and isinstance(length, int):
        bounds = sliced(node, [length])
        return size_origin(x, bounds[0][0] + position) if bounds is not None and bounds[0][2] == 1 else None
    if is_op(node, "Concat"):
        for part, begin in reversed(target_parts(value) or []):
            if begin <= position:
                return size_origin(part, position - begin)
    return None


def only_shapes(value: ir.Value) -> bool:
    """Whether sizes that were read go into shapes of other tensors and nowhere else."""
    if value.is_graph_output():
        return False
    for use in value.uses():
        if _SHAPE_READERS.get(use.node.op_type) == use.idx and not use.node.domain:
            continue
        if is_op(use.node, *_SHAPE_MOVES) and (use.idx == 0 or is_op(use.node, "Concat")):
            if not only_shapes(use.node.outputs[0]):
                return False
            continue
        return False
    return True


def sliced(node: ir.Node, sizes: list[int | None]) -> dict[int, tuple[int, int, int]] | None:
    """(start, end, step) of each axis that a Slice with constant bounds cuts; None if they are not constant.

    Args:
        node: the Slice, opset 10 or newer.
        sizes: sizes of the axes, None where unknown.
    """
    if len(node.inputs) < 3:
        return None
    given = [integers(value) if value is not None else None for value in node.inputs[1:]]
    starts, ends = given[0], given[1]
    if len(node.inputs) > 3 and node.inputs[3] is not None and given[2] is None:
        return None
    axes = given[2] if len(given) > 2 and given[2] is not None else list(range(len(sizes)))
    steps = given[3] if len(given) > 3 and given[3] is not None else None
    if len(node.inputs) > 4 and node.inputs[4] is not None and steps is None:
        return None
    found: dict[int, tuple[int, int, int]] = {}
    for number, axis in enumerate(axes):
        size = sizes[axis % len(sizes)]
        if size is None:
            found[axis % len(sizes)] = (0, 0, 0)
            continue
        if starts is None or ends is None:
            return None
        start, end, _ = slice(starts[number], ends[number]).indices(size)
        found[axis % len(sizes)] = (start, end, steps[number] if steps is not None else 1)
    return found
