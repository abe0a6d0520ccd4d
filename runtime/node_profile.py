"""What each node of a graph costs in ONNX Runtime: seconds, and the shapes it was run with."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from .inference import open_session, run_session, session_options
from .providers import Device

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class NodeProfile:
    """One node of the main graph, as it ran.

    Attributes:
        seconds: its fastest run, bodies of If and Loop included.
        inputs: shapes of its tensor inputs, omitted ones left out.
        outputs: shapes of its tensor outputs, omitted ones left out.
        output_types: ONNX Runtime's names of their element types, as ``float``.
    """

    seconds: float
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    output_types: tuple[str, ...]

    @property
    def output_bytes(self) -> tuple[int, ...]:
        """Bytes of each output."""
        kinds = [_TYPES.get(kind) for kind in self.output_types]
        sizes = [0 if kind is None else kind.itemsize for kind in kinds]
        return tuple(int(math.prod(shape) * size) for shape, size in zip(self.outputs, sizes, strict=True))


def profile_nodes(
    model: ir.Model, feeds: Mapping[str, Array], *, device: Device = "cpu", threads: int = 0, runs: int = 5
) -> dict[str, NodeProfile]:
    """Runs ``model`` node by node, ONNX Runtime's own optimizations off, and returns what each node cost by its name.

    Args:
        model: the model; its nodes have names of their own.
        feeds: one sample.
        device: execution provider.
        threads: intra-op threads, 0 for ORT's default.
        runs: runs counted; one more warms up.

    Raises:
        ModelError: the model does not load, or does not run on ``feeds``.
    """
    options = session_options(threads=threads, optimize=False)
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = open_session(model, options, device)
        for _ in range(runs + 1):
            run_session(session, feeds)
        events = list(_kernel_events(session))  # read while the file is there
    found: dict[str, NodeProfile] = {}
    seen: set[str] = set()
    for name, event in events:
        if name not in seen:  # the run that warms up
            seen.add(name)
            found[name] = _profile(event, np.inf)
            continue
        found[name] = _profile(event, found[name].seconds)
    return found


def profile_in_turns(
    models: Sequence[ir.Model],
    configs: Sequence[Mapping[str, Any]],
    feeds: Sequence[Mapping[str, Array]],
    *,
    device: Device = "cpu",
    threads: int = 0,
    turns: int = 6,
) -> list[dict[tuple[str, str], float]]:
    """Runs models in turns as ONNX Runtime optimizes them, and returns what each of their nodes cost.

    Args:
        models: the models.
        configs: session options of each.
        feeds: one sample for each.
        device: execution provider.
        threads: intra-op threads, 0 for ORT's default.
        turns: how often each model has its turn, of five runs that count. One before them does not: the threads of
            the session that had its turn before still spin.

    Returns:
        For each model ``(name, operator) -> seconds``, the median of the runs; names may be ONNX Runtime's. If, Loop
        and Scan are left out, as the nodes of their bodies are in.

    Raises:
        ModelError: a model does not load, or does not run on its sample.
    """
    with tempfile.TemporaryDirectory() as folder:
        sessions: list[ort.InferenceSession] = []
        for number, (model, config) in enumerate(zip(models, configs, strict=True)):
            options = session_options(threads=threads, ort_config=config)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / f"profile{number}")
            sessions.append(open_session(model, options, device))
        for _ in range(turns):
            for session, sample in zip(sessions, feeds, strict=True):
                for _ in range(_TURN):
                    run_session(session, sample)
        return [_medians(_kernel_events(session), turns * _TURN) for session in sessions]


def _kernel_events(session: ort.InferenceSession) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of the node and event, for each kernel that ran."""
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8", errors="replace"))
    for event in events:
        name, found = event["name"].removesuffix("_kernel_time"), event["name"].endswith("_kernel_time")
        if event.get("cat") == "Node" and found:
            yield name, event


def _medians(events: Iterable[tuple[str, Mapping[str, Any]]], runs: int) -> dict[tuple[str, str], float]:
    taken: dict[tuple[str, str], list[float]] = {}
    for name, event in events:
        op = str(event["args"]["op_name"])
        if op not in _HOLDERS:
            taken.setdefault((name, op), []).append(event["dur"] * 1e-6)
    return {key: _median(times, runs) for key, times in taken.items()}


def _median(times: Sequence[float], runs: int) -> float:
    if len(times) != runs:  # a node of a body runs now and then, or more than once in a run
        return statistics.median(times) * len(times) / runs
    return statistics.median(seconds for number, seconds in enumerate(times) if number % _TURN)


def _profile(event: Mapping[str, Any], fastest: float) -> NodeProfile:
    outputs = [(kind, tuple(shape)) for entry in event["args"]["output_type_shape"] for kind, shape in entry.items()]
    return NodeProfile(
        seconds=min(fastest, event["dur"] * 1e-6),
        inputs=tuple(tuple(shape) for entry in event["args"]["input_type_shape"] for shape in entry.values()),
        outputs=tuple(shape for _, shape in outputs),
        output_types=tuple(kind for kind, _ in outputs),
    )


def set_types(model: ir.Model, profiles: Mapping[str, NodeProfile]) -> None:
    """Gives values of the main graph the type and rank that they had, where shape inference knows no type."""
    for node in model.graph:
        seen = profiles.get(node.name or "")
        made = [value for value in node.outputs if value.name]
        if seen is None or len(made) != len(seen.output_types):
            continue
        for value, kind, shape in zip(made, seen.output_types, seen.outputs, strict=True):
            if value.type is None and kind in _TYPES:
                value.type = ir.TensorType(_TYPES[kind])
                value.shape = value.shape or ir.Shape([None] * len(shape))


_TURN = 6  # runs
_HOLDERS = ("If", "Loop", "Scan")
_TYPES = {
    "float": ir.DataType.FLOAT,
    **{kind.name.lower(): kind for kind in ir.DataType if kind.name.lower() not in ("undefined", "string", "float")},
}
