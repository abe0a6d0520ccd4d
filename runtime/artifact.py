"""The artifact: an ordinary ``.onnx`` file whose metadata carries the report and the session options it wants.

Metadata keys (strings, JSON where structured):

* ``onnxlathe.version``: version that wrote the file.
* ``onnxlathe.report``: the compile report.
* ``onnxlathe.ort_config``: ``{"config_entries": {key: value}, "graph_optimization_level": "all"}``, applied by
  ``lathe.Session``.
* ``onnxlathe.max_length``: of a language model, the longest text it was built for, in tokens.
* ``ort_config``: ONNX Runtime's own key. Plain onnxruntime applies it when the environment variable
  ``ORT_LOAD_CONFIG_FROM_MODEL`` is 1.

One file below 2 GB; above (or when the weights already live in external files) weights go to ``<name>.data`` beside it.

A name that ends in ``.gz`` means the same single file compressed by gzip, worth it where many weights are zero; plain
onnxruntime takes its content: ``InferenceSession(gzip.open(path).read())``.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tempfile
import uuid
import zlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from .errors import ModelError
from .files import writing
from .untrusted import check_config, check_proto

VERSION_KEY = "onnxlathe.version"
REPORT_KEY = "onnxlathe.report"
CONFIG_KEY = "onnxlathe.ort_config"
ORT_KEY = "ort_config"
MAX_LENGTH_KEY = "onnxlathe.max_length"
_LARGEST_PROTO = 2**31 - 1
_SINGLE_FILE_LIMIT = 2_000_000_000  # protobuf's limit is 2^31 - 1 bytes, graph included
_LEVELS = {"disable": 0, "basic": 1, "extended": 2, "all": 99}


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Reads an ONNX file; external weights stay on disk, memory-mapped when used. ``.gz`` files are decompressed.

    Raises:
        ModelError: the file is missing, is not ONNX, is truncated, or its external data is missing, too short, or
            outside the model's folder.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"There is no file {file}.", "Check the path.")
    if file.stat().st_size == 0:
        raise ModelError(f"{file} is empty.", "Export or download the model again.")
    compressed = is_compressed(file)
    try:
        proto = _decompressed(file) if compressed else onnx.load(file, load_external_data=False)
        check_proto(proto, str(file), None if compressed else file.parent)
        model = ir.from_proto(proto)
    except ModelError:
        raise
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ModelError(f"{file} is not a gzip file, or is truncated ({_short(error)}).", "Copy it again.") from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}.", "Check its permissions.") from error
    except Exception as error:  # parsers of several formats, each with errors of its own
        raise ModelError(
            f"{file} is not an ONNX model, or is truncated ({_short(error)}).",
            "Export or download it again; other formats (.pt, .safetensors, .tflite) must be exported first.",
        ) from error
    if not list(model.graph.outputs):
        raise ModelError(f"{file} is not an ONNX model: its graph has no outputs.", "Export or download it again.")
    ir.external_data.set_base_dir(model.graph, os.path.dirname(file))  # noqa: PTH120  as onnx_ir itself: "" for "."
    return model


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether a file of this name is compressed by gzip."""
    return Path(path).suffix == ".gz"


def _decompressed(file: Path) -> onnx.ModelProto:
    with gzip.open(file) as content:
        data = content.read(_LARGEST_PROTO + 1)
    if len(data) > _LARGEST_PROTO:
        raise ModelError(f"{file} holds more than 2 GB.", "A model of that size keeps its weights in a file beside it.")
    return onnx.load_model_from_string(data)


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    external_data: bool | None = None,
) -> Path:
    """Writes ``model`` to ``path``; an existing file is replaced only by a complete new one.

    Args:
        model: the model; it is not changed.
        path: the ``.onnx`` file to write; ``.onnx.gz`` writes it compressed, always as one file.
        metadata: extra ``metadata_props`` to store.
        external_data: True puts weights beside the file, False inside; None: inside below 2 GB unless they already
            are in external files.

    Raises:
        ModelError: the folder does not exist or cannot be written, or the model is too large for one file.
    """
    target = Path(path)
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    total = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if is_compressed(target):
        if external_data:
            raise ModelError(f"{target} is one compressed file.", "Leave out external_data, or save to .onnx.")
        external_data = False
    if external_data is None:
        external_data = total >= _SINGLE_FILE_LIMIT or any(isinstance(t, ir.ExternalTensor) for t in tensors)
    if not external_data and total >= _SINGLE_FILE_LIMIT:
        remedy = "Save to .onnx." if is_compressed(target) else "Use external_data=True."
        raise ModelError(f"{total} bytes of weights do not fit in one file.", remedy)
    with writing(target):
        old_data = _data_files(target) if target.exists() else set[Path]()
        with (
            _stored(model, metadata or {}),
            tempfile.TemporaryDirectory(dir=target.parent, prefix=".onnxlathe-") as folder,
        ):
            name = _write(model, Path(folder), target, external_data)
    for stale in old_data - {target.parent / name}:
        if stale.name.startswith(f"{target.name}."):  # ours, and only the replaced file referred to it
            stale.unlink(missing_ok=True)
    return target


def _write(model: ir.Model, folder: Path, target: Path, external_data: bool) -> str:
    """Writes into ``folder``, then moves into place, the data first; returns the name of the data file, if any."""
    draft = folder / target.name
    if not external_data:
        with _in_memory(model):
            if is_compressed(target):
                draft.write_bytes(gzip.compress(ir.to_proto(model).SerializeToString(), mtime=0))
            else:
                ir.save(model, draft)
        draft.replace(target)
        return ""
    name = f"{target.name}.data"
    if (target.parent / name).exists():  # never touch data that the present file may still need
        name = f"{target.name}.{uuid.uuid4().hex[:8]}.data"
    ir.save(model, draft, external_data=name)
    data = target.parent / name
    if (folder / name).exists():
        (folder / name).replace(data)
    try:
        draft.replace(target)
    except BaseException:
        if draft.exists():  # else the new model is in place and needs its data
            data.unlink(missing_ok=True)
        raise
    return name


def config_metadata(ort_config: Mapping[str, Any]) -> dict[str, str]:
    """Metadata entries for session options, in our key and, as far as it can say them, in ONNX Runtime's."""
    if not ort_config:
        return {}
    entries = {CONFIG_KEY: json.dumps(ort_config)}
    if "graph_optimization_level" in ort_config:
        level = _LEVELS[ort_config["graph_optimization_level"]]
        entries[ORT_KEY] = json.dumps({"session_options": {"graph_optimization_level": level}})
    return entries


def read_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The session options stored in an artifact's metadata; empty for a model of others.

    Raises:
        ModelError: they cannot be read, or ask for what a file may not ask for.
    """
    try:
        config = json.loads(metadata.get(CONFIG_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"The session options stored in the model are no JSON ({_short(error)}).", "Compile it again."
        ) from error
    return check_config(config)


@contextlib.contextmanager
def _stored(model: ir.Model, metadata: Mapping[str, str]) -> Generator[None]:
    before = dict(model.metadata_props)
    model.metadata_props.update(metadata)
    try:
        yield
    finally:
        model.metadata_props.clear()
        model.metadata_props.update(before)


@contextlib.contextmanager
def _in_memory(model: ir.Model) -> Generator[None]:
    """Replaces external tensors by in-memory ones while saving to a single file."""
    changed: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor):
                    changed.append((value, tensor))
                    value.const_value = ir.external_data.convert_tensors_from_external([tensor])[0]
        yield
    finally:
        for value, tensor in changed:
            value.const_value = tensor


def _data_files(path: Path) -> set[Path]:
    """External data files that the ONNX file at ``path`` refers to (empty if it cannot be read)."""
    try:
        proto = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError):
        return set()
    entries = (entry for tensor in proto.graph.initializer for entry in tensor.external_data)
    return {path.parent / entry.value for entry in entries if entry.key == "location"}


def _short(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__
