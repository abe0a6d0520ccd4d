"""Lets one tool quantize one model to int8 in a fresh process.

    PYTHON benchmarks/quantizers.py TOOL IN.onnx OUT.onnx FOLDER

FOLDER holds the calibration samples (``.npz``), the same for all tools. Runs in the tool's own environment, so it
imports nothing of ours except for the tools called onnxlathe.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def samples_in(folder: str) -> list[dict[str, Any]]:
    """The samples of a folder."""
    found: list[dict[str, Any]] = []
    for file in sorted(Path(folder).glob("*.npz")):
        with np.load(file) as archive:
            found.append({name: archive[name] for name in archive.files})
    return found


def _vnni() -> bool:
    """Whether this CPU adds 8-bit products up in 32 bits (peers' environments have nothing of ours)."""
    info = Path("/proc/cpuinfo")
    return not info.exists() or "vnni" in info.read_text()


def onnxlathe(passes: Callable[[], Any]) -> Callable[[str, str, str], None]:
    """Ours: a preset, or passes."""

    def run(source: str, target: str, folder: str) -> None:
        import onnxlathe as lathe

        steps = passes()
        lathe.compile(source, steps, threads=2, calibration=folder, speed_gate=False, progress=False).save(target)

    return run


def _dynamic() -> Any:
    from onnxlathe.passes.presets import PRESETS

    steps = PRESETS["cpu-int8"].passes
    return ["quantize-dynamic" if step == "quantize-static" else step for step in steps]


def ort_dynamic(source: str, target: str, folder: str) -> None:
    """onnxruntime's dynamic quantization, with its defaults."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, target)


def ort_dynamic_best(source: str, target: str, folder: str) -> None:
    """The same per channel, and with 7-bit weights where its documentation advises them: on CPUs without VNNI."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, target, per_channel=True, reduce_range=not _vnni())


def ort_static(source: str, target: str, folder: str) -> None:
    """onnxruntime's QDQ quantization after its own pre-processing: uint8 x int8 per channel, 7 bits without VNNI."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._samples = iter(samples_in(folder))

        def get_next(self) -> Any:
            return next(self._samples, None)

    with tempfile.TemporaryDirectory() as temporary:
        prepared = str(Path(temporary) / "prepared.onnx")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        for per_channel in (True, False):  # 1.31 fails on a Gemm with a bias per channel
            try:
                quantize_static(
                    prepared, target, Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8, per_channel=per_channel, reduce_range=not _vnni(),
                )  # fmt: skip
            except ValueError:
                if not per_channel:
                    raise
            else:
                return


def ort_fused(then: Callable[[str, str, str], None]) -> Callable[[str, str, str], None]:
    """``then`` on the graph that onnxruntime's transformers optimizer fused."""

    def run(source: str, target: str, folder: str) -> None:
        from onnxruntime.transformers import optimizer

        with tempfile.TemporaryDirectory() as temporary:
            fused = str(Path(temporary) / "fused.onnx")
            result = optimizer.optimize_model(source, model_type="bert", num_heads=12, hidden_size=384, opt_level=0)
            result.save_model_to_file(fused)
            then(fused, target, folder)

    return run


def nncf(transformer: bool) -> Callable[[str, str, str], None]:
    """NNCF's post-training quantization of the ONNX model."""

    def run(source: str, target: str, folder: str) -> None:
        import nncf as tool
        import onnx

        samples = samples_in(folder)
        kind = tool.ModelType.TRANSFORMER if transformer else None
        model = tool.quantize(onnx.load(source), tool.Dataset(samples), subset_size=len(samples), model_type=kind)
        onnx.save(model, target)

    return run


def onnxsim(source: str, target: str, folder: str) -> None:
    """onnxsim's static QDQ quantization, with its defaults (per channel, minmax)."""
    import onnx
    import onnxsim as tool

    onnx.save(tool.quantize_static(source, calibration_data=samples_in(folder)), target)


TOOLS: dict[str, Callable[[str, str, str], None]] = {
    "onnxlathe static": onnxlathe(lambda: "cpu-int8"),
    "onnxlathe dynamic": onnxlathe(_dynamic),
    "ORT dynamic": ort_dynamic,
    "ORT dynamic, per channel": ort_dynamic_best,
    "ORT static": ort_static,
    "ORT dynamic on ORT-fused": ort_fused(ort_dynamic_best),
    "ORT static on ORT-fused": ort_fused(ort_static),
    "onnxsim static": onnxsim,
    "NNCF transformer": nncf(True),
    "NNCF": nncf(False),
}


if __name__ == "__main__":
    TOOLS[sys.argv[1]](*sys.argv[2:])
