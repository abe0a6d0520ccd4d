"""One side of the survey, alone in its process; requests as in ``worker.py``.

    PYTHON benchmarks/survey_worker.py KIND MODEL THREADS

KIND is words: ``run`` or ``bound`` (inputs and results stay in arrays that are bound once), and a number of workers
that share one session of THREADS threads. A sample is an ``.npz`` of the model's inputs, whose rows run in batches of
``batch``; or ``prompt`` int64 [rows, tokens] and ``new``: texts, a row at a time, by ``Session.generate``, or with
``plain`` in KIND with caches that come out as arrays and go in again, as a graph is run without binding.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from worker import Feeds, serve

import onnxlathe as lathe


class Stream:
    """Rows through one session, a batch after the other, each worker its share of the batches."""

    def __init__(self, kind: str, model: str, threads: int) -> None:
        words = kind.split()
        self._bound, self._workers = "bound" in words, int(words[-1])
        self._session = lathe.Session(model, threads=threads)
        self._pool = ThreadPoolExecutor(self._workers)
        self._feeds: Feeds = {}
        self._runs: list[Callable[[], Any]] = []

    def __call__(self, feeds: Feeds) -> Any:
        if feeds is not self._feeds:
            self._prepare(feeds)
        return np.concatenate([run() for run in self._runs])

    def timed(self, feeds: Feeds, count: int) -> list[float]:
        """Seconds of each pass over all rows; results are not put together."""
        if feeds is not self._feeds:
            self._prepare(feeds)
        shares = np.array_split(np.arange(len(self._runs)), self._workers)
        times: list[float] = []
        for _ in range(count):
            start = time.perf_counter()
            if self._workers == 1:
                self._some(shares[0])
            else:
                list(self._pool.map(self._some, shares))
            times.append(time.perf_counter() - start)
        return times

    def _some(self, numbers: Any) -> None:
        for number in numbers:
            self._runs[number]()

    def _prepare(self, feeds: Feeds) -> None:
        rows = {name: array for name, array in feeds.items() if name != "batch"}
        count, batch = len(next(iter(rows.values()))), int(feeds["batch"])
        size = min(batch, -(-count // self._workers))  # one large batch is divided over the workers
        parts = [{name: array[at : at + size] for name, array in rows.items()} for at in range(0, count, size)]
        self._runs, self._feeds = [self._bind(part) if self._bound else self._plain(part) for part in parts], feeds

    def _plain(self, part: Feeds) -> Callable[[], Any]:
        return lambda: self._session.ort.run(None, part)[0]

    def _bind(self, part: Feeds) -> Callable[[], Any]:
        """Inputs and outputs stay where they are."""
        binding, ort = self._session.ort.io_binding(), self._session.ort
        outputs = {name: np.empty_like(array) for name, array in self._session.run(part).items()}
        for name, array in part.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
        result = next(iter(outputs.values()))

        def run() -> Any:
            ort.run_with_iobinding(binding)
            return result

        return run


class Texts:
    """Greedy texts through one session, as many at once as there are workers."""

    def __init__(self, kind: str, model: str, threads: int) -> None:
        words = kind.split()
        self._plain, self._workers = "plain" in words, int(words[-1])
        self._session = lathe.Session(model, threads=threads)
        self._pool = ThreadPoolExecutor(self._workers)

    def __call__(self, feeds: Feeds) -> Any:
        new = int(feeds["new"])
        text = self._copying if self._plain else lambda row, new: self._session.generate(row, new, eos=())
        return np.stack(list(self._pool.map(lambda row: text(row, new), feeds["prompt"])))

    def _copying(self, prompt: Any, new: int) -> Any:
        """Caches come out as new arrays and go in again."""
        caches = {v.name: v for v in self._session.inputs if v.name and v.name.startswith("past")}
        shapes = {name: [1, value.shape[1], 0, value.shape[3]] for name, value in caches.items() if value.shape}
        past: Feeds = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        ids, length, tokens = prompt[None], 0, []
        for _ in range(new):
            total = length + ids.shape[1]
            feeds = {"input_ids": ids, "attention_mask": np.ones((1, total), np.int64), **past}
            if any(value.name == "position_ids" for value in self._session.inputs):
                feeds["position_ids"] = np.arange(length, total)[None]
            results = self._session.ort.run(None, feeds)
            named = dict(zip(self._session.outputs, results, strict=True))
            ids = named["logits"][:, -1:].argmax(-1)
            tokens.append(int(ids[0, 0]))
            past = {name: named[name.replace("past_key_values", "present")] for name in past}
            length = total
        return np.array(tokens)


if __name__ == "__main__":
    kind, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    try:
        serve(Texts(kind, model, threads) if "text" in kind else Stream(kind, model, threads))
    except lathe.LatheError as error:
        print(json.dumps({"failure": str(error)}), file=sys.stderr)
        raise
