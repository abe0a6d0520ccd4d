"""Stages of a divided model in one process: as one session, or as a pipeline with a thread for each."""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from ..errors import ModelError
from ..feeds import check_feeds
from ..generation.causal_lm import CausalLM
from ..generation.generate import Runnable
from ..providers import resolve_device
from ..rows import batch_inputs, count_rows, even_sizes, join_rows, split_rows
from .opening import Divided, open_part
from .parted import PartedBinding, PartedSession

Array = np.ndarray[Any, Any]
_WAITING = 2  # micro-batches that may wait in front of a stage


@dataclasses.dataclass(frozen=True)
class PipelineReport:
    """How a pipeline did.

    Attributes:
        micro_batches: how many ran.
        seconds: from the first's start to the last's end.
        busy: seconds that each stage worked.
    """

    micro_batches: int
    seconds: float
    busy: tuple[float, ...]

    @property
    def expected_bubble(self) -> float:
        """The part of the time that stages of equal cost wait: (k - 1) / (m + k - 1)."""
        stages = len(self.busy)
        return (stages - 1) / (self.micro_batches + stages - 1) if self.micro_batches else 0.0

    @property
    def bubble(self) -> float:
        """The part of the time that the stages waited."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds) if self.seconds else 0.0

    @property
    def balance(self) -> float:
        """Mean over slowest stage; 1: all equal."""
        return sum(self.busy) / len(self.busy) / max(self.busy) if max(self.busy, default=0.0) else 1.0


class StagedSession(Divided):
    """A folder of ``save_stages``, run in this process.

    ``run`` and ``generate`` go through the stages one after the other. ``run_many`` and ``run_batch`` keep all stages
    busy with a thread each; ``report`` then says how well. Each stage keeps its own key/value cache. Raises what
    ``Divided`` does.

    Args:
        folder: stages and manifest.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        threads: intra-op threads of each stage, 0 for ONNX Runtime's default.
    """

    kind: ClassVar[Literal["stages", "ranks"]] = "stages"

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu", threads: int = 0) -> None:
        super().__init__(folder)
        self.device = resolve_device(device)
        self.report: PipelineReport | None = None
        numbers = range(len(self.manifest.parts))
        steps = [step for n in numbers for step in open_part(Path(folder), self.manifest, n, self.device, threads)]
        self._parted = PartedSession(steps, self.outputs, self.device)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the stages one after the other.

        Raises:
            ModelError: wrong names, dtypes or shapes, or a failure inside ONNX Runtime.
        """
        check_feeds(self.inputs, inputs, "the inputs of run()")
        return self._parted.run(inputs)

    def run_batch(self, inputs: Mapping[str, Array], micro_batches: int) -> dict[str, Array]:
        """Runs a batch through the pipeline in ``micro_batches`` shards of rows.

        Raises:
            ModelError: as ``run``, or the model has no batch that can be divided.
        """
        check_feeds(self.inputs, inputs, "the inputs of run_batch()")
        names = batch_inputs(self.inputs)
        sizes = even_sizes(count_rows(inputs, names), micro_batches)
        return join_rows(self.run_many(split_rows(inputs, names, sizes)), sizes)

    def run_many(self, samples: Iterable[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Runs samples through the pipeline: each stage works on another one. Results are in the order of the samples.

        At most a few samples are read ahead of the first stage.

        Raises:
            ModelError: as ``run``; the samples behind are not run then.
        """
        run = _Run(self._parted)
        for sample in samples:
            check_feeds(self.inputs, sample, "a sample of run_many()")
            if not run.give(sample):
                break
        results = run.finish()
        self.report = run.report()
        return results

    def _generator(self) -> tuple[Runnable, CausalLM]:
        return self._parted, self._language_model()


class _Run:
    """One run of a pipeline: a thread a stage, a short queue in front of each."""

    def __init__(self, parted: PartedSession) -> None:
        self._parted = parted
        stages = len(parted.steps)
        self._queues = [queue.Queue[PartedBinding | None](_WAITING) for _ in range(stages)]
        self._busy = [0.0] * stages
        self._results: list[dict[str, Array]] = []
        self._failed: list[Exception] = []
        self._start = time.perf_counter()
        self._threads = [threading.Thread(target=self._work, args=(number,), daemon=True) for number in range(stages)]
        for thread in self._threads:
            thread.start()

    def give(self, sample: Mapping[str, Array]) -> bool:
        """Puts a sample in front of the first stage, waiting for room; False after a failure."""
        binding = self._parted.io_binding()
        for name, array in sample.items():
            binding.bind_cpu_input(name, array)
        for name in self._parted.outputs:
            binding.bind_output(name, "cpu")
        self._queues[0].put(binding)
        return not self._failed

    def finish(self) -> list[dict[str, Array]]:
        """Waits for all samples; returns their results."""
        self._queues[0].put(None)
        for thread in self._threads:
            thread.join()
        self._seconds = time.perf_counter() - self._start
        if self._failed:
            raise ModelError(
                f"ONNX Runtime failed in a stage: {str(self._failed[0]).splitlines()[0]}",
                "Check the sample against the manifest.",
            ) from self._failed[0]
        return self._results

    def report(self) -> PipelineReport:
        """After ``finish``."""
        return PipelineReport(len(self._results), self._seconds, tuple(self._busy))

    def _work(self, number: int) -> None:
        """The thread of a stage. After a failure it only empties its queue, so that nobody waits for ever."""
        last = number == len(self._queues) - 1
        while (binding := self._queues[number].get()) is not None:
            if self._failed:
                continue
            start = time.perf_counter()
            try:
                self._parted.run_step(number, binding)
            except Exception as error:
                self._failed.append(error)
                continue
            self._busy[number] += time.perf_counter() - start
            if last:
                arrays = (value.numpy() for value in binding.get_outputs())
                self._results.append(dict(zip(self._parted.outputs, arrays, strict=True)))
            else:
                self._queues[number + 1].put(binding)
        if not last:
            self._queues[number + 1].put(None)
