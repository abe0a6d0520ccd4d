"""Exact search for offsets from the bottom up: canonical solutions, section bounds, dominance, decomposition in time.

The ideas are those of Moffitt, "MiniMalloc" (ASPLOS 2023, github.com/google/minimalloc, Apache-2.0); the code is ours.
What differs: all candidates of a node are judged at once, failed states are remembered, and candidates of one offset
may also be tried in the order of how little room they waste.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_FAR = np.int64(1) << 60
_SLACK = 0.02  # of the capacity: how near to it a section counts as full
_STEP = 50  # costs within 2 % of each other count as equal


class _LimitReached(Exception):
    pass


def parts_in_time(start: Array, end: Array, among: Array) -> list[Array]:
    """``among``, cut where nothing is alive; each part keeps the order of ``among``."""
    by_time = among[np.argsort(start[among], kind="stable")]
    reach = np.maximum.accumulate(end[by_time])
    cuts = np.flatnonzero(start[by_time][1:] >= reach[:-1]) + 1
    return [among] if not len(cuts) else [np.sort(part) for part in np.split(by_time, cuts)]


@dataclasses.dataclass(frozen=True)
class _State:
    """What is still to be placed of one part.

    Attributes:
        left: int64 [m], indices of the buffers, ascending.
        lowest: int64 [m], the lowest offset each can have.
        members, section: int [k], each buffer of ``left`` once for each section it lives in, by section.
        offset, index: of the buffer placed last; later ones follow in the order of (offset, index).
    """

    left: Array
    lowest: Array
    members: Array
    section: Array
    offset: int
    index: int


class CanonicalSearch:
    """Depth-first search over canonical solutions: buffers are placed in the order of their offsets, each as low as
    those below it allow, so that every packing pressed down is found once.

    Args:
        first, last: int64 [n], half-open range of sections (times between which nothing begins or ends).
        size: int64 [n].
        capacity: bytes.
        by_waste: whether candidates of one offset are tried in the order of wasted room, else in that of the buffers.
        limit: nodes to open at most.
        deadline: when to stop.
    """

    def __init__(
        self, first: Array, last: Array, size: Array, capacity: int, by_waste: bool, limit: int, deadline: float
    ) -> None:
        self.first, self.last, self.size, self.capacity = first, last, size, capacity
        self.by_waste, self.limit, self.deadline = by_waste, limit, deadline
        self.offsets = np.zeros_like(size)
        self.overlap = (first[:, None] < last) & (first < last[:, None]) & ~np.eye(len(size), dtype=bool)
        sections = np.arange(int(last.max()))
        self.inside = (first[:, None] <= sections) & (sections < last[:, None])
        self._sizes = self.inside * size[:, None]
        self.nodes = 0
        self._failed: set[bytes] = set()
        self._local = np.zeros(len(size), np.int64)
        self._twin = _twins(first, last, size)

    def run(self) -> bool | None:
        """Whether there is a solution, which is then in ``offsets``; None: not decided within the limits."""
        if self._sizes.sum(axis=0).max() > self.capacity:
            return False
        section, members = np.nonzero(self.inside.T)
        everything = np.arange(len(self.size))
        try:
            return self._solve(_State(everything, np.zeros_like(self.size), members, section, 0, 0))
        except (_LimitReached, RecursionError):  # one placement is a level of the search
            return None

    def _solve(self, state: _State) -> bool:
        self.nodes += 1
        if self.nodes > self.limit or time.monotonic() > self.deadline:
            raise _LimitReached
        key = _key(state)
        if key in self._failed:
            return False
        left, lowest = state.left, state.lowest
        if len(left) == 1:
            self.offsets[left[0]] = lowest[0]
            return bool(lowest[0] + self.size[left[0]] <= self.capacity)
        if not self._fits(state):
            self._failed.add(key)
            return False
        candidates, free = self._candidates(state)
        pushed = np.maximum(lowest, (lowest + self.size[left])[candidates, None])
        after = np.where(self.overlap[left[candidates]][:, left], pushed, lowest)
        for row in self._promising(state, candidates, after):
            position = candidates[row]
            chosen = left[position]
            self.offsets[chosen] = lowest[position]
            if all(self._solve(part) for part in self._rest(state, position, after[row], free)):
                return True
        self._failed.add(key)
        return False

    def _fits(self, state: _State) -> bool:
        """Whether each section has room for what is left in it, placed from the bottom up.

        Whoever could have been placed before the last one and was not lies on top of somebody who is still to come.
        """
        left, lowest = state.left, state.lowest
        size = self.size[left]
        passed = (lowest < state.offset) | ((lowest == state.offset) & (left < state.index))
        if passed.any():
            least = np.where(passed, _FAR, lowest + size).min()
            top = np.where(passed, least, lowest) + size
            support = np.where(self.overlap[left[passed]][:, left], top, _FAR).min(axis=1)
            lowest = lowest.copy()
            lowest[passed] = np.maximum(lowest[passed], support)
        order = np.argsort(lowest)
        sections = slice(int(self.first[left].min()), int(self.last[left].max()))
        sizes = self._sizes[left[order], sections]
        height = np.cumsum(sizes[::-1], axis=0)[::-1] + lowest[order, None]
        return bool((np.where(sizes > 0, height, 0) <= self.capacity).all())

    def _candidates(self, state: _State) -> tuple[Array, bool]:
        """Positions in ``state.left`` of what may be placed next, lowest first.

        Not what begins where another would already have ended (it would leave a gap the other fits into), and of
        buffers that are alike only the first. One that is in nobody's way is the only one; then the second is True.
        """
        left, lowest = state.left, state.lowest
        end = lowest + self.size[left]
        top = (np.maximum(lowest, state.offset) + self.size[left]).min()
        later = (lowest > state.offset) | ((lowest == state.offset) & (left >= state.index))
        self._local[:] = -1
        self._local[left] = np.arange(len(left))
        twin = self._twin[left]
        alike = (twin >= 0) & (self._local[twin] >= 0)
        found = np.flatnonzero(later & (lowest < top) & ~alike)
        in_the_way = (self.overlap[left[found]][:, left] & (lowest < end[found, None])).any(axis=1)
        if not in_the_way.all():
            return found[~in_the_way][:1], True
        return found[np.argsort(lowest[found], kind="stable")], False

    def _promising(self, state: _State, candidates: Array, after: Array) -> list[int]:
        """Rows of ``candidates`` that no section rules out, in the order to try them.

        What is left in a section starts at the lowest offset of its members at the earliest, and must fit above that.
        """
        if not len(candidates):
            return []
        left, here = state.left, state.lowest[candidates]
        floor = np.concatenate([np.maximum(after, here[:, None]), np.maximum(state.lowest, state.offset)[None]])
        floor[np.arange(len(candidates)), candidates] = _FAR
        begins = np.flatnonzero(np.diff(state.section, prepend=-1))
        total = np.add.reduceat(self.size[state.members], begins)
        placed = left[candidates]
        taken = self.inside[placed][:, state.section[begins]] * self.size[placed][:, None]
        rest = np.concatenate([total - taken, total[None]])
        lowest = np.minimum.reduceat(floor[:, self._local[state.members]], begins, axis=1)
        slack = np.where(rest > 0, self.capacity - lowest - rest, _FAR)
        good = np.flatnonzero((slack[:-1] >= 0).all(axis=1))
        if not self.by_waste:
            return good.tolist()
        cost = (1.0 / (np.maximum(slack, 0) + _SLACK * self.capacity)).sum(axis=1)
        rank = np.floor(np.log(cost[good] / cost[-1]) * _STEP)
        return good[np.lexsort([rank, here[good]])].tolist()

    def _rest(self, state: _State, position: int, after: Array, free: bool) -> list[_State]:
        """What is left when the buffer at ``position`` is placed, cut where nothing is alive; smallest part first.

        A buffer that is ``free``, in nobody's way, stands outside the order in which the others are placed.
        """
        chosen = int(state.left[position])
        offset, last = (state.offset, state.index) if free else (int(state.lowest[position]), chosen)
        left, lowest = np.delete(state.left, position), np.delete(after, position)
        kept = state.members != chosen
        members, section = state.members[kept], state.section[kept]
        parts = parts_in_time(self.first, self.last, left)
        if len(parts) == 1:
            return [_State(left, lowest, members, section, offset, last)]
        states: list[_State] = []
        for part in sorted(parts, key=len):
            inside = np.zeros(len(self.size), bool)
            inside[part] = True
            mine = inside[members]
            own = lowest[np.searchsorted(left, part)]
            states.append(_State(part, own, members[mine], section[mine], offset, last))
        return states


def _key(state: _State) -> bytes:
    """What decides whether a state can be completed: who is left, and how low each may be placed."""
    floor = np.maximum(state.lowest, state.offset)
    floor += (floor == state.offset) & (state.left < state.index)
    return state.left.astype(np.int16).tobytes() + floor.tobytes()


def _twins(first: Array, last: Array, size: Array) -> Array:
    """For each buffer the one before it with the same lifetime and size, or -1."""
    seen: dict[tuple[int, int, int], int] = {}
    twins = np.full(len(size), -1)
    for index, kind in enumerate(zip(first.tolist(), last.tolist(), size.tolist(), strict=True)):
        twins[index] = seen.get(kind, -1)
        seen[kind] = index
    return twins
