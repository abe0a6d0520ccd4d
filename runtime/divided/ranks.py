"""Ranks of a divided model in one process: each runs up to an exchange, then they go on together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import ModelError, PlanError
from ..feeds import check_feeds
from ..generation.causal_lm import CausalLM
from ..generation.generate import Runnable
from ..generation.generates import Generates
from ..inference import open_session, session_options
from ..memory import BufferPool
from ..providers import resolve_device
from .collectives import ALL_GATHER, ALL_REDUCE, Collective
from .manifest import Manifest, load_part, read_manifest
from .parted import PartedSession, Step, of_rank
from .parts import Part, cut, reads

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Segment:
    """What a rank runs between two exchanges.

    Attributes:
        part: the graph. ``part.received`` also names results of exchanges.
        collectives: the exchanges behind it.
    """

    part: Part
    collectives: tuple[Collective, ...]


def segments(model: ir.Model) -> list[Segment]:
    """Cuts the graph of a rank at its AllReduce and AllGather nodes, as early as each node can run.

    Args:
        model: the graph of a rank; it is taken apart.
    """
    graph = model.graph
    level: dict[ir.Value, int] = {}
    found: list[tuple[int, Collective]] = []
    labels: list[int] = []
    for node in list(graph):
        at = max((level.get(value, 0) for value in reads(node)), default=0)
        if node.op_type not in (ALL_REDUCE, ALL_GATHER):
            labels.append(at)
            level.update(dict.fromkeys(node.outputs, at))
            continue
        value, result = node.inputs[0], node.outputs[0]
        assert value is not None
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        kind = ALL_GATHER if node.op_type == ALL_GATHER else ALL_REDUCE
        found.append((at, Collective(kind, value.name or "", result.name or "", axis)))
        received = ir.Value(name=result.name, type=result.type, shape=result.shape)
        result.replace_all_uses_with(received)
        graph.remove(node, safe=True)
        graph.inputs.append(received)
        level[received] = at + 1
        if not value.is_graph_output():
            graph.outputs.append(value)
    results = {collective.result for _, collective in found}
    pieces: list[Segment] = []
    for number, part in enumerate(cut(model, labels, max(labels) + 1)):
        taken = [value.name or "" for value in part.model.graph.inputs if value.name in results]
        part = dataclasses.replace(part, received=(*part.received, *taken))
        pieces.append(Segment(part, tuple(collective for at, collective in found if at == number)))
    return pieces


class RankedSession(Generates):
    """A folder of ``save_ranks``, run in this process: a thread a rank, exchanges in memory.

    Each rank keeps its part of the key/value cache.

    Args:
        folder: ranks and manifest.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        threads: intra-op threads of each rank, 0 for ONNX Runtime's default.

    Raises:
        ModelError: no such folder, or a damaged one.
        PlanError: files of different builds.
        RuntimeUnavailable: the device is not there.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu", threads: int = 1) -> None:
        self.device = resolve_device(device)
        self._buffers = BufferPool()
        self.manifest = read_manifest(Path(folder))
        if self.manifest.kind != "ranks":
            raise PlanError(f"{folder} holds {self.manifest.kind}, not ranks.", "Write it with save_ranks.")
        self.inputs = [info.value() for info in self.manifest.inputs]
        self.outputs = [info.name for info in self.manifest.outputs]
        ranks = [segments(load_part(Path(folder), self.manifest, n)) for n in range(len(self.manifest.parts))]
        steps: list[Step] = []
        for pieces in zip(*ranks, strict=True):
            sessions = tuple(
                open_session(
                    piece.part.model, session_options(threads=threads, ort_config=self.manifest.ort_config), self.device
                )
                for piece in pieces
            )
            first: Segment = pieces[0]
            steps.append(Step(sessions, first.part.received, first.part.sent, first.collectives))
        self._parted = PartedSession(steps, rank_outputs(self.manifest), self.device)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the ranks.

        Raises:
            ModelError: wrong names, dtypes or shapes, or a failure inside ONNX Runtime.
        """
        check_feeds(self.inputs, inputs, "the inputs of run()")
        return join_outputs(self.manifest, self._parted.run(divide_inputs(self.manifest, inputs)))

    def _generator(self) -> tuple[Runnable, CausalLM]:
        model = self.manifest.language_model()
        if model is None:
            raise ModelError("These ranks cannot generate.", "Divide a language model that has a key/value cache.")
        return self._parted, dataclasses.replace(model, cache=tuple(_caches(self.manifest, model)))


def _caches(manifest: Manifest, model: CausalLM) -> Sequence[Any]:
    """The caches of each rank; one that is not divided is kept by every rank."""
    caches: list[Any] = []
    for rank, part in enumerate(manifest.parts):
        shapes = {info.name: info.shape for info in part.inputs}
        for tensor in model.cache:
            heads = (shapes[tensor.past] or (None, tensor.heads))[1]
            names = of_rank(rank, tensor.past), of_rank(rank, tensor.present)
            caches.append(dataclasses.replace(tensor, past=names[0], present=names[1], heads=heads))
    return caches


def divide_inputs(manifest: Manifest, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs of the whole, those that ranks have parts of cut."""
    found: dict[str, Array] = {}
    for name, array in inputs.items():
        if name not in manifest.divided:
            found[name] = array
            continue
        ends = np.cumsum([0, *_sizes(manifest, name)])
        for rank, part in enumerate(np.split(array, ends[1:-1], axis=manifest.divided[name])):
            found[of_rank(rank, name)] = part
    return found


def rank_outputs(manifest: Manifest) -> list[str]:
    """What has to be read from the ranks for all outputs of the whole."""
    names: list[str] = []
    for info in manifest.outputs:
        divided = info.name in manifest.divided
        names += [of_rank(r, info.name) for r in range(len(manifest.parts))] if divided else [info.name]
    return names


def join_outputs(manifest: Manifest, results: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs of the whole from what ``rank_outputs`` names."""
    found: dict[str, Array] = {}
    for info in manifest.outputs:
        if info.name in manifest.divided:
            parts = [results[of_rank(rank, info.name)] for rank in range(len(manifest.parts))]
            found[info.name] = np.concatenate(parts, axis=manifest.divided[info.name])
        else:
            found[info.name] = results[info.name]
    return found


def _sizes(manifest: Manifest, name: str) -> list[int]:
    shapes = [{info.name: info.shape for info in part.inputs}[name] for part in manifest.parts]
    return [int(shape[manifest.divided[name]] or 0) for shape in shapes if shape is not None]
