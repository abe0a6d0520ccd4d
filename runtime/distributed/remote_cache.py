"""A key/value cache whose memory lies with actors, and what makes them look like a session that generates."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from ..generation.causal_lm import MASK
from ..generation.kv_cache import Cache
from ..inference import owning
from .part_actor import Grown

Array = np.ndarray[Any, Any]


class Actors(Protocol):
    """Who has the memory."""

    @property
    def counts(self) -> Sequence[int]:
        """Tensors of the cache that each has."""
        ...

    def number(self) -> int:
        """A number that was not used yet."""
        ...

    def each(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """Calls a method of every actor, with arguments of its own, and waits."""
        ...

    def forget(self, number: int) -> None:
        """Lets all drop a cache, and does not wait."""
        ...


class RemoteCache:
    """A ``Cache``: here is its bookkeeping, the actors have its memory.

    Args:
        actors: who.
        number: its number there.
        local: a cache of the same kind and size without tensors.
    """

    def __init__(self, actors: Actors, number: int, local: Cache) -> None:
        self._actors, self.number, self._local = actors, number, local
        self.capacity = local.capacity
        weakref.finalize(self, actors.forget, number).atexit = False

    def width(self, lengths: Array) -> int:
        return self._local.width(lengths)

    def slots(self, lengths: Array) -> Array:
        return self._local.slots(lengths)

    def bind(self, binding: Any, new: int) -> None:
        binding.cache, binding.new = self.number, new

    def advance(self, new: int) -> None:
        self._local.advance(new)  # the actors do so after their run

    def reserve(self, length: int, limit: int | None) -> bool:
        if not self._local.reserve(length, limit):
            return False
        self.capacity = self._local.capacity
        self._tell("call", "reserve", length, limit)
        return True

    def row(self, index: int, length: int) -> RemoteCache:
        number = self._actors.number()
        self._tell("row", number, index, length)
        return RemoteCache(self._actors, number, self._local.row(index, length))

    def put(self, index: int, row: Cache, length: int) -> None:
        assert isinstance(row, RemoteCache)
        self._local.put(index, row._local, length)
        self._tell("put", index, row.number, length)

    def load(self, arrays: Sequence[Array], length: int) -> None:
        self._local.load([], length)
        ends = np.cumsum([0, *self._actors.counts])
        parts = [list(arrays[a:b]) for a, b in itertools.pairwise(ends)]
        self._actors.each("call", [(self.number, "load", part, length) for part in parts])

    def save(self, index: int, length: int) -> list[Array]:
        return [array for part in self._tell("call", "save", index, length) for array in part]

    def _tell(self, method: str, *arguments: Any) -> list[Any]:
        return self._actors.each(method, [(self.number, *arguments)] * len(self._actors.counts))


class RemoteBinding:
    """Inputs of a run elsewhere, and its logits.

    Attributes:
        cache: number of the cache that takes part.
        new: tokens it gets.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Array] = {}
        self.cache = self.new = 0
        self.logits: Array = np.empty(0)

    def bind_cpu_input(self, name: str, array: Array) -> None:
        """Takes an input."""
        self.inputs[name] = array

    def bind_output(self, name: str, *where: Any) -> None:
        """There are only the logits."""

    def get_outputs(self) -> list[ort.OrtValue]:
        """The logits of the last run."""
        return [owning(self.logits)]


class RemoteRunnable:
    """Looks like a session to the generation loop.

    Args:
        step: runs (inputs, number of the cache, how it grows), returns the logits.
    """

    def __init__(self, step: Callable[[dict[str, Array], int, Grown], Array]) -> None:
        self._step = step

    def io_binding(self) -> RemoteBinding:
        """A new one."""
        return RemoteBinding()

    def run_with_iobinding(self, iobinding: RemoteBinding) -> None:
        """Runs it."""
        rows, total = iobinding.inputs[MASK].shape
        grown = (rows, total - iobinding.new, iobinding.new)
        iobinding.logits = self._step(iobinding.inputs, iobinding.cache, grown)
