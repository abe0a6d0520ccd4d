"""Opens raw onnxruntime sessions: from a file, or from an ``onnx_ir.Model`` without copying its weights."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from .artifact import is_compressed, load
from .errors import ModelError
from .memory import return_freed
from .providers import Device, providers_for

# Smaller tensors stay in the serialized graph, where ORT's shape inference and constant folding read them.
_INLINE_BYTES = 1024
_PLACEHOLDER = "in-memory"
_FOLDER_KEY = "session.model_external_initializers_file_folder_path"
_NATIVE = {np.dtype(code) for code in "fdebhilqBHILQ?"}


class LatheInferenceSession(ort.InferenceSession):
    """An ``InferenceSession`` that keeps alive the arrays its initializers point into."""

    def __init__(self, source: str | bytes, options: ort.SessionOptions, device: Device, weights: list[Any]) -> None:
        self.weights = weights
        super().__init__(source, options, providers=providers_for(device))


def session_options(
    *, threads: int = 0, optimize: bool = True, repack: bool = True, ort_config: Mapping[str, Any] | None = None
) -> ort.SessionOptions:
    """Session options for a run.

    Args:
        threads: intra-op threads, 0 for ONNX Runtime's default.
        optimize: whether ORT may run its own graph optimizations.
        repack: whether kernels may keep their own copies of weights and memory between runs; without, memory-mapped
            weights stay on disk.
        ort_config: what the artifact asks for: ``{"config_entries": {key: value}}`` and/or
            ``{"graph_optimization_level": "disable|basic|extended|all"}``, ``{"execution_order": "default|priority"}``
            (priority: nodes run in the order of the file), ``{"memory_pattern": bool}``, ``{"memory_arena": bool}``,
            ``{"memory_reuse": bool}`` (a dead buffer kept for a later value of its shape; not: freed at once).
    """
    config: Mapping[str, Any] = ort_config or {}
    options = ort.SessionOptions()
    options.log_severity_level = 4  # failures reach the user as exceptions, not as log lines
    options.intra_op_num_threads = threads
    level = config.get("graph_optimization_level", "all") if optimize else "disable"
    options.graph_optimization_level = {
        "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }[level]
    if config.get("execution_order", "default") == "priority":
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_mem_pattern = config.get("memory_pattern", True)
    options.enable_mem_reuse = config.get("memory_reuse", True)
    options.enable_cpu_mem_arena = config.get("memory_arena", True)
    if not repack:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False  # it grows by doubling, and such a session runs once
    for key, value in config.get("config_entries", {}).items():
        options.add_session_config_entry(key, value)
    return options


def open_session(
    source: ir.Model | str | os.PathLike[str],
    options: ort.SessionOptions,
    device: Device = "cpu",
) -> LatheInferenceSession:
    """Opens ``source`` in ONNX Runtime.

    Weights of an ``onnx_ir.Model`` stay outside the serialized graph: those in external files are mapped by ORT, the
    others are handed over in memory; so the 2 GB limit of protobuf does not matter. ``.gz`` is decompressed first.

    Raises:
        ModelError: ONNX Runtime refuses the model; the message names the reason.
    """
    return_freed()
    if not isinstance(source, ir.Model) and is_compressed(source):
        source = load(source)
    try:
        if isinstance(source, ir.Model):
            with weights_outside(source) as (names, values, folder):
                content = ir.to_proto(source).SerializeToString()
            if device == "cpu" and options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL:
                return _sharing(content, options, names, values, folder)
            if folder:
                options.add_session_config_entry(_FOLDER_KEY, str(Path(folder).resolve()))
            if names:
                options.add_external_initializers(names, values)
            return LatheInferenceSession(content, options, device, values)
        return LatheInferenceSession(str(Path(source)), options, device, [])
    except ModelError:
        raise
    except Exception as error:  # ORT's exception classes are not public
        raise ModelError(f"ONNX Runtime cannot load the model: {_first_line(error)}", _remedy(str(error))) from error


def _sharing(
    content: bytes, options: ort.SessionOptions, names: list[str], values: list[Any], folder: str
) -> LatheInferenceSession:
    """A session that reads the weights handed over where they are; ``add_external_initializers`` would copy them.

    Only where ORT does not look at weights to optimize the graph: it would read them from the file that their
    placeholders name, which must exist and is not theirs.
    """
    with tempfile.TemporaryDirectory() as empty:
        if not folder and names:
            (Path(empty) / _PLACEHOLDER).touch()
            folder = empty
        if folder:
            options.add_session_config_entry(_FOLDER_KEY, str(Path(folder).resolve()))
        for name, value in zip(names, values, strict=True):
            options.add_initializer(name, value)
        return LatheInferenceSession(content, options, "cpu", values)


def run_session(
    session: ort.InferenceSession, feeds: Mapping[str, np.ndarray[Any, Any]], outputs: list[str] | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    """Runs ``session`` and returns its outputs by name."""
    names = outputs or [output.name for output in session.get_outputs()]
    try:
        results: list[Any] = list(session.run(names, dict(feeds)))
        return dict(zip(names, results, strict=True))
    except Exception as error:
        raise ModelError(
            f"ONNX Runtime failed while running the model: {_first_line(error)}",
            "Check the input names, shapes and dtypes against `onnxlathe inspect`.",
        ) from error


def owning(array: np.ndarray[Any, Any]) -> ort.OrtValue:
    """An OrtValue on the CPU with a copy of ``array``.

    ``ortvalue_from_numpy`` reads the array's own memory, and what ``numpy()`` of it gives does not keep that alive.
    """
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype.type, "cpu")
    value.update_inplace(np.ascontiguousarray(array))
    return value


def expose(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy of ``model`` whose outputs include the values of the main graph called ``names``.

    Raises:
        ModelError: no node of the main graph makes such a value.
    """
    copy = model.clone()
    made = {value.name: value for node in copy.graph for value in node.outputs}
    have = {value.name for value in copy.graph.outputs}
    wanted = [name for name in names if name not in have]
    missing = [name for name in wanted if name not in made]
    if missing:
        raise ModelError(f"The graph does not make {', '.join(missing[:5])}.", "Check the names of the values.")
    copy.graph.outputs.extend(made[name] for name in wanted)
    return copy


@contextlib.contextmanager
def weights_outside(model: ir.Model) -> Generator[tuple[list[str], list[Any], str]]:
    """Takes large initializers out of the graph while it is serialized, then puts them back.

    Yields names and values to hand over in memory, and the folder of the file that the other large initializers stay
    in: those that already are in external files are mapped by ORT itself, which copies what it gets in memory. What
    nobody reads is taken out altogether, as passes leave the weights that they replaced until the next cleanup.
    """
    everything = list(model.graph.initializers.items())
    unread = {name for name, value in everything if _is_unread(value)}
    names: list[str] = []
    values: list[Any] = []
    originals: list[tuple[ir.Value, ir.TensorProtocol]] = []
    folder, location = "", _PLACEHOLDER
    initializers = [value for graph in model.graphs() for value in graph.initializers.values()]
    initializers = [value for value in initializers if value.name not in unread or value.graph is not model.graph]
    for value in initializers:
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and value.graph is model.graph and _can_be_handed_over(value, tensor):
            folder, location = str(tensor.base_dir) or ".", str(tensor.location)
            break
    try:
        for name in unread:
            del model.graph.initializers[name]
        for value in initializers:
            tensor = value.const_value
            if tensor is None:
                continue
            large = value.graph is model.graph and _can_be_handed_over(value, tensor)
            if large and isinstance(tensor, ir.ExternalTensor) and folder == (str(tensor.base_dir) or "."):
                continue
            if large:
                name = value.name or ""
                names.append(name)
                values.append(ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.numpy())))
                shape = ir.Shape(tensor.shape.numpy())
                replacement = ir.ExternalTensor(location, 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
            elif isinstance(tensor, ir.ExternalTensor):  # ORT would look for its file beside a model it never sees
                replacement = ir.external_data.convert_tensors_from_external([tensor])[0]
            else:
                continue
            originals.append((value, tensor))
            value.const_value = replacement
        yield names, values, folder
    finally:
        for value, tensor in originals:
            value.const_value = tensor
        if unread:
            model.graph.initializers.clear()
            model.graph.initializers.update(everything)


def _is_unread(value: ir.Value) -> bool:
    return not value.uses() and not value.is_graph_output() and not value.is_graph_input()


def _can_be_handed_over(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    if tensor.nbytes <= _INLINE_BYTES or tensor.dtype == ir.DataType.STRING:
        return False
    return tensor.dtype.numpy() in _NATIVE  # bfloat16, float8, packed int4: NumPy has no such type


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _remedy(text: str) -> str:
    if "external" in text.lower() and ("not" in text.lower() or "escape" in text.lower()):
        return "Keep the external data file in the model's folder, under the name the model records."
    if "NOT_IMPLEMENTED" in text or "Could not find an implementation" in text:
        return "This operator has no kernel on this device: run `onnxlathe inspect` for its opset and domain."
    if "opset" in text.lower():
        return "Convert the model to an opset this onnxruntime supports, or upgrade onnxruntime."
    return "Check the file with `onnxlathe inspect`."
