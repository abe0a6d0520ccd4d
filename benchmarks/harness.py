"""Honest comparisons: each side alone in its process, in turns, warm, medians; results as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from peers import python_of, versions

from onnxlathe.runtime.environment import environment
from onnxlathe.runtime.files import write_atomically

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def exported(name: str) -> ir.Model:
    """A model of the zoo as onnxlathe exports it, with its dynamic dims; a language model with its cache."""
    import onnxlathe as lathe
    from onnxlathe.models.zoo import build

    entry = build(name)
    if entry.kind == "causal-lm":
        return lathe.export_causal_lm(entry.module, check=False)
    return lathe.export(entry.module, entry.args, dynamic_shapes=entry.dynamic_shapes, check=False)


@dataclasses.dataclass
class Side:
    """One row of a comparison.

    Attributes:
        name: how it is called in the table.
        kind: what ``worker.py`` loads it with.
        model: path, or the zoo's name for PyTorch.
        python: environment, see ``peers.py``.
        note: what to know about it, e.g. how many attentions were fused.
        failure: why there are no figures.
        worker: script that serves it.
    """

    name: str
    kind: str
    model: str
    python: str = "ours"
    note: str = ""
    failure: str = ""
    worker: str = "worker.py"


class Worker:
    """A side's process; idle it waits on a pipe (ORT's threads spin for milliseconds, then sleep)."""

    def __init__(self, side: Side, threads: int) -> None:
        command = [python_of(side.python), HERE / side.worker, side.kind, side.model, str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends one request and waits for the answer."""
        if self._process.stdin is None:
            raise RuntimeError("closed")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            error = (self._process.stderr.read() if self._process.stderr else "").strip().splitlines()
            raise RuntimeError(error[-1][:200] if error else "the process ended")
        return json.loads(line)


def compare(
    sides: list[Side],
    samples: dict[str, Path],
    *,
    threads: int,
    rounds: int,
    seconds: float,
    reference: dict[str, Any],
    warm: int = 5,
    limit: float = float("inf"),
) -> dict[str, dict[str, Any]]:
    """Measures all sides on all samples in turns.

    Args:
        sides: what to measure; the first is the baseline.
        samples: label -> ``.npz`` with the inputs.
        threads: threads of every side.
        rounds: how often each side gets its turn.
        seconds: about how long a turn takes.
        reference: label -> expected output, for the error column.
        warm: calls before anything is timed, and again to see how long one takes.
        limit: largest relative error; a side above it computes something else and is not timed.

    Returns:
        ``{side: {label: {"median", "ratio", "spread", "error"}}}``; the ratio is baseline / side, above 1 is faster.
    """
    workers: dict[str, Worker] = {}
    results: dict[str, dict[str, Any]] = {side.name: {} for side in sides}
    for side in sides:
        if side.failure:
            continue
        try:
            workers[side.name] = Worker(side, threads)
        except RuntimeError as error:
            side.failure = str(error)
    try:
        for label, path in samples.items():
            plan = _Plan(rounds, seconds, warm, limit)
            times = _turns(workers, sides, label, path, plan, reference.get(label), results)
            if sides[0].name not in times:
                raise RuntimeError(f"The baseline {sides[0].name} failed: {sides[0].failure}.")
            baseline = times[sides[0].name]
            for name, values in times.items():
                ratios = [a / b for a, b in zip(baseline, values, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                results[name][label].update(
                    median=statistics.median(values), ratio=middle, spread=(high - low) / 2 / middle
                )
    finally:
        for worker in workers.values():
            worker.close()
    return results


@dataclasses.dataclass(frozen=True)
class _Plan:
    rounds: int
    seconds: float
    warm: int
    limit: float


def _turns(
    workers: dict[str, Worker],
    sides: list[Side],
    label: str,
    path: Path,
    plan: _Plan,
    expected: Any,
    results: dict[str, dict[str, Any]],
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    for side in sides:
        worker = workers.get(side.name)
        if worker is None:
            continue
        try:
            worker.ask(load=str(path))
            output = path.with_suffix(".out.npy")
            worker.ask(outputs=str(output))
            error = _error(expected, np.load(output)) if expected is not None else None
            if error is not None and not error <= plan.limit:
                raise RuntimeError(f"{label}: computes something else, relative error {error:.1e}")
            worker.ask(run=plan.warm)
            once = statistics.median(worker.ask(run=plan.warm)["seconds"])
            results[side.name][label] = {"error": error}
            calls[side.name] = max(3, int(plan.seconds / once))
            times[side.name] = []
        except RuntimeError as error:
            side.failure = str(error)
            workers.pop(side.name).close()
    for number in range(plan.rounds):
        order = list(times)
        for index in range(len(order)):
            name = order[(index + number) % len(order)]
            measured = workers[name].ask(run=calls[name])["seconds"]
            times[name].append(statistics.median(measured[1:]))
    return times


def _error(expected: Any, got: Any) -> float:
    if expected.shape != got.shape:
        return float("inf")
    return float(np.abs(expected.astype(np.float64) - got).max() / np.abs(expected).max())


def prepare(
    tool: str, source: Path, target: Path, python: str, timeout: float = 300, samples: Path | None = None
) -> dict[str, Any]:
    """Runs ``prepare.py`` in a fresh process; ``{"failure": why}`` where it did not work."""
    command = [python_of(python), HERE / "prepare.py", tool, source, target, *([samples] if samples else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failure": f"not done after {timeout:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"failure": lines[-1][:160] if lines else f"exit code {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def quantize(tool: str, source: Path, target: Path, calibration: Path, python: str, timeout: float = 600) -> str:
    """Runs ``quantizers.py`` in a fresh process; returns why it did not work, empty if it did."""
    if not python_of(python).exists():
        return "not installed: run benchmarks/peers.py"
    return why_not([python_of(python), HERE / "quantizers.py", tool, source, target, calibration], timeout)


def why_not(command: list[Any], timeout: float) -> str:
    """Runs a peer's command; why it did not work, empty if it did."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"not done after {timeout:.0f} s"
    lines = done.stderr.strip().splitlines()
    return (lines[-1][:160] if lines else f"exit code {done.returncode}") if done.returncode else ""


def run_once(side: Side, samples: list[Path], threads: int, by_row: bool = False) -> list[Any]:
    """The first output of ``side`` on every sample; ``by_row``: row by row of the batch, put together."""
    worker = Worker(side, threads)
    outputs: list[Any] = []
    try:
        for sample in samples:
            target = sample.with_suffix(".once.npy")
            worker.ask(load=str(sample))
            worker.ask(outputs=str(target), by_row=by_row)
            outputs.append(np.load(target))
    finally:
        worker.close()
    return outputs


def write_result(name: str, threads: int, content: dict[str, Any], pythons: set[str]) -> Path:
    """Writes ``benchmarks/results/NAME.json`` with the environment that made it."""
    RESULTS.mkdir(exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    head = {
        "environment": {**environment(threads), "command": " ".join(["python", *sys.argv])},
        "commit": commit.stdout.strip(),
        "peers": {python: versions(python) for python in sorted(pythons - {"ours"})},
    }
    path = RESULTS / f"{name}.json"
    write_atomically(path, (json.dumps({**head, **content}, indent=1) + "\n").encode())
    return path
