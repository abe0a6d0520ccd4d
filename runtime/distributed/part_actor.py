"""What runs a stage or a rank in a process of its own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..divided.collectives import Collective
from ..divided.manifest import load_part, read_manifest
from ..divided.opening import open_part, part_caches, seen_caches
from ..divided.parted import PartedBinding, PartedSession
from ..errors import ModelError
from ..generation.causal_lm import CacheTensor
from ..generation.kv_cache import Cache, make_cache
from ..memory import BufferPool
from ..providers import Device, resolve_device

Array = np.ndarray[Any, Any]
Grown = tuple[int, int, int]
"""Rows of a cache, tokens they have, tokens they get in a run."""


class PartActor:
    """The sessions of one file of a divided model, and its part of the key/value caches.

    Callers number what they do: a run of the model from its first step to its last, or a cache, which lasts until it is
    dropped.
    """

    def __init__(self, folder: str, number: int, device: str, threads: int) -> None:
        manifest = read_manifest(Path(folder))
        self._device: Device = resolve_device(device)
        self._parted = PartedSession(open_part(Path(folder), manifest, number, self._device, threads), [], self._device)
        following = manifest.parts[number + 1 :] if manifest.kind == "stages" else ()
        self._later = {info.name for part in following for info in part.inputs}
        self._number, whole = number, manifest.language_model()
        self._seen: list[CacheTensor] = []
        if whole is not None:
            self._own = dataclasses.replace(whole, cache=tuple(part_caches(manifest, whole, number)))
            self._seen = seen_caches(manifest, whole, number)
            self._unreadable = _read_values(load_part(Path(folder), manifest, number), self._seen)
        self._buffers = BufferPool()
        self._bindings: dict[int, PartedBinding] = {}
        self._caches: dict[int, Cache] = {}

    def exchanges(self) -> list[tuple[Collective, ...]]:
        """What ranks do together behind each step."""
        return [step.collectives for step in self._parted.steps]

    def held(self) -> int:
        """Runs and caches that it has."""
        return len(self._bindings.keys() | self._caches.keys())

    def process(self) -> int:
        """Its process id."""
        return os.getpid()

    def node(self) -> str:
        """Ray's id of the machine it is on."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def run(
        self, run: int, step: int, values: Mapping[str, Array], wanted: Sequence[str], grown: Grown = (0, 0, 0)
    ) -> dict[str, Array]:
        """Runs a step.

        Args:
            run: number of the run, or of the cache that takes part.
            step: which of its steps.
            values: what the step reads: inputs of the whole, what other parts made, results of exchanges.
            wanted: names of what is returned, besides what later stages read.
            grown: of the cache.

        Raises:
            ModelError: ONNX Runtime fails.
        """
        binding, cache = self._binding(run), self._caches.get(run)
        like_ort: Any = binding
        last = step == len(self._parted.steps) - 1
        for name, array in values.items():
            binding.give(name, array)
        if cache is not None and step == 0:
            cache.bind(like_ort, grown[2])
            for tensor in self._seen:  # untouched pages cost no memory
                shape = (grown[0], tensor.heads, grown[1], tensor.size)
                binding.bind_cpu_input(tensor.past, np.zeros(shape, tensor.dtype.numpy()))
        try:
            binding.run(step, 0)
        except Exception as error:  # ORT's exception classes are not public, and cannot be sent
            self.drop(run)
            raise ModelError(
                f"ONNX Runtime failed in part {self._number}: {str(error).splitlines()[0]}",
                "Check the input names, shapes and dtypes against the manifest.",
            ) from None
        kept = self._later.union(wanted)
        made = {name: value.numpy() for name, value in binding.values[0].items() if name in kept - values.keys()}
        if last and cache is not None:
            cache.advance(grown[2])
        elif last:
            self.drop(run)
        return {**{name: array for name, array in values.items() if name in kept}, **made}

    def open_cache(self, cache: int, batch: int, capacity: int, width: int) -> None:
        """Makes a cache of a language model, see ``make_cache``.

        Raises:
            ModelError: another part keeps what this one reads.
        """
        if self._unreadable:
            raise ModelError(
                f"Part {self._number} reads the cache {self._unreadable[0]}, which another part keeps.",
                "Take another number of stages.",
            )
        self._caches[cache] = make_cache(self._own, batch, capacity, width, self._device, self._buffers)

    def row(self, cache: int, row: int, index: int, length: int) -> None:
        """Makes the cache ``row`` for one row of ``cache``."""
        self._caches[row] = self._caches[cache].row(index, length)

    def put(self, cache: int, index: int, row: int, length: int) -> None:
        """Takes over a row."""
        self._caches[cache].put(index, self._caches[row], length)

    def call(self, cache: int, method: str, *arguments: Any) -> Any:
        """Any other method of a cache."""
        return getattr(self._caches[cache], method)(*arguments)

    def drop(self, number: int) -> None:
        """Forgets a run or a cache."""
        self._bindings.pop(number, None)
        self._caches.pop(number, None)

    def _binding(self, run: int) -> PartedBinding:
        if run not in self._bindings:
            self._bindings[run] = self._parted.io_binding()
        return self._bindings[run]


def _read_values(model: ir.Model, seen: Sequence[CacheTensor]) -> list[str]:
    """Those of ``seen`` of which more is read than the shape."""
    names = {tensor.past for tensor in seen}
    uses = [(value.name or "", use.node) for value in model.graph.inputs for use in value.uses()]
    return [name for name, node in uses if name in names and node.op_type not in ("Shape", "Size")]
