"""One peer's low-bit quantizer, in its own environment: writes the quantized file.

PYTHON benchmarks/lowbit_peer.py TOOL SOURCE TARGET BITS BLOCK_SIZE FOLDER      # FOLDER/calibration.npz

Logits and embedding stay float. onnxsim cannot leave a node out, so its head is put back; it also leaves weights float
whose input is no multiple of 32.
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


def heads(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Nodes that make the logits."""
    return [node for node in model.graph.node if HEAD in node.output]


def onnxruntime_quantizer(method: str, source: Path, bits: int, size: int, folder: Path) -> onnx.ModelProto:
    """onnxruntime.quantization.matmul_nbits_quantizer, asymmetric, its defaults otherwise."""
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizer
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._samples = calibration(folder)

        def get_next(self) -> Any:
            return self._samples.pop(0) if self._samples else None

    model = onnx.load(source)
    configs = {
        "default": lambda: quantizer.DefaultWeightOnlyQuantConfig(block_size=size, is_symmetric=False, bits=bits),
        "HQQ": lambda: quantizer.HQQWeightOnlyQuantConfig(block_size=size, bits=bits),
        "RTN": lambda: quantizer.RTNWeightOnlyQuantConfig(),
        "k-quant": lambda: quantizer.KQuantWeightOnlyQuantConfig(),
        "GPTQ": lambda: quantizer.GPTQWeightOnlyQuantConfig(Reader(), block_size=size, actorder=True, mse=True),
    }
    left = [node.name for node in heads(model)]
    step = quantizer.MatMulNBitsQuantizer(
        model, block_size=size, is_symmetric=False, nodes_to_exclude=left, algo_config=configs[method]()
    )
    step.process()
    return step.model.model


def nncf(method: str, source: Path, bits: int, size: int, folder: Path) -> onnx.ModelProto:
    """nncf.compress_weights on ONNX, asymmetric; 8 bits are per output channel."""
    import nncf as library

    model = onnx.load(source)
    extra: dict[str, Any] = {}
    if bits == 4:
        adjust = library.GroupSizeFallbackMode.ADJUST  # what no block divides gets 8 bits
        advanced = library.AdvancedCompressionParameters(group_size_fallback_mode=adjust)
        extra = {"group_size": size, "ratio": 1.0, "all_layers": False, "advanced_parameters": advanced}
    if method:
        extra |= {"awq": True, "scale_estimation": True, "dataset": library.Dataset(calibration(folder))}
    return library.compress_weights(
        model,
        mode=library.CompressWeightsMode.INT4_ASYM if bits == 4 else library.CompressWeightsMode.INT8_ASYM,
        ignored_scope=library.IgnoredScope(
            names=[node.name for node in heads(model)], types=["Gather"], validate=False
        ),
        **extra,
    )


def onnxsim(method: str, source: Path, bits: int, size: int, folder: Path) -> onnx.ModelProto:
    """onnxsim's blocks of 32, symmetric, and what it refines them with."""
    import onnxsim as library

    model = onnx.load(source)
    quantize = library.quantize_weight_only_int4 if bits == 4 else library.quantize_weight_only_int8_block
    result = quantize(model)
    float_inputs = {node.output[0]: node.input[1] for node in heads(model)}
    kept = {tensor.name for tensor in result.graph.initializer}
    for node in heads(result):
        node.input[1] = float_inputs[node.output[0]]
        missing = {node.input[1]} - kept - {name for other in result.graph.node for name in other.output}
        result.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in missing)
    if method:
        refine = getattr(library, f"apply_{method.lower()}")
        result = refine(model, result, calibration_data=calibration(folder))
    used = {name for node in result.graph.node for name in node.input}
    dead = [node for node in result.graph.node if node.op_type == "DequantizeLinear" and node.output[0] not in used]
    for node in dead:
        result.graph.node.remove(node)
    used = {name for node in result.graph.node for name in node.input}
    for tensor in [tensor for tensor in result.graph.initializer if tensor.name not in used]:
        result.graph.initializer.remove(tensor)
    return result


TOOLS = {"ORT": onnxruntime_quantizer, "NNCF": nncf, "onnxsim": onnxsim}


if __name__ == "__main__":
    name, origin, result, width, block, samples_folder = sys.argv[1:]
    tool, _, how = name.partition(" ")
    onnx.save(TOOLS[tool](how, Path(origin), int(width), int(block), Path(samples_folder)), result)
