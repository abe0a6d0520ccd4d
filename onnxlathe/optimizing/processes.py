"""The processes of a search, from outside: killed when time is up, and asked in turns."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from onnxlathe.runtime.benchmark import Timing, paired_ratio
from onnxlathe.runtime.errors import LatheError, ModelError

from .worker import Request

_QUIET = 0.05
"""A spread of the rounds that is small enough."""


class OutOfTime(Exception):
    """The time given is over."""


class Child:
    """A process of ``worker.py``; killed at the latest when the block ends, or after ``seconds``."""

    def __init__(self, *arguments: str, seconds: float = math.inf) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "onnxlathe.optimizing.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
        )
        self._late = False
        self._timer = threading.Timer(seconds, self._stop) if math.isfinite(seconds) else None
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._process.kill()
        self._process.wait()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                pass  # the answer says what happened
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line it says.

        Raises:
            OutOfTime: it was stopped.
            LatheError: it failed on purpose, or died.
        """
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if self._late:
            raise OutOfTime
        if not line:
            code = self._process.wait()
            raise ModelError(f"The process that did it ended with code {code}.", "It may need more memory.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise LatheError(*answer["error"])
        return answer

    def _stop(self) -> None:
        self._late = True
        self._process.kill()


def compile_apart(request: Request, seconds: float, progress: Callable[[str], None]) -> None:
    """Compiles in a process of its own.

    Raises:
        OutOfTime: it took longer than ``seconds``.
        LatheError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "request.pickle"
        file.write_bytes(pickle.dumps(request))
        with Child("compile", str(file), seconds=seconds) as child:
            while "done" not in (answer := child.answer()):
                progress(answer["progress"])


class Race:
    """Two models timed in turns, each in a process of its own; while one runs, the other waits on a pipe."""

    def __init__(self, original: Path, device: str, threads: int) -> None:
        self._original, self._arguments = original, (device, str(threads))

    def run(
        self, candidate: Path, samples: Sequence[Path], *, rounds: int, turn: float, seconds: float = math.inf
    ) -> list[dict[str, tuple[float, float]]]:
        """How many times as fast ``candidate`` is on each sample, and the noise of that.

        Args:
            candidate: the other model.
            samples: what to run, one after the other.
            rounds: turns of each; up to three times as many where the machine is not quiet.
            turn: about how many seconds a turn takes.
            seconds: the most time for everything.

        Returns:
            For each sample ``{"": (median of the rounds' ratios, half their interquartile range over it)}``, of a
            decoder for its prompt and its tokens.

        Raises:
            OutOfTime: it took longer than ``seconds``.
            LatheError: a model does not run.
        """
        with (
            Child("time", str(self._original), *self._arguments, seconds=seconds) as one,
            Child("time", str(candidate), *self._arguments, seconds=seconds) as other,
        ):
            sides = (one, other)
            for side in sides:
                side.answer()
            return [self._sample(sides, sample, rounds, turn) for sample in samples]

    def _sample(
        self, sides: tuple[Child, Child], sample: Path, rounds: int, turn: float
    ) -> dict[str, tuple[float, float]]:
        for side in sides:
            side.ask(load=str(sample))
        times: dict[str, tuple[list[float], list[float]]] = {}
        found: dict[str, tuple[float, float]] = {}
        for number in range(3 * rounds):
            for index in (0, 1) if number % 2 else (1, 0):
                for key, seconds in sides[index].ask(seconds=turn).items():
                    times.setdefault(key, ([], []))[index].append(seconds)
            pairs = {key: [Timing(tuple(values)) for values in both] for key, both in times.items()}
            found = {key: paired_ratio(old, new) for key, (old, new) in pairs.items()}
            if number + 1 >= rounds and all(noise <= _QUIET for _, noise in found.values()):
                break
        return found
