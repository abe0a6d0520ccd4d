"""Arithmetic of symbolic dims, and what shape computations make of them.

A dim is a product ``(coefficient, symbols)``: ``(384, ())`` is 384, ``(12, ("batch",))`` is 12 * batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import onnx_ir as ir

from ..compiler.graph import attribute

Dim = tuple[int, tuple[str, ...]]
Dims = tuple[Dim, ...]

ONE: Dim = (1, ())


def number(value: int) -> Dim:
    """The dim that is ``value``."""
    return (value, ())


def own_symbol(value: ir.Value, axis: int) -> str:
    """The symbol of a dim that nothing is known about."""
    return f"{value.name}@{axis}"


def is_own_symbol(symbol: str) -> bool:
    """Whether ``symbol`` stands for a dim that nothing is known about, and so is no name that a caller can give."""
    return "@" in symbol


def multiply(dims: Sequence[Dim]) -> Dim:
    """The product of ``dims``."""
    coefficient, symbols = 1, list[str]()
    for factor, names in dims:
        coefficient *= factor
        symbols += names
    return (coefficient, tuple(sorted(symbols)))


def divide(whole: Dim, part: Dim) -> Dim | None:
    """``whole / part`` if that is provably a whole dim, else None."""
    if part[0] == 0 or whole[0] % part[0]:
        return None
    left = Counter(whole[1])
    left.subtract(part[1])
    if any(count < 0 for count in left.values()):
        return None
    return (whole[0] // part[0], tuple(sorted(left.elements())))


def _shape_content(node: ir.Node, contents: list[Dims]) -> Dims | None:
    return contents[0]


def _concat_content(node: ir.Node, contents: list[Dims]) -> Dims | None:
    return tuple(dim for content in contents for dim in content)


def _gather_content(node: ir.Node, contents: list[Dims]) -> Dims | None:
    data, indices = contents
    if any(index[1] or not -len(data) <= index[0] < len(data) for index in indices):
        return None
    return tuple(data[index[0]] for index in indices)


def _slice_content(node: ir.Node, contents: list[Dims]) -> Dims | None:
    if len(contents) == 1:  # opset < 10 keeps the bounds in attributes
        bounds = [attribute(node, "starts"), attribute(node, "ends")]
        return contents[0][bounds[0][0] : bounds[1][0]]
    start, end = contents[1][0], contents[2][0]
    if start[1] or end[1] or (len(contents) > 4 and contents[4] != (ONE,)):
        return None
    return contents[0][start[0] : end[0]]


def _pairwise(node: ir.Node, contents: list[Dims]) -> Dims | None:
    left, right = contents
    if len(left) == 1:
        left *= len(right)
    if len(right) == 1:
        right *= len(left)
    if len(left) != len(right):
        return None
    operation = {"Mul": lambda a, b: multiply([a, b]), "Div": divide, "Equal": _equal}[node.op_type]
    results = [operation(a, b) for a, b in zip(left, right, strict=True)]
    known = tuple(result for result in results if result is not None)
    return known if len(known) == len(results) else None


def _equal(left: Dim, right: Dim) -> Dim | None:
    """1 or 0 where it is decided: a symbol is a size, so never negative."""
    if left == right:
        return ONE
    if not left[1] and not right[1]:
        return (0, ())
    return (0, ()) if left[0] < 0 or right[0] < 0 else None


def _where_content(node: ir.Node, contents: list[Dims]) -> Dims | None:
    condition, yes, no = contents
    if not len(condition) == len(yes) == len(no):
        return None
    return tuple(a if choice[0] else b for choice, a, b in zip(condition, yes, no, strict=True))


def _fill_content(node: ir.Node, contents: list[Dims]) -> Dims | None:
    size = contents[0][0] if len(contents[0]) == 1 else ONE
    value = attribute(node, "value")
    if size[1] or size[0] > 8 or value is None:
        return None
    return (number(int(value.numpy().reshape(-1)[0])),) * size[0]


CONTENT_RULES: dict[str, Callable[[ir.Node, list[Dims]], Dims | None]] = {
    **dict.fromkeys(("Shape", "Cast", "Identity"), _shape_content),
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten"), _shape_content),
    **dict.fromkeys(("Mul", "Div", "Equal"), _pairwise),
    "Concat": _concat_content,
    "Gather": _gather_content,
    "Slice": _slice_content,
    "Where": _where_content,
    "ConstantOfShape": _fill_content,
}
