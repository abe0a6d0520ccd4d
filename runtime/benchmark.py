"""Honest timing: two or more runnables measured in turns, warm, medians, with the noise said."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one runnable.

    Attributes:
        rounds: the median of each round, in order.
    """

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.rounds)

    @property
    def noise(self) -> float:
        """Half the interquartile range of the rounds over their median."""
        return _half_spread(self.rounds)


def paired_ratio(old: Timing, new: Timing) -> tuple[float, float]:
    """Time of ``old`` over time of ``new``, and its noise.

    Rounds that ran next to each other are compared with each other, so that a machine that slows down for a while
    moves neither: the median of the ratios, and half their interquartile range over it.
    """
    ratios = [a / b for a, b in zip(old.rounds, new.rounds, strict=True)]
    return statistics.median(ratios), _half_spread(ratios)


def interleaved(
    runs: Sequence[Callable[[], object]], *, budget: float = 2.0, rounds: int = 9, least: int = 3
) -> list[Timing]:
    """Times ``runs`` in turns, so that a slow moment of the machine hits all of them.

    Each runnable is warmed up twice; then every round gives each a block of calls whose first call, disturbed by the
    one before (ONNX Runtime's threads of the idle session still spin), is not counted.

    Args:
        runs: functions to time.
        budget: seconds for everything, split evenly; at least ``least`` rounds are run.
        rounds: rounds wanted.
        least: rounds run even if the budget is exceeded.
    """
    once: list[float] = []
    for run in runs:
        run()
        once.append(min(_time(run) for _ in range(2)))
    share = budget / rounds / len(runs)
    calls = [max(1, min(200, int(share / max(seconds, 1e-7)) - 1)) for seconds in once]
    medians: list[list[float]] = [[] for _ in runs]
    started = time.perf_counter()
    for number in range(rounds):
        for index in range(len(runs)):
            position = (index + number) % len(runs)
            runs[position]()
            block = [_time(runs[position]) for _ in range(calls[position])]
            medians[position].append(statistics.median(block))
        if number + 1 >= least and time.perf_counter() - started > budget:
            break
    return [Timing(tuple(values)) for values in medians]


def fastest(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into ``seconds``, after a first one that is not counted."""
    run()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        best = min(best, _time(run))
    return best


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _half_spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, median, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / median if median else 0.0
