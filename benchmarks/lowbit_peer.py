"""One peer's low-bit quantizer, in its own environment: writes the quantized file.

PYTHON benchmarks/lowbit_peer.py TOOL SOURCE TARGET BITS BLOCK_SIZE FOLDER      # FOLDER/calibration.npz
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx

HEAD = "logits"


def calibration(folder: Path) -> list[dict[str, Any]]:
    """The samples that the benchmark wrote."""
    found: dict[str, dict[str, Any]] = {}
    with np.load(folder / "calibration.npz") as archive:
        for key in archive.files:
            number, name = key.split("/", 1)
            found.setdefault(number, {})[name] = archive[key]
    return list(found.values())


def heads(model: onnx.ModelProto) -> list[str]:
    """Nodes that make the logits: left float, as in every row."""
    return [node.name for node in model.graph.node if HEAD in node.output]


def onnxruntime_quantizer(tool: str, source: Path, target: Path, bits: int, size: int, folder: Path) -> None:
    """onnxruntime.quantization.matmul_nbits_quantizer, asymmetric, its defaults otherwise."""
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizer
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._samples = iter(calibration(folder))

        def get_next(self) -> Any:
            return next(self._samples, None)

    model = onnx.load(source)
    left = heads(model)
    configs = {
        "ort-default": lambda: quantizer.DefaultWeightOnlyQuantConfig(block_size=size, is_symmetric=False, bits=bits),
        "ort-hqq": lambda: quantizer.HQQWeightOnlyQuantConfig(block_size=size, bits=bits),
        "ort-rtn": lambda: quantizer.RTNWeightOnlyQuantConfig(),
        "ort-k_quant": lambda: quantizer.KQuantWeightOnlyQuantConfig(),
        "ort-gptq": lambda: quantizer.GPTQWeightOnlyQuantConfig(Reader(), block_size=size, actorder=True, mse=True),
    }
    step = quantizer.MatMulNBitsQuantizer(
        model, block_size=size, is_symmetric=False, nodes_to_exclude=left, algo_config=configs[tool]()
    )
    step.process()
    step.model.save_model_to_file(str(target))


def nncf(tool: str, source: Path, target: Path, bits: int, size: int, folder: Path) -> None:
    """nncf.compress_weights on ONNX, asymmetric; ``nncf-awq`` with AWQ and scale estimation on the samples."""
    import nncf as library

    model = onnx.load(source)
    extra: dict[str, Any] = {}
    if tool == "nncf-awq":
        extra = {"awq": True, "scale_estimation": True, "dataset": library.Dataset(calibration(folder))}
    compressed = library.compress_weights(
        model,
        mode=library.CompressWeightsMode.INT4_ASYM if bits == 4 else library.CompressWeightsMode.INT8_ASYM,
        group_size=size,
        ratio=1.0,
        all_layers=False,
        ignored_scope=library.IgnoredScope(names=heads(model), types=["Gather"], validate=False),
        **extra,
    )
    onnx.save(compressed, target)


if __name__ == "__main__":
    name, origin, result, width, block, samples_folder = sys.argv[1:]
    run = nncf if name.startswith("nncf") else onnxruntime_quantizer
    run(name, Path(origin), Path(result), int(width), int(block), Path(samples_folder))
