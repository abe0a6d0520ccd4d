"""Devices and execution providers: what is asked for is used, or an error says how to get it."""

from __future__ import annotations

import contextlib
import functools
import io
from typing import Literal

import onnx
import onnx.helper as oh
import onnxruntime as ort

from .errors import RuntimeUnavailable

DeviceChoice = Literal["cpu", "cuda", "auto"]
Device = Literal["cpu", "cuda"]

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_WARNING, _FATAL = 2, 4  # log severities of onnxruntime; warning is its default
_GET_CUDA = (
    "Install onnxruntime-gpu together with the CUDA 13 and cuDNN 9 libraries it links (for example "
    "pip install 'onnxruntime-gpu[cuda,cudnn]'), check that nvidia-smi lists a GPU, or use device='cpu'."
)


def providers_for(device: Device) -> list[str]:
    """Execution providers of ``device``, best first (CUDA keeps CPU for shape operators)."""
    return [_CUDA, _CPU] if device == "cuda" else [_CPU]


def resolve_device(device: str) -> Device:
    """Turns the device asked for into the device that will run.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"auto"`` (CUDA where it works, else CPU).

    Raises:
        RuntimeUnavailable: CUDA was asked for and cannot run here, or the name is unknown.
    """
    if device == "cpu":
        return "cpu"
    if device not in ("cuda", "auto"):
        raise RuntimeUnavailable(f"Unknown device {device!r}.", "Use 'cpu', 'cuda' or 'auto'.")
    problem = cuda_problem()
    if problem is None:
        return "cuda"
    if device == "auto":
        return "cpu"
    raise RuntimeUnavailable(f"device='cuda' was asked for, but {problem}.", _GET_CUDA)


@functools.cache
def cuda_problem() -> str | None:
    """Why CUDA cannot run here, or None if it can.

    ``get_available_providers()`` only tells what the wheel was built with, and a session falls back to the CPU
    silently; so a one-node session is opened and asked which providers it really got.
    """
    if _CUDA not in ort.get_available_providers():
        return f"this onnxruntime ({ort.__version__}) was built without the CUDA execution provider"
    value = oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = oh.make_graph([oh.make_node("Relu", ["x"], ["y"])], "probe", [value], [result])
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    ort.set_default_logger_severity(_FATAL)  # what goes wrong is said in our words
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ort.preload_dlls(directory="")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[_CUDA])
    except Exception as error:  # ORT raises bare RuntimeError subclasses that differ by platform
        return f"onnxruntime could not start it ({str(error).splitlines()[0]})"
    finally:
        ort.set_default_logger_severity(_WARNING)
    if _CUDA not in session.get_providers():
        return "onnxruntime could not load it (no NVIDIA driver, GPU, or CUDA/cuDNN libraries found)"
    return None
