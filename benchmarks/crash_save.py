"""Kills processes that save, at random moments, and looks at what is left: the old artifact or the new one, whole.

    python benchmarks/crash_save.py [--moments 50] [--seed 0] [KIND ...]

A child saves one artifact after the other to the same place; all weights of artifact n are n, and its metadata says so.
After a random time it gets SIGKILL, and what is there must load and be of one n throughout: ``plain`` (one file),
``external`` (with a data file) and ``bundle`` (a folder; every file as SHA256SUMS lists it). Prints a line for each
kind; exit code 1 if anything was missing, mixed or damaged.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxlathe.compiler.bundle import save_bundle
from onnxlathe.compiler.report import Report
from onnxlathe.runtime.artifact import load, save

_KEY = "number"
_TEXT = """<ir_version: 10, opset_import: ["" : 20]>
graph (float[n, 700] x, float[700, 700] w) => (float[n, 700] y) { y = MatMul(x, w) }"""


def main() -> int:
    """Kills, looks, prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(_SAVE), metavar="KIND")
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failures = 0
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as folder:
            found, problems = _kills(kind, Path(folder), arguments.moments, random.Random(arguments.seed))
        print(
            f"{kind}: {arguments.moments} kills, {found} artifacts seen, {len(problems)} not whole",
            *problems,
            sep="\n  ",
        )
        failures += len(problems)
    return min(failures, 1)


def _kills(kind: str, folder: Path, moments: int, rng: random.Random) -> tuple[int, list[str]]:
    path = folder / "m.onnx"
    start = time.monotonic()
    os.waitpid(_forked(kind, path, [0]), 0)
    usual = time.monotonic() - start
    numbers, problems = {0}, []
    for moment in range(1, moments + 1):
        child = _forked(kind, path, itertools.count(moment * 1_000))
        time.sleep(rng.uniform(0, 2 * usual))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            numbers.add(_LOOK[kind](path))
        except Exception as error:  # whatever it is, the artifact is not whole
            problems.append(f"kill {moment}: {type(error).__name__}: {error}")
    return len(numbers), problems


def _forked(kind: str, path: Path, numbers: Iterable[int]) -> int:
    """A child that saves artifacts of these numbers; onnxruntime runs in children only, as its threads do not fork."""
    child = os.fork()
    if child:
        return child
    try:
        for number in numbers:
            _SAVE[kind](_model(number), path, number)
    except BaseException as error:
        print(f"{kind}: {error}", file=sys.stderr)
    os._exit(0)


def _model(number: int) -> ir.Model:
    model = ir.from_onnx_text(_TEXT)
    weight = next(value for value in model.graph.inputs if value.name == "w")
    weight.const_value = ir.tensor(np.full((700, 700), number, np.float32), name="w")
    model.graph.register_initializer(weight)
    model.graph.inputs.remove(weight)
    return model


def _save_bundle(model: ir.Model, path: Path, number: int) -> None:
    sample = {"x": np.ones((1, 700), np.float32)}
    save_bundle(model, path, report=Report(), metadata={_KEY: str(number)}, ort_config={}, sample=sample)


_SAVE: dict[str, Callable[[ir.Model, Path, int], object]] = {
    "plain": lambda model, path, number: save(model, path, metadata={_KEY: str(number)}),
    "external": lambda model, path, number: save(model, path, metadata={_KEY: str(number)}, external_data=True),
    "bundle": _save_bundle,
}


def _look(path: Path) -> int:
    """The number of the artifact, which every one of its weights must be."""
    model = load(path)
    number = int(model.metadata_props[_KEY])
    tensor = model.graph.initializers["w"].const_value
    if tensor is None or not (tensor.numpy() == number).all():
        raise ValueError(f"the graph is of artifact {number}, the weights are not")
    return number


def _look_into_bundle(path: Path) -> int:
    folder = path.with_suffix(".bundle")
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ", 1)
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{name} is not what SHA256SUMS lists")
    return _look(folder / path.name)


_LOOK: dict[str, Callable[[Path], int]] = {"plain": _look, "external": _look, "bundle": _look_into_bundle}


if __name__ == "__main__":
    sys.exit(main())
