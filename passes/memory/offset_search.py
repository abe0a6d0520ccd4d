"""Exact search for offsets within a capacity: two searches take turns, as each is quick where the other is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .canonical_search import CanonicalSearch, parts_in_time
from .precedence_search import PrecedenceSearch

Array = np.ndarray[Any, Any]
Progress = Callable[[str], None]

LARGEST = 600  # buffers of one part that are searched
# Orders of the buffers (W lifetime, A area, T fullest moment, Z size; largest first); each also with waste in front.
_ORDERS = ("TAW", "TWA", "WAT", "ZTW")


def search_offsets(
    start: Array, end: Array, size: Array, capacity: int, deadline: float, progress: Progress
) -> Array | None:
    """Offsets with which all buffers end at or below ``capacity``.

    Args:
        start, end: int64 [n], lifetimes as half-open intervals.
        size: int64 [n], positive.
        capacity: bytes there are.
        deadline: ``time.monotonic()`` at which to give up.
        progress: told what is being tried.

    Returns:
        Offsets int64 [n]; None where there are none, where the time was not enough, or where a part has more than
        ``LARGEST`` buffers.
    """
    offsets = np.zeros(len(start), np.int64)
    for part in parts_in_time(start, end, np.arange(len(start))):
        if len(part) > LARGEST:
            return None
        found = _search_part(start[part], end[part], size[part], capacity, deadline, progress)
        if found is None:
            return None
        offsets[part] = found
    return offsets


def _search_part(
    start: Array, end: Array, size: Array, capacity: int, deadline: float, progress: Progress
) -> Array | None:
    """Both searches in turn, the one that had less time so far first, until one has an answer."""
    times = np.unique(np.concatenate([start, end]))
    first, last = np.searchsorted(times, start), np.searchsorted(times, end)
    searches = [_canonical(first, last, end - start, size, capacity, deadline)]
    moments = np.arange(int(last.max()))
    rank = np.empty_like(size)
    rank[_order(first, last, end - start, size, _ORDERS[0])] = np.arange(len(size))
    precedence = PrecedenceSearch((first[:, None] <= moments) & (moments < last[:, None]), size, capacity, rank)
    if not precedence.too_large:
        searches.append(_precedence(precedence, deadline))
    used = [0.0] * len(searches)
    while time.monotonic() < deadline:
        turn = used.index(min(used))
        begin = time.monotonic()
        what, decided, offsets = next(searches[turn])
        used[turn] += time.monotonic() - begin
        progress(f"offsets: {len(start)} buffers, {what}")
        if decided:
            return offsets
    return None


_Turns = Iterator[tuple[str, bool, Array | None]]  # what was tried, whether that decides it, offsets


def _canonical(first: Array, last: Array, duration: Array, size: Array, capacity: int, deadline: float) -> _Turns:
    """Several orders in turn, each with a growing number of nodes, as a good order needs few."""
    limit = 2 * len(size)
    while True:
        for wasteful in (True, False):
            for keys in _ORDERS:
                order = _order(first, last, duration, size, keys)
                search = CanonicalSearch(
                    first[order], last[order], size[order], capacity, not wasteful, limit, deadline
                )
                found = search.run()
                offsets = np.empty_like(size)
                offsets[order] = search.offsets
                yield f"from the bottom, {keys}, {limit} nodes", found is not None, offsets if found else None
        limit *= 2


def _precedence(search: PrecedenceSearch, deadline: float) -> _Turns:
    for number, offsets in enumerate(search.runs(deadline)):
        yield f"precedences, start {number + 1}", offsets is not None, offsets
    yield "precedences: there are none", True, None


def _order(first: Array, last: Array, duration: Array, size: Array, keys: str) -> Array:
    load = np.zeros(int(last.max()) + 1, np.int64)
    np.add.at(load, first, size)
    np.add.at(load, last, -size)
    load = np.cumsum(load)
    fullest = np.array([load[a:b].max() for a, b in zip(first, last, strict=True)])
    values = {"W": duration, "A": duration * size, "T": fullest, "Z": size}
    return np.lexsort([np.arange(len(size)), *(-values[key] for key in reversed(keys))])
