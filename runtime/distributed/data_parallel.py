"""Data parallelism: the rows of a batch, or many samples, over workers that all have the whole model."""

from __future__ import annotations

import dataclasses
import functools
import os
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import numpy as np

from ..benchmark import interleaved
from ..errors import ModelError, RuntimeUnavailable
from ..feeds import check_feeds
from ..rows import batch_inputs, count_rows, even_sizes, join_rows, split_rows
from ..session import Session
from .workers import Engine, Feeds, RayWorkers, ThreadWorkers, WorkerDied, Workers, resolve_engine

Array = np.ndarray[Any, Any]
_AHEAD = 2  # shards a worker has at once: the next one waits where it is needed
_ROUNDS = 3  # of best_setting
_SHARDS = 2  # shards of a batch for each worker, so that a slow one does not hold up the rest


@dataclasses.dataclass(frozen=True)
class _Shard:
    """Rows that a worker has: which, whose, in which of its lives, and whether they ran before."""

    index: int
    feeds: Feeds
    worker: int
    life: int
    again: bool


_Running = dict[Future[dict[str, Array]], _Shard]


class DataParallel:
    """A model on several workers.

    Results are in the order of what was given, each row once. Nothing is read far ahead of what runs. If a worker dies,
    a new one takes its place and its shard runs once more, on another worker; if that one dies, too, it is an error.

    Args:
        artifact: path of a ``.onnx`` file; every machine needs it there.
        workers: how many; ``best_setting`` measures how many pay.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"`` of each worker.
        threads: intra-op threads of each worker.
        engine: ``"threads"`` of this process, ``"ray"``, or ``"auto"``: Ray where a cluster is connected.

    Attributes:
        session: a session of this process, for what needs the whole model.
        inputs: of the model.
        engine: what was taken.

    Raises:
        ModelError: no such file, or not a model.
        RuntimeUnavailable: Ray or the device is not there, or the workers do not start.
    """

    def __init__(
        self,
        artifact: str | os.PathLike[str],
        workers: int = 2,
        device: str = "cpu",
        threads: int = 1,
        *,
        engine: Engine = "auto",
    ) -> None:
        if workers < 1 or threads < 0:
            raise ModelError(f"{workers} workers with {threads} threads.", "Give at least one worker.")
        self.session = session = Session(artifact, device, threads)
        self.inputs = list(session.inputs)
        self.engine = resolve_engine(engine)
        self.workers: Workers
        if self.engine == "ray":
            self.workers = RayWorkers(Path(artifact), workers, session.device, threads)
        else:
            self.workers = ThreadWorkers(session, workers)
        self._lives = [0] * workers  # how often each was started again
        self._batcher: _Batcher | None = None

    @property
    def restarts(self) -> int:
        """Workers that died and were started again."""
        return sum(self._lives)

    def __enter__(self) -> DataParallel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        if self._batcher is not None:
            self._batcher.close()
        self.workers.close()

    def run(self, inputs: Feeds, progress: Callable[[int, int], object] | None = None) -> dict[str, Array]:
        """Runs a batch, its rows divided over the workers.

        Args:
            inputs: as for ``Session.run``; the batch is the first dim of each input that has it.
            progress: called with (rows done, rows) as shards are done.

        Raises:
            ModelError: wrong inputs, a model without a batch dim, or a failure inside ONNX Runtime.
            RuntimeUnavailable: workers died twice on the same rows.
        """
        names = batch_inputs(self.inputs)
        if not set(names) <= set(inputs):
            check_feeds(self.inputs, inputs, "the inputs of run()")  # says which are missing
        rows = count_rows(inputs, names)
        sizes = even_sizes(rows, self.workers.count * _SHARDS)
        results: list[dict[str, Array]] = []
        for result in self.map(split_rows(inputs, names, sizes)):
            results.append(result)
            if progress is not None:
                progress(sum(sizes[: len(results)]), rows)
        return join_rows(results, sizes)

    def map(self, samples: Iterable[Feeds]) -> Iterator[dict[str, Array]]:
        """Runs samples, several at once; results come in their order.

        At most a few samples for each worker are read before their results are taken.
        """
        source = enumerate(samples)
        limit = _AHEAD * self.workers.count
        load = [0] * self.workers.count
        running: _Running = {}
        done: dict[int, dict[str, Array]] = {}
        following = 0
        exhausted = False
        while True:
            while not exhausted and len(running) + len(done) < 2 * limit and min(load) < _AHEAD:
                item = next(source, None)
                if item is None:
                    exhausted = True
                    break
                self._start(*item, load, running)
            if not running and not done:
                return
            if running:
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    self._finish(future, load, running, done)
            while following in done:
                yield done.pop(following)
                following += 1

    def submit(self, row: Feeds, *, largest: int = 32, patience: float = 0.005) -> Future[dict[str, Array]]:
        """Runs a small batch together with those that others submit at about the same time.

        Args:
            row: inputs with one row or a few.
            largest: rows that run together at most.
            patience: seconds that the first of them waits for others.

        Returns:
            a future of the outputs of these rows.
        """
        check_feeds(self.inputs, row, "the inputs of submit()")
        if self._batcher is None:
            self._batcher = _Batcher(self, batch_inputs(self.inputs), largest, patience)
        return self._batcher.add(row)

    def _start(
        self,
        index: int,
        feeds: Feeds,
        load: list[int],
        running: _Running,
        failed: int | None = None,
    ) -> None:
        """Gives a shard to the worker with least to do; after a failure to another one, if there is."""
        workers = [w for w in range(len(load)) if w != failed] or [0]
        worker = min(workers, key=lambda w: load[w])
        load[worker] += 1
        shard = _Shard(index, feeds, worker, self._lives[worker], failed is not None)
        running[self.workers.submit(worker, feeds)] = shard

    def _finish(
        self,
        future: Future[dict[str, Array]],
        load: list[int],
        running: _Running,
        done: dict[int, dict[str, Array]],
    ) -> None:
        shard = running.pop(future)
        load[shard.worker] -= 1
        try:
            done[shard.index] = future.result()
        except WorkerDied as error:
            if shard.again:
                raise RuntimeUnavailable(
                    f"Two workers died on the same rows (shard {shard.index}): {error}.",
                    "Give smaller batches, or see Ray's logs.",
                ) from error
            if self._lives[shard.worker] == shard.life:  # the first of its shards to fail
                self._lives[shard.worker] += 1
                self.workers.restart(shard.worker)
            self._start(shard.index, shard.feeds, load, running, failed=shard.worker)


class _Batcher:
    """Collects rows for a moment, runs them as one batch, and hands the results back."""

    def __init__(self, parallel: DataParallel, names: list[str], largest: int, patience: float) -> None:
        self._parallel, self._names = parallel, names
        self._largest, self._patience = largest, patience
        self._waiting: queue.Queue[tuple[Feeds, Future[dict[str, Array]]] | None] = queue.Queue()
        self._next = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add(self, row: Feeds) -> Future[dict[str, Array]]:
        future: Future[dict[str, Array]] = Future()
        self._waiting.put((row, future))
        return future

    def close(self) -> None:
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
        self._next = (self._next + 1) % self._parallel.workers.count
        running = self._parallel.workers.submit(self._next, batch)
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


def best_setting(
    artifact: str | os.PathLike[str], inputs: Mapping[str, Array], seconds: float = 3.0
) -> tuple[int, int]:
    """The fastest (workers, threads of each) for batches like ``inputs`` on this machine's cores, measured in turns.

    Args:
        artifact: path of a ``.onnx`` file.
        inputs: a batch.
        seconds: about how long to measure, opening not counted.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = [(cores // threads, threads) for threads in range(1, cores + 1) if cores % threads == 0]
    times: dict[tuple[int, int], list[float]] = {setting: [] for setting in settings}
    for _ in range(_ROUNDS):
        for workers, threads in settings:  # one open at a time: idle sessions' threads would take its cores
            with DataParallel(artifact, workers, threads=threads, engine="threads") as parallel:
                budget = seconds / _ROUNDS / len(settings)
                timing = interleaved([functools.partial(parallel.run, inputs)], budget=budget)[0]
            times[workers, threads].append(timing.median)
    return min(settings, key=lambda setting: statistics.median(times[setting]))
