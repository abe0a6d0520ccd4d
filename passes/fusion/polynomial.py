"""Scalar expressions of one tensor as polynomials, so that a formula is recognized however it is written."""

from __future__ import annotations

import math

import onnx_ir as ir

from ...compiler.graph import is_op, producer, scalar

# degree -> coefficient; {1: 0.5, 3: 0.1} is 0.5 x + 0.1 x^3
Polynomial = dict[int, float]

_MAX_DEGREE = 3
_MAX_DEPTH = 8


def polynomial(value: ir.Value | None, x: ir.Value, depth: int = _MAX_DEPTH) -> Polynomial | None:
    """``value`` as a polynomial in ``x`` (elementwise Add, Sub, Mul, Div, Neg, Pow with constants), or None."""
    if value is x:
        return {1: 1.0}
    number = scalar(value)
    if number is not None:
        return {0: number}
    node = producer(value, "Add", "Sub", "Mul", "Div", "Neg", "Pow")
    if node is None or depth == 0:
        return None
    parts = [polynomial(operand, x, depth - 1) for operand in node.inputs]
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        return None
    if is_op(node, "Neg"):
        return _scaled(known[0], -1.0)
    left, right = known
    if is_op(node, "Add", "Sub"):
        return _added(left, right if is_op(node, "Add") else _scaled(right, -1.0))
    if is_op(node, "Mul"):
        return _multiplied(left, right)
    if set(right) != {0}:
        return None
    if is_op(node, "Div"):
        return _scaled(left, 1.0 / right[0]) if right[0] else None
    power = right[0]
    if power not in (1.0, 2.0, 3.0):
        return None
    result: Polynomial | None = {0: 1.0}
    for _ in range(int(power)):
        result = None if result is None else _multiplied(result, left)
    return result


def is_polynomial(value: ir.Value | None, x: ir.Value, expected: Polynomial, relative: float) -> bool:
    """Whether ``value`` is the polynomial ``expected`` in ``x``, up to rounded constants."""
    found = polynomial(value, x)
    return (
        found is not None
        and set(found) == set(expected)
        and all(math.isclose(found[degree], expected[degree], rel_tol=relative) for degree in expected)
    )


def _added(a: Polynomial, b: Polynomial) -> Polynomial:
    total = {degree: a.get(degree, 0.0) + b.get(degree, 0.0) for degree in {*a, *b}}
    return {degree: coefficient for degree, coefficient in total.items() if coefficient}


def _scaled(a: Polynomial, factor: float) -> Polynomial:
    return {degree: coefficient * factor for degree, coefficient in a.items()}


def _multiplied(a: Polynomial, b: Polynomial) -> Polynomial | None:
    result: Polynomial = {}
    for i, p in a.items():
        for j, q in b.items():
            if i + j > _MAX_DEGREE:
                return None
            result[i + j] = result.get(i + j, 0.0) + p * q
    return result
