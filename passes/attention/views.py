"""Follows a tensor through Reshape, Transpose and repeats: which factor of which axis ends up where.

So "split heads" and "merge heads" are recognized by what they do, not by the chain of operators that does it.
"""

from __future__ import annotations

import onnx_ir as ir

from ...compiler.graph import attribute, is_op
from ..symbolic import SymbolicShapes, reshaped, squeezed_axes
from ..symbolic_dims import ONE, Dim, Dims, divide, multiply

# A factor of a tensor: its size and where it comes from: (2,) is axis 2, (2, 1) the second part of axis 2 when split.
Factor = tuple[Dim, tuple[int, ...]]
View = list[list[Factor]]
REPEAT = (-1,)
"""Where the factors come from that Expand makes: the elements before them stand that many times side by side."""


def whole_view(dims: Dims) -> View:
    """A tensor as it is: one factor an axis; axes of size 1 have none."""
    return [[(dim, (axis,))] if dim != ONE else [] for axis, dim in enumerate(dims)]


def origins(view: View) -> list[list[tuple[int, ...]]]:
    """Only where the factors come from, e.g. ``[[(0,)], [(2, 0)], [(1,)], [(2, 1)]]`` for split and swapped heads."""
    return [[origin for _, origin in axis] for axis in view]


def follow_view(view: View, node: ir.Node, shapes: SymbolicShapes) -> View | None:
    """What a node does to a tensor seen as factors of the tensor the chain starts from.

    A Transpose permutes the axes; a Reshape regroups the factors in order, splitting one where the new shape demands
    it; Unsqueeze and Squeeze add and remove axes without factors; Expand gives them one. None where that cannot be
    proved, and for other operators.
    """
    if node.op_type == "Transpose":
        perm = attribute(node, "perm")
        order = perm if perm is not None else range(len(view) - 1, -1, -1)
        return [view[axis] for axis in order]
    if is_op(node, "Unsqueeze", "Squeeze"):
        return _with_axes(view, node)
    if is_op(node, "Expand"):
        return _expanded(view, shapes.dims(node.outputs[0]))
    if not is_op(node, "Reshape"):
        return None
    source = tuple(multiply([dim for dim, _ in axis]) for axis in view)
    target = reshaped(source, shapes.content(node.inputs[1]), bool(attribute(node, "allowzero", 0)))
    return None if target is None else regroup([factor for axis in view for factor in axis], target)


def _with_axes(view: View, node: ir.Node) -> View | None:
    axes = squeezed_axes(node)
    if axes is None:
        return None
    rank = len(view) + (len(axes) if is_op(node, "Unsqueeze") else 0)
    changed = {axis % rank for axis in axes}
    if is_op(node, "Unsqueeze"):
        rest = iter(view)
        return [[] if axis in changed else next(rest) for axis in range(rank)]
    if any(view[axis] for axis in changed):
        return None
    return [factors for axis, factors in enumerate(view) if axis not in changed]


def _expanded(view: View, target: Dims | None) -> View | None:
    if target is None or len(target) < len(view):
        return None
    result: View = []
    for factors, size in zip([*([[]] * (len(target) - len(view))), *view], target, strict=True):
        repeated = not factors and size != ONE
        if not repeated and multiply([dim for dim, _ in factors]) != size:
            return None
        result.append([(size, REPEAT)] if repeated else factors)
    return result


def regroup(factors: list[Factor], target: Dims) -> View | None:
    """Distributes ``factors`` in order over axes of the sizes ``target``; None where they do not fit."""
    rest = list(factors)
    view: View = []
    for size in target:
        axis: list[Factor] = []
        need = size
        while need != ONE:
            if not rest:
                return None
            dim, origin = rest.pop(0)
            left = divide(need, dim)
            if left is not None:
                axis.append((dim, origin))
                need = left
                continue
            remainder = divide(dim, need)
            if remainder is None:
                return None
            axis.append((need, (*origin, 0)))
            rest.insert(0, (remainder, (*origin, 1)))
            need = ONE
        view.append(axis)
    return None if rest else view
