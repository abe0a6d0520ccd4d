"""A process of a search: compiles one candidate, or times one model, alone and stoppable.

    python -m onnxlathe.optimizing.worker compile REQUEST.pickle
    python -m onnxlathe.optimizing.worker time MODEL DEVICE THREADS

Answers are lines of JSON on stdout. ``compile`` says ``{"progress": text}`` now and then, and at last
``{"done": true}`` or ``{"error": [what, remedy]}``. ``time`` reads requests on stdin, ``{"load": path of an .npz}`` and
``{"seconds": about how long}``, and answers with the median seconds of what it ran: ``{"": ...}``, of a decoder
``{"prompt": ..., "token": ...}``.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxlathe.compiler.base import Pass
from onnxlathe.runtime.errors import LatheError
from onnxlathe.runtime.feeds import load_feeds
from onnxlathe.runtime.session import Session

_LEAST = 3


@dataclasses.dataclass(frozen=True)
class Request:
    """One compile.

    Attributes:
        source: the model.
        target: where the result goes.
        passes: what to do.
        gate: whether each pass is measured.
        calibration: a folder of samples, None without.
        device, threads, seed: as of ``compile``.
    """

    source: str
    target: str
    passes: Sequence[str | Pass]
    gate: bool
    calibration: str | None
    device: str
    threads: int
    seed: int


def compile_one(request: Request, tell: Callable[[dict[str, Any]], None]) -> None:
    """Compiles and saves; what goes wrong is told, not raised."""
    from onnxlathe.api import compile

    try:
        out = compile(
            request.source,
            request.passes,
            target=request.device,
            threads=request.threads,
            calibration=request.calibration,
            speed_gate=request.gate,
            on_error="skip",
            seed=request.seed,
            progress=lambda text: tell({"progress": text}),
        )
        out.save(request.target)
    except LatheError as error:
        return tell({"error": [error.what, error.remedy]})
    tell({"done": True})


class Timer:
    """Runs one model on one sample."""

    def __init__(self, model: str, device: str, threads: int) -> None:
        self._session = Session(model, device, threads)
        self._run: Callable[[], dict[str, float]] = dict

    def load(self, path: str) -> None:
        """Takes a sample, and warms up on it."""
        sample = load_feeds(Path(path))[0]
        if "prompt" in sample and "new" in sample:
            prompts, new = list(sample["prompt"]), int(sample["new"])
            self._run = lambda: self._text(prompts, new)
        else:
            self._session.run(sample)  # checks it
            known = {value.name for value in self._session.inputs}
            feeds = {name: array for name, array in sample.items() if name in known}
            self._run = lambda: self._once(feeds)
        self.measure(0.1)

    def measure(self, seconds: float) -> dict[str, float]:
        """Medians of runs for about so long; the first, which wakes the threads, does not count."""
        self._run()
        found: list[dict[str, float]] = []
        end = time.perf_counter() + seconds
        while len(found) < _LEAST or time.perf_counter() < end:
            found.append(self._run())
        return {key: statistics.median(each[key] for each in found) for key in found[0]}

    def _once(self, feeds: dict[str, Any]) -> dict[str, float]:
        start = time.perf_counter()
        self._session.ort.run(None, feeds)
        return {"": time.perf_counter() - start}

    def _text(self, prompts: list[Any], new: int) -> dict[str, float]:
        """Time to the first token of the last row, and between its tokens."""
        times: list[float] = []

        def on_token(row: int, token: int) -> None:
            if row == len(prompts) - 1:
                times.append(time.perf_counter())

        start = time.perf_counter()
        self._session.generate(prompts, new, eos=(), on_token=on_token)
        return {"prompt": times[0] - start, "token": float(np.median(np.diff(times)))}


def main() -> None:
    """Serves what the command line says."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing that a library prints gets between the answers

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    if sys.argv[1] == "compile":
        return compile_one(pickle.loads(Path(sys.argv[2]).read_bytes()), tell)
    try:
        timer = Timer(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        tell({"ready": True})
        for line in sys.stdin:
            request = json.loads(line)
            if "load" in request:
                timer.load(request["load"])
                tell({"ready": True})
            else:
                tell(timer.measure(request["seconds"]))
    except LatheError as error:
        tell({"error": [error.what, error.remedy]})


if __name__ == "__main__":
    main()
