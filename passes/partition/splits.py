"""How a dim is divided over ranks, and how that survives a Reshape."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

if TYPE_CHECKING:
    from .sharder import Sharder

Ranges = tuple[tuple[int, int], ...]
Sources = frozenset[ir.Node]
"""Products whose columns a division comes from."""


class CannotSplit(Exception):
    """A node cannot work on parts; the message is the reason.

    Args:
        reason: why.
        indivisible: whether it is only that the ranks do not divide a number of heads.
    """

    def __init__(self, reason: str, indivisible: bool = False) -> None:
        super().__init__(reason)
        self.indivisible = indivisible


@dataclasses.dataclass(frozen=True)
class Split:
    """One axis of a tensor divided over ranks.

    Attributes:
        axis: the axis, from 0.
        ranges: for each rank what it has of the axis: (start, stop) one after the other.
        total: size of the whole axis, in each of ``outer``.
        outer: how many times the division repeats along the axis, as after a Reshape of [batch, heads] to one dim.
    """

    axis: int
    ranges: tuple[Ranges, ...]
    total: int
    outer: int = 1

    @property
    def sizes(self) -> list[int]:
        """What each rank has."""
        return [sum(stop - start for start, stop in ranges) for ranges in self.ranges]

    @property
    def in_order(self) -> bool:
        """Whether the ranks' parts one after the other are the whole."""
        flat = [piece for ranges in self.ranges for piece in ranges]
        return self.outer == 1 and all(a[1] == b[0] for a, b in itertools.pairwise(flat))

    @property
    def even(self) -> bool:
        """Whether all ranks have as much, of each piece."""
        return len({tuple(stop - start for start, stop in ranges) for ranges in self.ranges}) == 1

    def on(self, axis: int) -> Split:
        """The same division of another axis."""
        return dataclasses.replace(self, axis=axis)

    def times(self, factor: int) -> Split:
        """Of an axis each of whose places has become ``factor`` places."""
        ranges = tuple(tuple((a * factor, b * factor) for a, b in pieces) for pieces in self.ranges)
        return Split(self.axis, ranges, self.total * factor, self.outer)

    def over(self, factor: int) -> Split | None:
        """Of an axis with ``factor`` places in one; None where a rank has only part of one."""
        if any(place % factor for pieces in self.ranges for piece in pieces for place in piece):
            return None
        ranges = tuple(tuple((a // factor, b // factor) for a, b in pieces) for pieces in self.ranges)
        return Split(self.axis, ranges, self.total // factor, self.outer)

    def blocks(self, size: int) -> Split | None:
        """Of the blocks of ``size`` places, the last perhaps smaller; None where two ranks have parts of one."""
        if any(place % size and place != self.total for pieces in self.ranges for piece in pieces for place in piece):
            return None
        ranges = tuple(tuple((a // size, -(-b // size)) for a, b in pieces) for pieces in self.ranges)
        return Split(self.axis, ranges, -(-self.total // size), self.outer)

    def within(self, start: int, stop: int) -> Split | None:
        """Of the places [start, stop) taken out; None where a rank has none of them."""
        found: list[Ranges] = []
        for pieces in self.ranges:
            cut = [(max(a, start) - start, min(b, stop) - start) for a, b in pieces if a < stop and b > start]
            found.append(tuple(cut))
        return Split(self.axis, tuple(found), stop - start) if all(found) else None

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``Placement.edits``."""
        ranges = [[list(piece) for piece in pieces] for pieces in self.ranges]
        return {"axis": self.axis, "ranges": ranges, "total": self.total, "outer": self.outer}


def divide(axis: int, pieces: Sequence[int], ranks: int, unit: int = 1) -> Split:
    """Each of ``pieces`` divided over ``ranks`` as evenly as whole units go: a rank has a part of every piece."""
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    start = 0
    for size in pieces:
        units = -(-size // unit)
        if units < ranks:
            what = "columns" if unit == 1 else f"columns in blocks of {unit}"
            raise CannotSplit(f"{size} {what} cannot be divided over {ranks} ranks")
        bounds = [start + min(size, units * rank // ranks * unit) for rank in range(ranks + 1)]
        for rank in range(ranks):
            ranges[rank].append((bounds[rank], bounds[rank + 1]))
        start += size
    return Split(axis, tuple(tuple(pieces) for pieces in ranges), start)


def reshape(split: Split, before: Sequence[int], after: Sequence[int]) -> Split:
    """The division after a Reshape from ``before`` to ``after``, whose dims are matched in groups of equal product.

    Raises:
        CannotSplit: the dims do not match, or a rank would have part of a head.
    """
    for old, new in _groups(before, after):
        if split.axis not in old:
            continue
        outer = math.prod(before[axis] for axis in old if axis < split.axis) * split.outer
        flat = split.times(math.prod(before[axis] for axis in old if axis > split.axis))
        target, left = new[0], outer  # what of the new dims repeats, and which one is divided
        while left > 1 and after[target] <= left and left % after[target] == 0 and target < new[-1]:
            left //= after[target]
            target += 1
        if left == 1:
            target = next((axis for axis in new if axis >= target and after[axis] > 1), target)
        inner = math.prod(after[axis] for axis in new if axis > target)
        found = flat.over(inner)
        if found is None:
            raise CannotSplit(f"{after[target] // left} heads cannot be divided over {len(split.ranges)} ranks", True)
        if left * found.total != after[target]:
            raise CannotSplit("a Reshape whose dims cannot be matched")
        return dataclasses.replace(found, axis=target, outer=left)
    raise CannotSplit("a Reshape whose dims cannot be matched")


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        old, new = [i], [j]
        left, right = before[i], after[j]
        while left != right:
            if left < right and i + 1 < len(before):
                i += 1
                old.append(i)
                left *= before[i]
            elif right < left and j + 1 < len(after):
                j += 1
                new.append(j)
                right *= after[j]
            else:
                return groups
        groups.append((old, new))
        i, j = i + 1, j + 1
    return groups


Found = dict[ir.Value, Split]


def first(sharder: Sharder, node: ir.Node) -> tuple[ir.Value, Split]:
    """The first input of ``node``, which must be divided, and its division.

    Raises:
        CannotSplit: it is whole.
    """
    value = node.inputs[0]
    if value is None or value not in sharder.splits:
        raise CannotSplit(f"{node.op_type} has its first input whole and another one divided")
    return value, sharder.splits[value]
