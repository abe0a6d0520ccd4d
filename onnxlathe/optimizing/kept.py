"""What searches keep, so that one that was stopped goes on: a folder for each content searched.

``$XDG_CACHE_HOME/onnxlathe/optimize/KEY/`` (default ``~/.cache``). The key is a hash of the model's graph and weights,
of all samples, the metric, the device, the threads, the CPU and all versions, onnxlathe's own source included; inside,
a candidate's model and figures are found by the hash of its passes and options. Where nothing can be written, nothing
is kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import onnxlathe
from onnxlathe.runtime.environment import environment
from onnxlathe.runtime.files import write_atomically

_MOST = 4_000_000_000
"""Bytes of all searches together; the oldest go first."""


class Kept:
    """The folder of one search.

    Args:
        folder: where everything lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self, passes: str) -> Path:
        """Where the model of a candidate lies, or would."""
        return self.folder / f"{_short(passes)}.onnx"

    def figures(self, passes: str) -> dict[str, Any] | None:
        """What is known of a candidate; None if nothing is, or its model is gone."""
        try:
            found = json.loads(self._file(passes).read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and (found.get("failure") or self.model(passes).is_file()) else None

    def keep(self, passes: str, figures: Mapping[str, Any]) -> None:
        """Remembers figures of a candidate, beside those known."""
        known = self.figures(passes) or {}
        with contextlib.suppress(OSError):
            write_atomically(self._file(passes), json.dumps({**known, **figures}).encode())

    def _file(self, passes: str) -> Path:
        return self.folder / f"{_short(passes)}.json"


@contextlib.contextmanager
def open_kept(key: str) -> Generator[Kept]:
    """The folder for ``key``, a temporary one where the cache cannot be written; afterwards the oldest ones go."""
    root = cache_root()
    folder = root / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        with tempfile.TemporaryDirectory() as temporary:
            yield Kept(Path(temporary))
        return
    os.utime(folder)
    try:
        yield Kept(folder)
    finally:
        _tidy(root, folder)


def cache_root() -> Path:
    """Where searches are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxlathe" / "optimize"


def search_key(model: ir.Model, samples: Iterable[Mapping[str, np.ndarray[Any, Any]]], *settings: object) -> str:
    """The key of a search: see the module."""
    versions = {name: value for name, value in environment().items() if name != "command"}
    parts = [graph_hash(model), samples_hash(samples), json.dumps(versions), _source_hash(), *map(repr, settings)]
    return _short("\n".join(parts))


def graph_hash(model: ir.Model) -> str:
    """Hash of a graph with its weights, whether they lie in the file, beside it or in memory."""
    copy = model.clone()
    for graph in copy.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING:
                continue
            content = hashlib.sha256(tensor.tobytes()).hexdigest()
            shape, name = ir.Shape(tensor.shape.numpy()), value.name or ""
            value.const_value = ir.ExternalTensor(content, 0, 0, tensor.dtype, shape=shape, name=name)
    return hashlib.sha256(ir.to_proto(copy).SerializeToString(deterministic=True)).hexdigest()


def samples_hash(samples: Iterable[Mapping[str, np.ndarray[Any, Any]]]) -> str:
    """Hash of names, types, shapes and numbers, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        for name, array in sorted(sample.items()):
            digest.update(f"{name} {array.dtype} {array.shape};".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(b"|")
    return digest.hexdigest()


@functools.cache
def _source_hash() -> str:
    """Of the installed source, which changes more often than its version."""
    digest = hashlib.sha256()
    for name in ("compiler", "passes", "runtime"):
        folder = Path(next(iter(getattr(onnxlathe, name).__path__)))
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _tidy(root: Path, current: Path) -> None:
    """Removes the searches that were not opened for the longest time, until all are small enough."""
    with contextlib.suppress(OSError):
        folders = sorted(root.iterdir(), key=lambda folder: folder.stat().st_mtime)
        sizes = {folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in folders}
        total = sum(sizes.values())
        for folder in folders:
            if total <= _MOST:
                return
            if folder != current:
                shutil.rmtree(folder, ignore_errors=True)
                total -= sizes[folder]
