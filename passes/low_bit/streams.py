"""Activations of a model, stage by stage: calibration samples walk through the graph, and only the values that the rest
of the graph still reads are kept."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...compiler.base import Feeds
from ...compiler.graph import Array, give_types, subgraphs
from ...runtime.inference import open_session, run_session, session_options

MASK = "attention_mask"
# For runs that calibrate or compare: threads that wait actively take the cores from everybody else.
PATIENT = {"config_entries": {"session.intra_op.allow_spinning": "0"}}


class ArrayStore:
    """Arrays by (sample, name): in memory up to a number of bytes, in a temporary folder beyond it.

    Args:
        memory: bytes kept in memory.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._arrays: dict[tuple[int, str], Array | Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._written = 0

    def put(self, sample: int, name: str, array: Array) -> None:
        """Keeps ``array``."""
        if array.nbytes <= self._memory:
            self._memory -= array.nbytes
            self._arrays[sample, name] = array
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="onnxlathe-")
        self._written += 1
        path = Path(self._folder.name) / f"{self._written}.npy"
        np.save(path, array)
        self._arrays[sample, name] = path

    def get(self, sample: int, name: str) -> Array:
        """The array kept under ``sample`` and ``name``."""
        found = self._arrays[sample, name]
        return np.load(found) if isinstance(found, Path) else found

    def keep_only(self, names: set[str]) -> None:
        """Forgets all others."""
        for key in [key for key in self._arrays if key[1] not in names]:
            found = self._arrays.pop(key)
            if isinstance(found, Path):
                found.unlink()
            else:
                self._memory += found.nbytes


class Stream:
    """Calibration samples on their way through a graph, up to one stage after the other.

    The graph may change between stages behind the point reached, e.g. by replacing the weights of nodes that were not
    run yet; what was run is never run again.

    Args:
        model: the model; its main graph is walked.
        stages: for each stage the value it ends with, in topological order.
        feeds: the samples.
        memory: bytes of activations kept in memory; more go to a temporary folder.
        threads: intra-op threads, 0 for ONNX Runtime's default.
    """

    def __init__(
        self, model: ir.Model, stages: Sequence[ir.Value], feeds: Iterable[Feeds], memory: int, threads: int = 0
    ) -> None:
        self._model, self._threads = model, threads
        self._stages = stages
        self._store = ArrayStore(memory)
        self._count = 0
        self._needed = ancestors(stages, set())
        self._done: set[ir.Node] = set()
        self._live: list[ir.Value] = [value for value in model.graph.inputs if not value.is_initializer()]
        for number, sample in enumerate(feeds):
            self._count = number + 1
            for name, array in sample.items():
                self._store.put(number, name, np.asarray(array))

    def advance(self, stage: int) -> Iterator[Array]:
        """Runs the graph up to ``stages[stage]`` and yields that value for each sample."""
        end = self._stages[stage]
        fresh = ancestors([end], self._done)
        live = self._frontier(self._done | fresh, stage)
        outputs = [value for value in live if value.producer() in fresh]
        read = {value for node in fresh for value in reads(node)}
        inputs = [value for value in self._live if value in read]
        if outputs:
            self._run(inputs, outputs)
        self._done |= fresh
        self._live = live
        self._store.keep_only({value.name or "" for value in live})
        for number in range(self._count):
            yield self._store.get(number, end.name or "")

    def beside(self, sample: int, value: ir.Value) -> Array:
        """A value that was made before the stage reached, and that a later stage needs, of one sample."""
        return self._store.get(sample, value.name or "")

    def _frontier(self, done: set[ir.Node], stage: int) -> list[ir.Value]:
        """What is there after ``done`` and read by later stages, and the ends of ``stage`` and later ones."""
        values = [value for value in self._model.graph.inputs if not value.is_initializer()]
        values += [value for node in self._model.graph if node in done for value in node.outputs]
        wanted = {value for node in self._needed - done for value in reads(node)} | set(self._stages[stage:])
        return [value for value in values if value in wanted]

    def _run(self, inputs: list[ir.Value], outputs: list[ir.Value]) -> None:
        part = ir.Model(
            ir.convenience.extract(self._model.graph, inputs, outputs),
            ir_version=self._model.ir_version,
        )
        part.graph.opset_imports.update(self._model.opset_imports)
        names = [value.name or "" for value in part.graph.inputs if not value.is_initializer()]
        give_types(part.graph.inputs, {name: self._store.get(0, name) for name in names if self._count})
        session = open_session(part, session_options(threads=self._threads, ort_config=PATIENT))
        wanted = [value.name or "" for value in outputs]
        for number in range(self._count):
            results = run_session(session, {name: self._store.get(number, name) for name in names}, wanted)
            for name, array in results.items():
                self._store.put(number, name, array)
        for value in part.graph.initializers.values():  # the loop pauses the collector of cycles, as graphs are
            value.const_value = None


def token_rows(array: Array, feeds: Feeds) -> Array:
    """``array`` [..., K] as [tokens, K], float32, without what ``feeds["attention_mask"]`` marks as padding."""
    rows = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
    mask = feeds.get(MASK)
    if mask is None or array.ndim != 3 or mask.ndim != 2:
        return rows
    tokens = array.shape[1]
    if mask.shape[0] != array.shape[0] or mask.shape[1] < tokens:
        return rows
    kept = np.asarray(mask)[:, -tokens:].reshape(-1) > 0
    return rows if kept.all() else rows[kept]


def stage_order(model: ir.Model, values: Iterable[ir.Value]) -> list[ir.Value]:
    """``values`` in the order in which the main graph makes them, so that each can be a stage of a ``Stream``."""
    position = {node: number for number, node in enumerate(model.graph)}

    def made(value: ir.Value) -> int:
        node = value.producer()
        return -1 if node is None else position[node]

    return sorted(values, key=made)


def same_values(clone: ir.Model, values: Sequence[ir.Value]) -> list[ir.Value]:
    """The values of ``clone`` that have the names of ``values``."""
    wanted = {value.name for value in values}
    found = {value.name: value for value in clone.graph.inputs if value.name in wanted}
    found.update({value.name: value for node in clone.graph for value in node.outputs if value.name in wanted})
    return [found[value.name] for value in values]


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """The values a node reads, those that its bodies (If, Loop) take from outside included."""
    yield from (value for value in node.inputs if value is not None)
    for body in subgraphs(node):
        for inner in body:
            yield from reads(inner)


def ancestors(values: Iterable[ir.Value], stop: set[ir.Node]) -> set[ir.Node]:
    """The nodes that ``values`` depend on, not looking behind ``stop``."""
    found: set[ir.Node] = set()
    pending = [value.producer() for value in values]
    while pending:
        node = pending.pop()
        if node is None or node in found or node in stop:
            continue
        found.add(node)
        pending += [value.producer() for value in reads(node)]
    return found
