"""Key/value caches in memory of their own: one that kernels append to in place, one that goes back and forth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from ..memory import BufferPool
from ..providers import Device
from .causal_lm import CacheTensor, CausalLM

Array = np.ndarray[Any, Any]
_ALIGNMENT = 64  # bytes; a cache line, as ORT's own allocator has it
_CARRIERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # NumPy has no bfloat16, and copies need no type


class Buffer:
    """Zeroed memory on a device, big enough for ``shape``; its elements are seen as unsigned integers."""

    def __init__(self, shape: Sequence[int], itemsize: int, device: Device, pool: BufferPool | None = None) -> None:
        carrier = np.dtype(_CARRIERS[itemsize])
        count = int(np.prod(shape))
        if pool is not None and device == "cpu":
            self._host: Array = pool.empty((count,), carrier)
            self._host.fill(0)
        else:
            raw = np.zeros(count * itemsize + _ALIGNMENT, np.uint8)  # untouched pages cost no memory
            start = -raw.ctypes.data % _ALIGNMENT
            self._host = raw[start : start + count * itemsize].view(carrier)
        self._device: Any = None
        self.pointer: int = self._host.ctypes.data
        if device != "cpu":
            self._device = ort.OrtValue.ortvalue_from_numpy(self._host, device, 0)
            self.pointer = self._device.data_ptr()
            self._host = np.empty(0, carrier)

    def read(self) -> Array:
        """Its elements, flat: the memory itself on the CPU, a copy of it from elsewhere."""
        return self._host if self._device is None else self._device.numpy()

    def write(self, array: Array) -> None:
        """Takes what ``read`` gave and the caller changed."""
        if self._device is not None:
            self._device.update_inplace(array)


class Cache(Protocol):
    """The cache of some rows, bound to runs of a graph.

    Attributes:
        capacity: tokens a row has room for.
    """

    capacity: int

    def width(self, lengths: Array) -> int:
        """Columns of the attention mask that are past, for rows with ``lengths`` tokens."""
        ...

    def slots(self, lengths: Array) -> Array:
        """The column in which each row's next token is kept."""
        ...

    def bind(self, binding: ort.IOBinding, new: int) -> None:
        """Binds past and present for a run of ``new`` tokens."""
        ...

    def advance(self, new: int) -> None:
        """After such a run."""
        ...

    def reserve(self, length: int, limit: int | None) -> bool:
        """Makes room for ``length`` tokens: at least twice as many as before, at most ``limit``. True if it moved."""
        ...

    def row(self, index: int, length: int) -> Cache:
        """An empty cache to fill with the ``length`` tokens of one row, alone."""
        ...

    def put(self, index: int, row: Cache, length: int) -> None:
        """Takes over the row filled."""
        ...

    def load(self, arrays: Sequence[Array], length: int) -> None:
        """Fills an empty ``row`` with the first ``length`` tokens of arrays that ``save`` gave."""
        ...

    def save(self, index: int, length: int) -> list[Array]:
        """Copies of what row ``index`` holds of its first ``length`` tokens, [heads, length, size] each."""
        ...


def make_cache(
    model: CausalLM, batch: int, capacity: int, width: int, device: Device, pool: BufferPool | None = None
) -> Cache:
    """The kind of cache that ``model`` runs with, for ``batch`` rows of which the longest begins with ``width``.

    Memory on the CPU comes from ``pool``, if there is one, and goes back to it with the cache.
    """
    if model.in_place:
        return InPlaceCache(model.cache, batch, capacity, device, pool)
    return GrowingCache(model.cache, batch, capacity, width if batch > 1 else 0, device, pool)


class InPlaceCache:
    """Past and present are one buffer, [batch, heads, capacity, size]: the kernel writes the new tokens into it.

    Row r's tokens lie from slot 0 on, so rows of different lengths need no padding.
    """

    def __init__(
        self,
        tensors: Sequence[CacheTensor],
        batch: int,
        capacity: int,
        device: Device,
        pool: BufferPool | None = None,
    ) -> None:
        self._tensors = tensors
        self._batch = batch
        self._device: Device = device
        self._pool = pool
        self._first_row = 0
        self.capacity = capacity
        self._buffers = [self._allocate(tensor, capacity) for tensor in tensors]
        self._bound: ort.IOBinding | None = None

    def width(self, lengths: Array) -> int:
        return int(lengths.max())

    def slots(self, lengths: Array) -> Array:
        return lengths

    def bind(self, binding: ort.IOBinding, new: int) -> None:
        if self._bound is binding:  # nothing moves
            return
        for tensor, buffer in zip(self._tensors, self._buffers, strict=True):
            shape = [self._batch, tensor.heads, self.capacity, tensor.size]
            pointer = buffer.pointer + self._first_row * tensor.itemsize * tensor.heads * self.capacity * tensor.size
            _bind(binding, tensor, self._device, (shape, pointer), (shape, pointer))
        self._bound = binding

    def advance(self, new: int) -> None:
        pass

    def reserve(self, length: int, limit: int | None) -> bool:
        if length <= self.capacity:
            return False
        capacity = _grown(self.capacity, length, limit)
        for index, tensor in enumerate(self._tensors):
            larger = self._allocate(tensor, capacity)
            target, source = larger.read(), self._buffers[index].read()
            shape = (self._batch, tensor.heads, -1, tensor.size)
            target.reshape(shape)[:, :, : self.capacity] = source.reshape(shape)
            larger.write(target)
            self._buffers[index] = larger
        self.capacity = capacity
        self._bound = None
        return True

    def row(self, index: int, length: int) -> InPlaceCache:
        """A row of the buffer itself: [1, heads, capacity, size] is contiguous."""
        row = object.__new__(InPlaceCache)
        row.__dict__.update(self.__dict__, _batch=1, _first_row=index, _bound=None)
        return row

    def put(self, index: int, row: Cache, length: int) -> None:
        pass

    def load(self, arrays: Sequence[Array], length: int) -> None:
        for tensor, buffer, array in zip(self._tensors, self._buffers, arrays, strict=True):
            whole = buffer.read()
            self._of_row(tensor, whole, self._first_row)[:, :length] = array[:, :length]
            buffer.write(whole)

    def save(self, index: int, length: int) -> list[Array]:
        pairs = zip(self._tensors, self._buffers, strict=True)
        return [self._of_row(tensor, buffer.read(), index)[:, :length].copy() for tensor, buffer in pairs]

    def _of_row(self, tensor: CacheTensor, whole: Array, index: int) -> Array:
        return whole.reshape(-1, tensor.heads, self.capacity, tensor.size)[index]

    def _allocate(self, tensor: CacheTensor, capacity: int) -> Buffer:
        shape = (self._batch, tensor.heads, capacity, tensor.size)
        return Buffer(shape, tensor.itemsize, self._device, self._pool)


class GrowingCache:
    """For graphs that concatenate: past [batch, heads, length, size] lies in one buffer, present in another; then they
    change places. Rows of different lengths are padded on the left.

    Both buffers have their full size from the start, so a step allocates nothing; what ``Concat`` copies is copied.
    """

    def __init__(
        self,
        tensors: Sequence[CacheTensor],
        batch: int,
        capacity: int,
        length: int,
        device: Device,
        pool: BufferPool | None = None,
    ) -> None:
        self._tensors = tensors
        self._batch = batch
        self._device: Device = device
        self._pool = pool
        self._length = length
        self.capacity = capacity
        self._past = self._allocate(capacity)
        self._present = self._allocate(capacity)

    def width(self, lengths: Array) -> int:
        return self._length

    def slots(self, lengths: Array) -> Array:
        return np.full_like(lengths, self._length)

    def bind(self, binding: ort.IOBinding, new: int) -> None:
        for tensor, before, after in zip(self._tensors, self._past, self._present, strict=True):
            old = [self._batch, tensor.heads, self._length, tensor.size]
            grown = [self._batch, tensor.heads, self._length + new, tensor.size]
            _bind(binding, tensor, self._device, (old, before.pointer), (grown, after.pointer))

    def advance(self, new: int) -> None:
        self._length += new
        self._past, self._present = self._present, self._past

    def reserve(self, length: int, limit: int | None) -> bool:
        if length <= self.capacity:
            return False
        capacity = _grown(self.capacity, length, limit)
        self._present.clear()
        larger = self._allocate(capacity)
        for tensor, source, target in zip(self._tensors, self._past, larger, strict=True):
            count = self._batch * tensor.heads * self._length * tensor.size
            array = target.read()
            array[:count] = source.read()[:count]
            target.write(array)
        self._past = larger
        self._present = self._allocate(capacity)
        self.capacity = capacity
        return True

    def row(self, index: int, length: int) -> GrowingCache:
        """A cache of its own; the only row of a batch is filled where it stays."""
        return self if self._batch == 1 else GrowingCache(self._tensors, 1, length, 0, self._device, self._pool)

    def put(self, index: int, row: Cache, length: int) -> None:
        if row is self or not isinstance(row, GrowingCache):
            return
        for tensor, source, target in zip(self._tensors, row._past, self._past, strict=True):
            array = target.read()
            filled = source.read()[: tensor.heads * length * tensor.size].reshape(tensor.heads, length, tensor.size)
            self._of_rows(tensor, array)[index, :, self._length - length :] = filled
            target.write(array)

    def load(self, arrays: Sequence[Array], length: int) -> None:
        self._length = length
        for tensor, buffer, array in zip(self._tensors, self._past, arrays, strict=True):
            whole = buffer.read()
            self._of_rows(tensor, whole)[0] = array[:, :length]
            buffer.write(whole)

    def save(self, index: int, length: int) -> list[Array]:
        pairs = zip(self._tensors, self._past, strict=True)
        return [
            self._of_rows(tensor, buffer.read())[index, :, self._length - length :].copy() for tensor, buffer in pairs
        ]

    def _of_rows(self, tensor: CacheTensor, whole: Array) -> Array:
        shape = (self._batch, tensor.heads, self._length, tensor.size)
        return whole[: int(np.prod(shape))].reshape(shape)

    def _allocate(self, capacity: int) -> list[Buffer]:
        return [
            Buffer((self._batch, tensor.heads, capacity, tensor.size), tensor.itemsize, self._device, self._pool)
            for tensor in self._tensors
        ]


def _grown(capacity: int, length: int, limit: int | None) -> int:
    grown = max(2 * capacity, length)
    return grown if limit is None else max(length, min(grown, limit))


def _bind(
    binding: ort.IOBinding,
    tensor: CacheTensor,
    device: Device,
    past: tuple[list[int], int],
    present: tuple[list[int], int],
) -> None:
    """Binds (shape, pointer) of past and present."""
    dtype = int(tensor.dtype)
    binding.bind_input(tensor.past, device, 0, dtype, *past)
    binding.bind_output(tensor.present, device, 0, dtype, *present)
