"""Ranks of a divided model in one process: each runs up to an exchange, then they go on together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from ..feeds import check_feeds
from ..generation.causal_lm import CausalLM
from ..generation.generate import Runnable
from ..providers import resolve_device
from .manifest import Manifest
from .opening import Divided, open_part, part_caches
from .parted import PartedSession, Step, of_rank

Array = np.ndarray[Any, Any]


class RankedSession(Divided):
    """A folder of ``save_ranks``, run in this process: a thread a rank, exchanges in memory.

    Each rank keeps its part of the key/value cache. Raises what ``Divided`` does.

    Args:
        folder: ranks and manifest.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        threads: intra-op threads of each rank, 0 for ONNX Runtime's default.
    """

    kind: ClassVar[Literal["stages", "ranks"]] = "ranks"

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu", threads: int = 1) -> None:
        super().__init__(folder)
        self.device = resolve_device(device)
        count = len(self.manifest.parts)
        ranks = [open_part(Path(folder), self.manifest, n, self.device, threads) for n in range(count)]
        steps: list[Step] = []
        for pieces in zip(*ranks, strict=True):
            sessions = tuple(session for piece in pieces for session in piece.sessions)
            steps.append(dataclasses.replace(pieces[0], sessions=sessions))
        self._parted = PartedSession(steps, rank_outputs(self.manifest), self.device)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the ranks.

        Raises:
            ModelError: wrong names, dtypes or shapes, or a failure inside ONNX Runtime.
        """
        check_feeds(self.inputs, inputs, "the inputs of run()")
        return join_outputs(self.manifest, self._parted.run(divide_inputs(self.manifest, inputs)))

    def _generator(self) -> tuple[Runnable, CausalLM]:
        """Every rank has caches of its own; one that is not divided is kept by all."""
        model = self._language_model()
        caches = [
            dataclasses.replace(tensor, past=of_rank(rank, tensor.past), present=of_rank(rank, tensor.present))
            for rank in range(len(self.manifest.parts))
            for tensor in part_caches(self.manifest, model, rank)
        ]
        return self._parted, dataclasses.replace(model, cache=tuple(caches))


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
