"""Memory of the runtime: a pool of buffers for bound outputs, and weights that several sessions share."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
import threading
from collections import defaultdict
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

Array = np.ndarray[Any, Any]
_ALIGNMENT = 64
_SHARED_TYPES = frozenset(
    (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT64)
)
_SPARE = 4  # a free buffer up to so many times as large does as well
_STEPS = 4  # size classes between two powers of two: at most a fifth of a buffer is unused


@dataclasses.dataclass(frozen=True)
class PoolUse:
    """What a pool has done.

    Attributes:
        hits: buffers that were there already.
        misses: buffers that had to be allocated.
        live: bytes asked for and not given back.
        held: bytes of all buffers, free ones too.
        peak: the most that was held.
    """

    hits: int
    misses: int
    live: int
    held: int
    peak: int

    @property
    def hit_ratio(self) -> float:
        """hits / (hits + misses); 0 before the first request."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0

    @property
    def fragmentation(self) -> float:
        """1 - live / held: the part of the memory held that nobody uses now."""
        return 1 - self.live / self.held if self.held else 0.0


class BufferPool:
    """Buffers in size classes, used again when the arrays in them are gone. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # an array may be collected, and return, while another is taken
        self._free: defaultdict[int, list[Array]] = defaultdict(list)
        self._hits = self._misses = self._live = self._held = self._peak = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An uninitialized array in a buffer of the pool; the buffer comes back when no array looks into it."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        lease = _Lease(self, self._take(size_class(size)), size)
        return np.asarray(lease).view(dtype).reshape(shape)

    def shrink(self) -> int:
        """Frees the buffers that nobody uses; returns how many bytes."""
        with self._lock:
            freed = sum(size * len(buffers) for size, buffers in self._free.items())
            self._free.clear()
            self._held -= freed
        return freed

    @property
    def use(self) -> PoolUse:
        """Counts so far."""
        return PoolUse(self._hits, self._misses, self._live, self._held, self._peak)

    def _take(self, size: int) -> Array:
        with self._lock:
            fitting = [free for free, buffers in self._free.items() if buffers and size <= free <= _SPARE * size]
            if fitting:
                self._hits += 1
                return self._free[min(fitting)].pop()
            self._misses += 1
            self._held += size
            self._peak = max(self._peak, self._held)
        return np.empty(size + _ALIGNMENT, np.uint8)

    def borrowed(self, size: int) -> None:
        """Counts a lease."""
        with self._lock:
            self._live += size

    def returned(self, buffer: Array, size: int) -> None:
        """Takes a buffer back."""
        with self._lock:
            self._live -= size
            self._free[len(buffer) - _ALIGNMENT].append(buffer)


class _Lease:
    """The owner of the memory of one array: when it is collected, the buffer goes back to the pool."""

    def __init__(self, pool: BufferPool, buffer: Array, size: int) -> None:
        self._pool, self._buffer, self._size = pool, buffer, size
        address = buffer.ctypes.data
        start = address + -address % _ALIGNMENT
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (start, False)}
        pool.borrowed(size)

    def __del__(self) -> None:
        self._pool.returned(self._buffer, self._size)


def size_class(size: int) -> int:
    """The smallest class that holds ``size`` bytes: powers of two with three steps between them."""
    size = max(size, _ALIGNMENT)
    step = max(_ALIGNMENT, (1 << (size - 1).bit_length()) // (2 * _STEPS))
    return -(-size // step) * step


def return_freed() -> None:
    """Gives the memory that was freed back to the system, where the C library (glibc's) would keep it for later.

    Once a model of large outputs has run, glibc takes arrays of up to 32 MB from its heap, and what is freed there, the
    weights of sessions for one, stays resident.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(ctypes.c_size_t(0))


class SharedWeights:
    """The large weights of a model, in memory once, for any number of sessions.

    ONNX Runtime takes them as they are (``SessionOptions.add_initializer``). Kernels that repack weights would still
    make copies of their own, so sessions with shared weights do not repack: they are smaller, and matrix products may
    be slower.

    Args:
        model: the model; weights in external files are mapped, not read.
    """

    def __init__(self, model: ir.Model) -> None:
        self._values: dict[str, tuple[ort.OrtValue, Array]] = {}
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < 1024 or tensor.dtype not in _SHARED_TYPES or value.is_graph_input():
                continue
            array = np.ascontiguousarray(tensor.numpy())
            self._values[value.name or ""] = (ort.OrtValue.ortvalue_from_numpy(array), array)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights shared."""
        return sum(array.nbytes for _, array in self._values.values())

    def apply(self, options: ort.SessionOptions) -> None:
        """Lets a session opened with ``options`` use these weights; keep this object while the session lives."""
        for name, (value, _) in self._values.items():
            options.add_initializer(name, value)
        options.add_session_config_entry("session.disable_prepacking", "1")
