"""Data parallelism: the rows of a batch, or many samples, over workers that all have the whole model."""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from ..benchmark import interleaved
from ..errors import ModelError, RuntimeUnavailable
from ..feeds import check_feeds
from ..rows import batch_inputs, count_rows, even_sizes, join_rows, split_rows
from ..session import Session
from .batcher import Batcher
from .workers import Array, Engine, Feeds, RayWorkers, ThreadWorkers, WorkerDied, Workers, resolve_engine

_AHEAD = 2  # shards a worker has at once: the next one waits where it is needed
_ROUNDS = 3  # of best_setting
_STREAM = 4  # batches a core in a round
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
        self._batcher: Batcher | None = None

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
        if isinstance(self.workers, ThreadWorkers) and progress is None:  # nobody dies, and hand-overs cost time
            sizes = even_sizes(rows, self.workers.count)
            return join_rows(self.workers.run_all(split_rows(inputs, names, sizes)), sizes)
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
            self._batcher = Batcher(self.workers, batch_inputs(self.inputs), largest, patience)
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


def best_setting(
    artifact: str | os.PathLike[str], inputs: Mapping[str, Array], seconds: float = 3.0
) -> tuple[int, int]:
    """The fastest (workers, threads of each) for a stream of batches like ``inputs`` on this machine's cores.

    Each setting runs alone, in turns, and takes the batches through ``DataParallel.map``.

    Args:
        artifact: path of a ``.onnx`` file.
        inputs: a batch.
        seconds: about how long to measure, opening not counted.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = [(cores // threads, threads) for threads in range(1, cores + 1) if cores % threads == 0]
    stream = [inputs] * _STREAM * cores
    times: dict[tuple[int, int], list[float]] = {setting: [] for setting in settings}
    for _ in range(_ROUNDS):
        for workers, threads in settings:  # one open at a time: idle sessions' threads would take its cores
            with DataParallel(artifact, workers, threads=threads, engine="threads") as parallel:
                budget = seconds / _ROUNDS / len(settings)
                timing = interleaved([lambda parallel=parallel: list(parallel.map(stream))], budget=budget)[0]
            times[workers, threads].append(timing.median)
    return min(settings, key=lambda setting: statistics.median(times[setting]))
