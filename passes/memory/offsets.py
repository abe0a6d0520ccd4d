"""Where in one arena each buffer goes: greedy first, then an exact search."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...compiler.base import no_progress
from .offset_search import Progress, search_offsets

Array = np.ndarray[Any, Any]
_FIRST, _HALVINGS = 0.1, 4


@dataclasses.dataclass(frozen=True)
class Offsets:
    """An assignment of offsets.

    Attributes:
        offsets: bytes from the start of the arena, one a buffer.
        peak: bytes of the arena.
        bound: the largest sum of sizes alive at one time; no assignment needs less.
        method: what found it.
    """

    offsets: tuple[int, ...]
    peak: int
    bound: int
    method: str


def plan_offsets(
    lifetimes: Sequence[tuple[int, int]],
    sizes: Sequence[int],
    capacity: int | None = None,
    time_limit: float = 10.0,
    progress: Progress = no_progress,
) -> Offsets:
    """Places buffers so that no two that are alive together overlap, in as little memory as is found.

    Greedy by size, area, lifetime and start come first (Pisarchyk & Lee, "Efficient memory management for deep neural
    net inference", 2020). Where they miss the bound, ``offset_search`` looks for better, until the time is over; the
    best so far is kept.

    Args:
        lifetimes: ``(start, end)`` of each buffer, half-open.
        sizes: bytes of each; the caller rounds them to its alignment.
        capacity: stop as soon as the arena is not larger than this; None: as small as possible. The result may be
            larger where nothing better was found: look at ``peak``.
        time_limit: seconds for the search.
        progress: told what is being tried.

    Raises:
        ValueError: lifetimes and sizes differ in number, or a lifetime or size is negative.
    """
    start, end, size = _arrays(lifetimes, sizes)
    size = np.where(end > start, size, 0)  # what is never alive needs no memory
    bound = lower_bound(start, end, size)
    target = max(bound, capacity if capacity is not None else bound)
    best, peak, method = np.zeros_like(size), int(size.sum()) + 1, "nothing to place"
    for name, order in _greedy_orders(start, end, size).items():
        offsets = place_greedily(start, end, size, order)
        height = int((offsets + size).max(initial=0))
        if height < peak:
            best, peak, method = offsets, height, name
        if peak <= target:
            break
    kept = size > 0
    begin = time.monotonic()
    # A tenth of the time for anything better, so that something is gained where the goal itself is too hard.
    for goal, share in (*[(None, _FIRST)] * _HALVINGS, (target, 1.0)):
        goal = (target + peak) // 2 if goal is None else goal
        until = begin + share * time_limit
        if peak <= target or time.monotonic() > until:
            continue
        found = search_offsets(start[kept], end[kept], size[kept], goal, until, progress)
        if found is not None:
            best = np.zeros_like(size)
            best[kept] = found
            peak, method = int((found + size[kept]).max()), "exact search"
    return Offsets(tuple(int(offset) for offset in best), peak if len(size) else 0, bound, method)


def lower_bound(start: Array, end: Array, size: Array) -> int:
    """The largest sum of sizes alive at one time, in bytes."""
    alive = end > start
    times, where = np.unique(np.concatenate([start[alive], end[alive]]), return_inverse=True)
    change = np.zeros(len(times), np.int64)
    np.add.at(change, where, np.concatenate([size[alive], -size[alive]]))
    return int(np.cumsum(change).max(initial=0))


def place_greedily(start: Array, end: Array, size: Array, order: Sequence[int] | Array) -> Array:
    """Offsets when buffers are placed in ``order``, each into the smallest gap that holds it, else on top.

    Args:
        start, end: int64 [n], half-open lifetimes.
        size: int64 [n].
        order: all indices.
    """
    offsets = np.zeros(len(size), np.int64)
    placed = np.zeros(len(size), bool)
    for index in order:
        if size[index] == 0 or end[index] <= start[index]:
            continue
        others = np.flatnonzero(placed & (start < end[index]) & (start[index] < end))
        placed[index] = True
        low = offsets[others]
        by_offset = np.argsort(low)
        low = low[by_offset]
        high = np.maximum.accumulate((offsets + size)[others][by_offset]) if len(others) else low
        floor = np.concatenate([[0], high])
        gaps = np.concatenate([low - floor[:-1], [np.iinfo(np.int64).max]])
        gaps[gaps < size[index]] = np.iinfo(np.int64).max
        fits = int(np.argmin(gaps[:-1])) if len(low) else 0
        taken = fits if len(low) and gaps[fits] < np.iinfo(np.int64).max else len(low)
        offsets[index] = floor[taken]
    return offsets


def _greedy_orders(start: Array, end: Array, size: Array) -> dict[str, Array]:
    width = end - start
    index = np.arange(len(size))
    return {
        "greedy by size": np.lexsort([index, -width, -size]),
        "greedy by area": np.lexsort([index, -size * width]),
        "greedy by lifetime": np.lexsort([index, -size, -width]),
        "best fit in order of start": np.lexsort([index, -size, start]),
    }


def _arrays(lifetimes: Sequence[tuple[int, int]], sizes: Sequence[int]) -> tuple[Array, Array, Array]:
    if len(lifetimes) != len(sizes):
        raise ValueError(f"{len(lifetimes)} lifetimes, {len(sizes)} sizes")
    times = np.asarray(lifetimes, np.int64).reshape(-1, 2)
    size = np.asarray(sizes, np.int64)
    if (size < 0).any() or (times[:, 1] < times[:, 0]).any():
        raise ValueError("a size is negative, or a lifetime ends before it starts")
    return times[:, 0], times[:, 1], size
