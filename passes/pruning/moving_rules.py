"""What operators that move, split and join axes link (``coupling.py``)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ...compiler.graph import Array, attribute, constant, integers, is_fixed, is_op
from ..symbolic import squeezed_axes
from ..symbolic_dims import ONE, Dim, Dims, divide, multiply
from .coupling import Coupling
from .shape_operands import only_shapes, size_origin, sliced, target_parts
from .units import Place


def _transpose(c: Coupling, node: ir.Node) -> None:
    x, out = c.operand(node, 0), c.result(node)
    if x is None or out is None:
        return
    order = attribute(node, "perm") or tuple(reversed(range(x.rank)))
    for axis, source in enumerate(order):
        c.link_axes(x, source, out, axis)


def _reshape(c: Coupling, node: ir.Node) -> None:
    x, out = c.operand(node, 0), c.result(node)
    if x is None or out is None:
        return
    groups = regrouped(x.dims or (), out.dims or ())
    if groups is None:
        c.freeze_node(node, f"{node.op_type} {node.name} regroups the axes in a way that is not known")
        return
    for sources, targets in groups:
        if len(sources) == len(targets) == 1:
            c.link_axes(x, sources[0], out, targets[0])
        elif len(sources) == 1:
            _split_axis(c, node, (x, sources[0]), [(out, axis) for axis in targets])
        elif len(targets) == 1:
            _split_axis(c, node, (out, targets[0]), [(x, axis) for axis in sources])
        else:
            for place, axes in ((x, sources), (out, targets)):
                for axis in axes:
                    c.freeze_axis(place, axis, f"{node.op_type} {node.name} joins and splits it at once")
    if is_op(node, "Reshape"):
        _shape_operand(c, node, out)


def _split_axis(c: Coupling, node: ir.Node, whole: tuple[Place, int], parts: list[tuple[Place, int]]) -> None:
    """One axis as several: a block of it goes with its index in the outermost of them, the others stay."""
    elements = c.elements(*whole)
    sizes = [len(c.elements(*part)) for part in parts]
    symbols = [part for part in parts if part[0].dim(part[1])[1]]
    named = [number for number, size in enumerate(sizes) if size]
    if not len(elements):
        return
    if symbols:
        if len(named) == 1 and named[0] == len(parts) - 1 and not (parts[-1][0].dims or ())[parts[-1][1]][1]:
            c.link(elements, c.elements(*parts[-1]))
            return
        for place, axis in (whole, *parts):
            c.freeze_axis(place, axis, f"{node.op_type} {node.name} mixes it with an axis of unknown size")
        return
    outer = named[0]
    c.link(elements, np.repeat(c.elements(*parts[outer]), len(elements) // sizes[outer]))
    for number in named[1:]:
        c.freeze_axis(*parts[number], f"{node.op_type} {node.name} makes it the inner part of an axis")


def regrouped(before: Dims, after: Dims) -> list[tuple[list[int], list[int]]] | None:
    """Which axes of a Reshape's input hold the same numbers as which of its output; axes of size 1 are left out."""
    groups: list[tuple[list[int], list[int]]] = []
    left = [axis for axis, dim in enumerate(before) if dim != ONE]
    right = [axis for axis, dim in enumerate(after) if dim != ONE]
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (size := _product(before, a)) != (other := _product(after, b)):
            if left and divide(other, size) is not None:
                a.append(left.pop(0))
            elif right and divide(size, other) is not None:
                b.append(right.pop(0))
            elif left and not right:
                a.append(left.pop(0))
            elif right and not left:
                b.append(right.pop(0))
            else:
                return None
        groups.append((a, b))
    return groups if not left and not right else None


def _product(dims: Dims, axes: list[int]) -> Dim:
    return multiply([dims[axis] for axis in axes])


def _shape_operand(c: Coupling, node: ir.Node, out: Place) -> None:
    """The numbers that a Reshape or Expand is told must be ones that can be changed, or that change by themselves."""
    parts = target_parts(node.inputs[1])
    for axis in range(out.rank):
        elements = c.elements(out, axis)
        if not len(elements):
            continue
        part = next((p for p in reversed(parts or []) if p[1] <= axis), None)
        numbers = integers(part[0]) if part is not None else None
        if part is not None and numbers is not None:
            continue
        source = size_origin(*(part[0], axis - part[1])) if part is not None else size_origin(node.inputs[1], axis)
        if source is None:
            c.freeze(elements, f"{node.op_type} {node.name} is told its size in a way that is not known")
            continue
        place = Place(source[0], c.shapes.dims(source[0]))
        c.link_axes(place, source[1], out, axis)


def _shape(c: Coupling, node: ir.Node) -> None:
    """The sizes that are read may go into other shapes and nowhere else."""
    x = c.operand(node, 0)
    if x is None or only_shapes(node.outputs[0]):
        return
    start, end = attribute(node, "start", 0), attribute(node, "end")
    for axis in list(range(x.rank))[start:end]:
        c.freeze_axis(x, axis, f"Shape {node.name} reads its size for more than shapes")


def _constant_of_shape(c: Coupling, node: ir.Node) -> None:
    out = c.result(node)
    for axis in range(out.rank if out is not None else 0):
        c.freeze_axis(out, axis, f"ConstantOfShape {node.name} is told its size")


def _expand(c: Coupling, node: ir.Node) -> None:
    x, out = c.operand(node, 0), c.result(node)
    if x is None or out is None:
        return
    for axis in range(out.rank):
        source = axis - out.rank + x.rank
        if source >= 0 and x.dim(source) != ONE:
            c.link_axes(x, source, out, axis)
        else:
            c.freeze_axis(out, axis, f"Expand {node.name} repeats it")
    _shape_operand(c, node, out)


def _squeeze(c: Coupling, node: ir.Node) -> None:
    x, out = c.operand(node, 0), c.result(node)
    axes = squeezed_axes(node)
    if x is None or out is None or (axes is None and is_op(node, "Unsqueeze")):
        c.freeze_node(node, f"{node.op_type} {node.name} has no constant axes")
        return
    left = [axis for axis, dim in enumerate(x.dims or ()) if dim != ONE]
    right = [axis for axis, dim in enumerate(out.dims or ()) if dim != ONE]
    for a, b in zip(left, right, strict=True):
        c.link_axes(x, a, out, b)


def _others(c: Coupling, x: Place, out: Place, moved: int) -> None:
    for axis in range(x.rank):
        if axis != moved:
            c.link_axes(x, axis, out, axis)


def _split(c: Coupling, node: ir.Node) -> None:
    x = c.operand(node, 0)
    if x is None:
        return
    axis = attribute(node, "axis", 0) % x.rank
    elements, start = c.elements(x, axis), 0
    outputs = [c.result(node, index) for index in range(len(node.outputs))]
    if any(out is None or out.dim(axis)[1] for out in outputs):
        c.freeze_node(node, f"Split {node.name} has parts of unknown size")
        return
    for out in outputs:
        if out is None:
            continue
        _others(c, x, out, axis)
        size = out.dim(axis)[0]
        part = c.elements(out, axis)
        if size == 1:
            c.freeze(elements[start : start + 1], f"Split {node.name} takes one index of it")
        else:
            c.link(elements[start : start + size], part)
        start += size
    if len(node.inputs) > 1 and not is_fixed(node.inputs[1]):
        c.freeze(elements, f"Split {node.name} finds its sizes at run time")


def _concat(c: Coupling, node: ir.Node) -> None:
    out = c.result(node)
    if out is None:
        return
    axis = attribute(node, "axis", 0) % out.rank
    elements, start = c.elements(out, axis), 0
    for index in range(len(node.inputs)):
        x = c.operand(node, index)
        if x is None:
            continue
        _others(c, x, out, axis)
        size, symbols = x.dim(axis)
        if symbols:
            c.freeze(np.concatenate([elements, c.elements(x, axis)]), f"Concat {node.name} joins parts of unknown size")
        elif size == 1:
            c.freeze(elements[start : start + 1], f"Concat {node.name} adds one index to it")
        else:
            c.link(c.elements(x, axis), elements[start : start + size])
        start += size


def _slice(c: Coupling, node: ir.Node) -> None:
    x, out = c.operand(node, 0), c.result(node)
    if x is None or out is None:
        return
    bounds = sliced(node, [None if dim[1] else dim[0] for dim in x.dims or ()])
    if bounds is None:
        c.freeze_node(node, f"Slice {node.name} has no constant bounds")
        return
    for axis in range(x.rank):
        if axis not in bounds:
            c.link_axes(x, axis, out, axis)
            continue
        start, end, step = bounds[axis]
        elements, part = c.elements(x, axis), c.elements(out, axis)
        if step == 1 and len(part) == end - start:
            c.link(elements[start:end], part)
        else:
            c.freeze(np.concatenate([elements, part]), f"Slice {node.name} takes single indices of it")


def gathered(node: ir.Node) -> Array | None:
    """The constant 1-D indices of a Gather, None for others."""
    indices = constant(node.inputs[1], limit=1 << 16)
    return indices if indices is not None and indices.ndim == 1 and (indices >= 0).all() else None


def _gather(c: Coupling, node: ir.Node) -> None:
    x, indices, out = c.operand(node, 0), c.operand(node, 1), c.result(node)
    if x is None or out is None or indices is None:
        return
    axis = attribute(node, "axis", 0) % x.rank
    for number in range(x.rank):
        if number != axis:
            c.link_axes(x, number, out, number if number < axis else number - 1 + indices.rank)
    elements, known = c.elements(x, axis), gathered(node)
    if known is not None and len(known) > 1:
        c.link(elements[known] if len(elements) else elements, c.elements(out, axis))
        return
    c.freeze(elements, f"Gather {node.name} looks up indices of it")
    for number in range(indices.rank):
        c.freeze_axis(out, axis + number, f"Gather {node.name} makes it of its indices")
        c.freeze_axis(indices, number, f"Gather {node.name} makes an axis of it")


MOVING_RULES: dict[tuple[str, str], Callable[[Coupling, ir.Node], None]] = {
    ("", "Transpose"): _transpose,
    ("", "Reshape"): _reshape,
    ("", "Flatten"): _reshape,
    ("", "Shape"): _shape,
    ("", "ConstantOfShape"): _constant_of_shape,
    ("", "Expand"): _expand,
    ("", "Squeeze"): _squeeze,
    ("", "Unsqueeze"): _squeeze,
    ("", "Split"): _split,
    ("", "Concat"): _concat,
    ("", "Slice"): _slice,
    ("", "Gather"): _gather,
}
