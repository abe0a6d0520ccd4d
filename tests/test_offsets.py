"""Offsets: against brute force, on packings cut from a full rectangle, on the public hard instances."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxlathe.passes.memory.canonical_search import CanonicalSearch
from onnxlathe.passes.memory.offset_search import search_offsets
from onnxlathe.passes.memory.offsets import Offsets, plan_offsets
from onnxlathe.passes.memory.precedence_search import PrecedenceSearch

_FOLDERS = [parent / "shared" / "data" / "minimalloc" for parent in Path(__file__).parents]
HARD = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[-1])
Lifetimes = list[tuple[int, int]]


def check(lifetimes: Lifetimes, sizes: list[int], found: Offsets) -> None:
    """No two that are alive together overlap, and the peak is what it is said to be."""
    boxes = list(zip(lifetimes, sizes, found.offsets, strict=True))
    for ((a, b), size, low), ((c, d), other, lower) in itertools.combinations(boxes, 2):
        together = a < d and c < b and size and other
        assert not together or low + size <= lower or lower + other <= low
    assert found.peak == max((low + size for _, size, low in boxes), default=0)
    assert found.bound <= found.peak and all(low >= 0 for low in found.offsets)


def best_peak(lifetimes: Lifetimes, sizes: list[int]) -> int:
    """The lowest peak there is: buffers pressed down in every order."""
    best = sum(sizes)
    for order in itertools.permutations(range(len(sizes))):
        offsets: dict[int, int] = {}
        for index in order:
            below = [
                offsets[other] + sizes[other]
                for other in offsets
                if lifetimes[other][0] < lifetimes[index][1] and lifetimes[index][0] < lifetimes[other][1]
            ]
            offsets[index] = max(below, default=0)
        best = min(best, max((offsets[index] + sizes[index] for index in offsets), default=0))
    return best


BUFFERS = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(BUFFERS)
def test_as_small_as_brute_force(buffers: list[tuple[int, int, int]]) -> None:
    lifetimes = [(start, start + length) for start, length, _ in buffers]
    sizes = [size for _, _, size in buffers]
    found = plan_offsets(lifetimes, sizes, time_limit=5)
    check(lifetimes, sizes, found)
    kept = [index for index, size in enumerate(sizes) if size]
    assert found.peak == best_peak([lifetimes[i] for i in kept], [sizes[i] for i in kept])


@settings(max_examples=60, deadline=None)
@given(BUFFERS)
def test_each_search_finds_what_there_is_and_proves_what_there_is_not(buffers: list[tuple[int, int, int]]) -> None:
    kept = [(start, start + length, size) for start, length, size in buffers if size]
    if not kept:
        return
    first, last, size = np.array(kept).T
    inside = (first[:, None] <= np.arange(11)) & (np.arange(11) < last[:, None])
    best = best_peak(list(zip(first.tolist(), last.tolist(), strict=True)), size.tolist())
    for capacity in (best, best - 1):
        bottom_up = CanonicalSearch(first, last, size, capacity, False, 10_000, time.monotonic() + 10)
        results = [bottom_up.offsets if bottom_up.run() else None]
        search = PrecedenceSearch(inside, size, capacity, np.arange(len(size)))
        results.append(next((found for found in search.runs(time.monotonic() + 10) if found is not None), None))
        for found in results:
            assert (found is not None) == (capacity == best)
            if found is not None:
                lifetimes = list(zip(first.tolist(), last.tolist(), strict=True))
                check(lifetimes, size.tolist(), Offsets(tuple(found.tolist()), best, 0, ""))


def cut(rng: np.random.Generator, width: int, height: int, count: int) -> tuple[Lifetimes, list[int]]:
    """A rectangle of time x memory cut into ``count`` smaller ones: they fit back without a gap."""
    pieces = [(0, width, height)]
    while len(pieces) < count:
        index = max(range(len(pieces)), key=lambda i: (pieces[i][1] - pieces[i][0]) * pieces[i][2] * rng.random())
        start, end, size = pieces.pop(index)
        if rng.random() < 0.5 and end - start > 1:
            middle = int(rng.integers(start + 1, end))
            pieces += [(start, middle, size), (middle, end, size)]
        elif size > 1:
            lower = int(rng.integers(1, size))
            pieces += [(start, end, lower), (start, end, size - lower)]
        else:
            pieces.append((start, end, size))
    return [(start, end) for start, end, _ in pieces], [size for _, _, size in pieces]


@pytest.mark.parametrize("seed", range(4))
def test_packings_without_a_gap_are_found(seed: int) -> None:
    lifetimes, sizes = cut(np.random.default_rng(seed), 40, 1000, 25)
    found = plan_offsets(lifetimes, sizes, capacity=1000, time_limit=30)
    check(lifetimes, sizes, found)
    assert found.peak == found.bound == 1000


@pytest.mark.parametrize("name", ["B", "F"])
def test_hard_instances_fit(name: str) -> None:
    path = HARD / f"{name}.csv"
    if not path.exists():
        pytest.skip("the MiniMalloc instances are not here; benchmarks/memory.py runs all of them")
    table = np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.int64)
    lifetimes = [(int(start), int(end)) for start, end in table[:, 1:3]]
    sizes = [int(size) for size in table[:, 3]]
    said: list[str] = []
    found = plan_offsets(lifetimes, sizes, capacity=1_048_576, time_limit=60, progress=said.append)
    check(lifetimes, sizes, found)
    assert found.peak <= 1_048_576 and found.method == "exact search" and said


def test_what_cannot_fit_is_proved() -> None:
    one = np.array([0, 0, 0])
    assert search_offsets(one, one + 1, np.array([3, 4, 5]), 11, time.monotonic() + 5, lambda _: None) is None


def test_the_time_limit_keeps_the_best_so_far() -> None:
    lifetimes, sizes = cut(np.random.default_rng(9), 300, 100_000, 200)
    start = time.monotonic()
    found = plan_offsets(lifetimes, sizes, time_limit=0.5)
    check(lifetimes, sizes, found)
    assert time.monotonic() - start < 10


def test_nothing_and_nonsense() -> None:
    assert plan_offsets([], []).peak == 0
    assert plan_offsets([(0, 0), (1, 3)], [5, 0]).peak == 0
    with pytest.raises(ValueError, match="1 lifetimes, 2 sizes"):
        plan_offsets([(0, 1)], [1, 2])
    with pytest.raises(ValueError, match="ends before"):
        plan_offsets([(2, 1)], [1])
