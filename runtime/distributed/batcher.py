"""Dynamic batching: rows of many callers run together."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from typing import Any

import numpy as np

from ..errors import ModelError
from ..rows import count_rows
from .workers import Array, Feeds, Workers


class Batcher:
    """Collects rows for a moment, runs them as one batch, and hands the results back.

    Args:
        workers: who runs them, in turns.
        names: the inputs that have a row for each item.
        largest: rows that run together at most.
        patience: seconds that the first of them waits for others.
    """

    def __init__(self, workers: Workers, names: list[str], largest: int, patience: float) -> None:
        self._workers, self._names = workers, names
        self._largest, self._patience = largest, patience
        self._waiting: queue.Queue[tuple[Feeds, Future[dict[str, Array]]] | None] = queue.Queue()
        self._next = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add(self, row: Feeds) -> Future[dict[str, Array]]:
        """Puts rows on the list; the future has their outputs."""
        future: Future[dict[str, Array]] = Future()
        self._waiting.put((row, future))
        return future

    def close(self) -> None:
        """Runs what waits, then ends."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            group, rows = [item], count_rows(item[0], self._names)
            until = time.monotonic() + self._patience
            last: Any = ()
            while rows < self._largest and (left := until - time.monotonic()) > 0:
                try:
                    last = self._waiting.get(timeout=left)
                except queue.Empty:
                    break
                if last is None:
                    break
                group.append(last)
                rows += count_rows(last[0], self._names)
            for members in _alike(group, self._names):
                self._run(members)
            if last is None:
                return

    def _run(self, members: list[tuple[Feeds, Future[dict[str, Array]]]]) -> None:
        feeds = [feeds for feeds, _ in members]
        sizes = [count_rows(item, self._names) for item in feeds]
        batch = {
            name: np.concatenate([item[name] for item in feeds]) if name in self._names else array
            for name, array in feeds[0].items()
        }
        self._next = (self._next + 1) % self._workers.count
        running = self._workers.submit(self._next, batch)
        running.add_done_callback(lambda future: _hand_out(future, [future for _, future in members], sizes))


def _alike(
    group: list[tuple[Feeds, Future[dict[str, Array]]]], names: list[str]
) -> list[list[tuple[Feeds, Future[dict[str, Array]]]]]:
    """Members whose rows have one shape, and whose other inputs are equal."""
    found: dict[Any, list[tuple[Feeds, Future[dict[str, Array]]]]] = {}
    for feeds, future in group:
        key = tuple((n, a.shape[1:] if n in names else a.tobytes()) for n, a in sorted(feeds.items()))
        found.setdefault(key, []).append((feeds, future))
    return list(found.values())


def _hand_out(done: Future[dict[str, Array]], members: list[Future[dict[str, Array]]], sizes: list[int]) -> None:
    try:
        whole = done.result()
        ends = np.cumsum([0, *sizes])
        for name, array in whole.items():
            if len(array) != ends[-1]:
                raise ModelError(f"Output {name!r} has not a row for each input row.", "Run the model whole.")
    except Exception as error:
        for member in members:
            member.set_exception(error)
        return
    for member, start, end in zip(members, ends[:-1], ends[1:], strict=True):
        member.set_result({name: array[start:end] for name, array in whole.items()})
