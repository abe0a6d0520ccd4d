"""Sample inputs: read from files, checked against a model, or made from its input types."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from .errors import ModelError

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]

_DEFAULT_DIM = 16
_LARGEST_SAMPLE = 8 << 30  # bytes; a bomb of a few MB would fill the memory
_TOTAL = re.compile(r"total|kv_seq|past_sequence_length *\+|past.*\+.*seq", re.IGNORECASE)
_PAST = re.compile(r"past|cache", re.IGNORECASE)


FeedSource = (
    Iterable[Mapping[str, Array]] | Iterable[str | os.PathLike[str]] | str | os.PathLike[str] | Callable[[], Any]
)


def load_feeds(source: Iterable[Mapping[str, Array]] | str | os.PathLike[str]) -> list[Feeds]:
    """Reads samples: an iterable of ``{input name: array}``, an ``.npz`` file, or a folder of them.

    Raises:
        ModelError: the path does not exist, or holds no ``.npz`` file.
    """
    return list(Samples(source))


class Samples:
    """Samples that can be read again and again, one at a time, so that memory does not grow with their number.

    Args:
        source: ``{input name: array}`` items, paths of ``.npz`` files, one such path, a folder of them, or a callable
            that returns an iterator of samples (called for each reading). A one-shot iterator is read into memory.
        inputs: the model's inputs, to check each sample against as it is read; empty: not checked.

    Raises:
        ModelError: the path does not exist or holds no ``.npz`` file; while reading: a file or a sample is unusable.
    """

    def __init__(self, source: FeedSource, inputs: Sequence[ir.Value] = ()) -> None:
        self._inputs = inputs
        self._source: Any = source
        if isinstance(source, (str, os.PathLike)):
            path = Path(source)
            files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
            if not files or not all(file.is_file() for file in files):
                raise ModelError(
                    f"No samples found at {path}.", "Give an .npz file (input name -> array) or a folder of them."
                )
            self._source = files
        elif not callable(source) and iter(source) is source:
            self._source = list(source)

    def __iter__(self) -> Iterator[Feeds]:
        source: Any = self._source
        items: Any = source() if callable(source) else source
        for number, item in enumerate(items):
            sample = _read(Path(item)) if isinstance(item, (str, os.PathLike)) else dict(item)
            if self._inputs:
                check_feeds(self._inputs, sample, f"sample {number}")
            yield sample


def _read(file: Path) -> Feeds:
    if not zipfile.is_zipfile(file):
        raise ModelError(f"{file} is not an .npz file, or is truncated.", "Write it with numpy.savez.")
    try:
        with np.load(file, allow_pickle=False) as archive:
            size = sum(item.file_size for item in archive.zip.infolist())
            if size > _LARGEST_SAMPLE:
                raise ModelError(f"{file} unpacks to {size} bytes.", "One sample may have 8 GB; split it.")
            return {name: archive[name] for name in archive.files}
    except ModelError:
        raise
    except Exception as error:  # zipfile, zlib and numpy have a dozen ways to say that a file is damaged
        raise ModelError(f"{file} cannot be read: {error}.", "Write it again with numpy.savez.") from error


def check_feeds(inputs: Sequence[ir.Value], feeds: Mapping[str, Array], where: str = "the sample") -> None:
    """Checks names, dtypes, ranks, fixed dims and finiteness of one sample.

    Raises:
        ModelError: names the input, what it is and what it must be.
    """
    expected = {value.name or "": value for value in inputs}
    missing = [name for name, value in expected.items() if name not in feeds and not value.is_initializer()]
    extra = [name for name in feeds if name not in expected]
    if missing or extra:
        raise ModelError(
            f"Wrong input names in {where}: missing {missing or 'none'}, unknown {extra or 'none'}.",
            f"The model's inputs are: {', '.join(_describe(value) for value in inputs if not value.is_initializer())}.",
        )
    for name, value in expected.items():
        if name not in feeds:  # an initializer that callers may override, and did not
            continue
        array = np.asarray(feeds[name])
        wanted = value.dtype.numpy() if value.dtype is not None else array.dtype
        if array.dtype != wanted:
            raise ModelError(
                f"Input {name!r} in {where} has dtype {array.dtype}, the model takes {wanted}.",
                f"Convert it with .astype(numpy.{wanted}).",
            )
        shape = value.shape
        if shape is not None and (
            len(shape) != array.ndim
            or any(isinstance(dim, int) and dim != size for dim, size in zip(shape, array.shape, strict=False))
        ):
            raise ModelError(
                f"Input {name!r} in {where} has shape {list(array.shape)}, the model takes {_shape(value)}.",
                "Reshape it, or export the model with that dimension dynamic.",
            )
        if array.dtype.kind == "f" and not np.isfinite(array.astype(np.float32)).all():
            raise ModelError(
                f"Input {name!r} in {where} holds NaN or infinity.", "Remove or repair that sample before compiling."
            )


def make_feeds(model: ir.Model, seed: int = 0, count: int = 2, sizes: Mapping[str, int] | None = None) -> list[Feeds]:
    """Makes ``count`` random samples from the input types of ``model``; the same seed gives the same samples.

    Integer inputs stay inside the tables they index, masks are ones (from the second sample on with zeros at the end
    of the last row, as padding has), position ids count up, a dim name has one size everywhere, and a "total" length
    is past + new. For a decoder with a cache, the samples are steps that generation takes: one row that goes on from a
    cache, then two rows from the start, the last padded on the left; position ids count the tokens of the mask.

    Args:
        model: the model to feed.
        seed: random seed.
        count: number of samples; each has other sizes for its symbolic dims.
        sizes: sizes of symbolic dims to use instead of the chosen ones.

    Raises:
        ModelError: an input type this function cannot make (strings, sequences).
    """
    rng = np.random.default_rng(seed)
    limits = index_limits(model)
    cached = any(_PAST.search(value.name or "") for value in model.graph.inputs)
    samples: list[Feeds] = []
    for number in range(count):
        bound = _bind_dims(model.graph.inputs, number, dict(sizes or {}))
        sample: Feeds = {}
        for value in model.graph.inputs:
            if value.is_initializer():
                continue
            shape = tuple(_size(dim, bound) for dim in value.shape or ())
            sample[value.name or ""] = _make(value, shape, rng, limits.get(value.name or ""), padded=number > 0)
        if cached:
            _pad_on_the_left(sample)
        samples.append(sample)
    return samples


def _make(value: ir.Value, shape: tuple[int, ...], rng: np.random.Generator, limit: int | None, padded: bool) -> Array:
    name = (value.name or "").lower()
    if value.dtype is None or value.dtype == ir.DataType.STRING:
        raise ModelError(
            f"Cannot make sample data for input {value.name!r} of type {value.dtype}.",
            "Give samples (calibration=...).",
        )
    dtype = value.dtype.numpy()
    if math.prod(shape) * dtype.itemsize > _LARGEST_SAMPLE:
        raise ModelError(
            f"Sample data for input {value.name!r} of shape {list(shape)} would take more than 8 GB.",
            "Give samples (calibration=...).",
        )
    if "mask" in name:
        mask = np.ones(shape, dtype)
        if padded and mask.ndim == 2 and shape[0] > 1 and shape[1] > 2:
            mask[-1, -max(1, shape[1] // 4) :] = 0
        return mask
    if "position" in name and dtype.kind == "i" and shape:
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.kind in "iu":
        return rng.integers(0, limit if limit is not None else 2, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _pad_on_the_left(sample: Feeds) -> None:
    """Turns the masks of a decoder's sample around and lets its position ids follow them."""
    for name, mask in sample.items():
        if "mask" not in name.lower() or mask.ndim != 2:
            continue
        sample[name] = mask = np.ascontiguousarray(mask[:, ::-1])
        for other, positions in sample.items():
            if "position" in other.lower() and positions.ndim == 2 and positions.shape[0] == mask.shape[0]:
                counted = np.maximum(mask.astype(np.int64).cumsum(1) - 1, 0)
                sample[other] = counted[:, -positions.shape[1] :].astype(positions.dtype)


def index_limits(model: ir.Model) -> dict[str, int]:
    """For each integer input that indexes a table (Gather, through casts and reshapes): the table's smallest size."""
    limits: dict[str, int] = {}
    for source in model.graph.inputs:
        todo = [source]
        seen: set[ir.Value] = set()
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            for use in value.uses():
                node = use.node
                if node.op_type in ("Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Clip"):
                    todo.extend(node.outputs[:1])
                elif node.op_type in ("Gather", "GatherND", "GatherBlockQuantized") and use.idx == 1:
                    table = node.inputs[0]
                    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                    size = table.shape[axis] if table is not None and table.shape is not None else None
                    if isinstance(size, int):
                        name = source.name or ""
                        limits[name] = min(limits.get(name, size), size)
    return limits


def _bind_dims(inputs: Iterable[ir.Value], number: int, bound: dict[str, int]) -> dict[str, int]:
    """Sizes for the symbolic dims of the inputs; later samples get other sizes.

    ``bound`` may give sizes by dim name, and for the roles ``batch`` (a leading dim) and ``sequence`` (any other).
    """
    chosen = dict(bound)
    totals: list[str] = []
    past = new = 0
    for value in inputs:
        for axis, dim in enumerate(value.shape or ()):
            name = None if isinstance(dim, int) else dim.value
            if name and _PAST.search(name) and not _TOTAL.search(name):
                past = chosen[name] = chosen.get(name, bound.get("past_sequence", 0 if number % 2 else 5))
            if not name or name in chosen:
                continue
            if _TOTAL.search(name):
                totals.append(name)
            elif axis == 0:
                chosen[name] = bound.get("batch", 1 + number % 2)
            else:
                new = chosen[name] = bound.get("sequence", _DEFAULT_DIM - 5 * (number % 3))
    new = chosen.get("sequence", new)
    for name in totals:
        chosen[name] = past + new
    return chosen


def _size(dim: int | ir.SymbolicDim, bound: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    return bound[dim.value] if dim.value else _DEFAULT_DIM


def _shape(value: ir.Value) -> str:
    return "[" + ", ".join(str(dim) for dim in value.shape or ()) + "]"


def _describe(value: ir.Value) -> str:
    return f"{value.name} {value.dtype} {_shape(value)}"
