"""Constant factors: Mul and Div by a number, also one that is computed from static dims at run time."""

from __future__ import annotations

import math

import onnx_ir as ir

from ..compiler.graph import is_op, producer, scalar
from .symbolic import SymbolicShapes


def constant_factor(node: ir.Node, shapes: SymbolicShapes) -> tuple[float | None, ir.Value | None]:
    """For Mul or Div by a number: the factor and the other operand; (None, None) for anything else."""
    left, right = node.inputs
    factor = _number(right, shapes)
    if factor is not None:
        if is_op(node, "Mul"):
            return factor, left
        if is_op(node, "Div") and factor != 0.0:
            return 1.0 / factor, left
    elif is_op(node, "Mul") and (factor := _number(left, shapes)) is not None:
        return factor, right
    return None, None


def _number(value: ir.Value | None, shapes: SymbolicShapes, depth: int = 6) -> float | None:
    """A scalar that is constant, or computed from static dims (torchscript computes 1/sqrt(head_dim) at run time)."""
    found = scalar(value)
    if found is not None or value is None or depth == 0:
        return found
    content = shapes.content(value)
    if content is not None:
        return float(content[0][0]) if len(content) == 1 and not content[0][1] else None
    node = producer(value, "Cast", "Sqrt", "Div", "Mul", "Reciprocal", "Identity", "Squeeze", "Unsqueeze", "Reshape")
    if node is None:
        return None
    operands = node.inputs[:2] if node.op_type in ("Div", "Mul") else node.inputs[:1]
    numbers = [_number(operand, shapes, depth - 1) for operand in operands]
    known = [found for found in numbers if found is not None]
    if len(known) != len(numbers):
        return None
    if node.op_type in ("Sqrt", "Div", "Reciprocal") and (known[-1] < 0 or (known[-1] == 0 and node.op_type != "Sqrt")):
        return None
    if node.op_type == "Sqrt":
        return math.sqrt(known[0])
    if node.op_type == "Reciprocal":
        return 1.0 / known[0]
    if node.op_type == "Div":
        return known[0] / known[1]
    return math.prod(known)
