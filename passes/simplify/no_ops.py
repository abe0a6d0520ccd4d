"""Nodes that do nothing, or that do the same as a shorter chain: the rules that ``Cleanup`` applies."""

from __future__ import annotations

import onnx_ir as ir

from ...compiler.graph import attribute, constant, integers, is_op, producer, rank

_END = 2**31 - 1  # exporters write "to the end" as this or INT64_MAX

# Casts that lose nothing: from -> to.
_WIDER = {
    ir.DataType.BOOL: {ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.UINT8},
    ir.DataType.INT8: {ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE},
    ir.DataType.UINT8: {ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE},
    ir.DataType.INT32: {ir.DataType.INT64, ir.DataType.DOUBLE},
    ir.DataType.FLOAT16: {ir.DataType.FLOAT, ir.DataType.DOUBLE},
    ir.DataType.BFLOAT16: {ir.DataType.FLOAT, ir.DataType.DOUBLE},
    ir.DataType.FLOAT: {ir.DataType.DOUBLE},
}
# op -> (neutral element, whether it may stand on the left too)
_NEUTRAL = {"Mul": (1, True), "Div": (1, False), "Add": (0, True), "Sub": (0, False), "And": (1, True), "Or": (0, True)}


def same_as(node: ir.Node) -> tuple[ir.Value, str] | None:
    """The value that ``node``'s first output always equals, and the rule that says so; None for a node that works."""
    if node.domain or not node.inputs or node.inputs[0] is None:
        return None
    found = _SAME_RULES.get(node.op_type)
    value = found(node) if found is not None else None
    return None if value is None else (value, f"no-op {node.op_type}")


def _identity(node: ir.Node) -> ir.Value | None:
    return node.inputs[0]


def _dropout(node: ir.Node) -> ir.Value | None:
    training = constant(node.inputs[2], limit=1) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if len(node.inputs) > 2 and node.inputs[2] is not None and (training is None or training.any()):
        return None
    mask_is_read = len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output())
    return None if mask_is_read else node.inputs[0]


def _cast(node: ir.Node) -> ir.Value | None:
    source = node.inputs[0]
    return source if source is not None and source.dtype == ir.DataType(attribute(node, "to")) else None


def _single(node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _transpose(node: ir.Node) -> ir.Value | None:
    perm = attribute(node, "perm")
    return node.inputs[0] if perm is not None and list(perm) == sorted(perm) else None


def _same_static_shape(node: ir.Node) -> ir.Value | None:
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None or not source.shape.is_static():
        return None
    return source if source.shape == result.shape else None


def _expand(node: ir.Node) -> ir.Value | None:
    source, target = node.inputs[0], integers(node.inputs[1])
    if target is not None and set(target) <= {1} and (rank(source) or 0) >= len(target) and source is not None:
        return source if source.shape is not None else None
    return _same_static_shape(node)


def _unsqueeze(node: ir.Node) -> ir.Value | None:
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
    return node.inputs[0] if axes is not None and len(axes) == 0 else None


def _squeeze(node: ir.Node) -> ir.Value | None:
    """Squeeze(Unsqueeze(x, axes), axes) is x."""
    inner = producer(node.inputs[0], "Unsqueeze")
    if inner is None:
        return None
    outer_axes, inner_axes = _axes(node), _axes(inner)
    return inner.inputs[0] if outer_axes is not None and outer_axes == inner_axes else None


def _axes(node: ir.Node) -> list[int] | None:
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
    return sorted(axes) if axes is not None else None


def _pad(node: ir.Node) -> ir.Value | None:
    pads = integers(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "pads")
    return node.inputs[0] if pads is not None and not any(pads) else None


def _slice(node: ir.Node) -> ir.Value | None:
    if len(node.inputs) < 3:
        return None
    starts, ends = integers(node.inputs[1]), integers(node.inputs[2])
    steps = integers(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
    whole = starts is not None and ends is not None and steps is not None
    if whole and not any(starts or [1]) and all(end >= _END for end in ends or [0]) and set(steps or [0]) == {1}:
        return node.inputs[0]
    return None


def _neutral(node: ir.Node) -> ir.Value | None:
    """x * 1, x / 1, x + 0, x - 0, x and True, x or False, where the constant does not broadcast x to more dims."""
    element, commutes = _NEUTRAL[node.op_type]
    sides = [(node.inputs[0], node.inputs[1])]
    if commutes:
        sides.append((node.inputs[1], node.inputs[0]))
    for value, other in sides:
        array = constant(other, limit=1)
        if value is None or other is None or array is None or array.size != 1 or array.reshape(-1)[0] != element:
            continue
        if array.ndim == 0 or (value.shape is not None and len(value.shape) >= array.ndim):
            return value
    return None


_SAME_RULES = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), _single),
    "Transpose": _transpose,
    "Reshape": _same_static_shape,
    "Flatten": _same_static_shape,
    "Expand": _expand,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Pad": _pad,
    "Slice": _slice,
    **dict.fromkeys(_NEUTRAL, _neutral),
}


def shorten(node: ir.Node) -> str | None:
    """Lets ``node`` read past a node of its own kind where both together are one; returns the rule, or None.

    The inner node stays for its other readers, so nothing is computed twice that was not before.
    """
    inner = producer(node.inputs[0], node.op_type) if node.inputs and not node.domain else None
    if inner is None or inner.inputs[0] is None:
        return None
    if is_op(node, "Transpose"):
        first, second = attribute(inner, "perm"), attribute(node, "perm")
        if first is None or second is None:
            return None
        node.attributes["perm"] = ir.AttrInt64s("perm", [first[axis] for axis in second])
    elif is_op(node, "Reshape"):
        target = integers(node.inputs[1])
        copies = target is None or (0 in target and not attribute(node, "allowzero", 0))
        if copies:  # a 0 copies a dim of the inner result, which is then another dim
            return None
    elif is_op(node, "Cast"):
        middle = ir.DataType(attribute(inner, "to"))
        if inner.inputs[0].dtype is None or middle not in _WIDER.get(inner.inputs[0].dtype, ()):
            return None
    else:
        return None
    node.replace_input_with(0, inner.inputs[0])
    return f"{node.op_type} of {node.op_type}"
