"""What ONNX Runtime's CPU provider makes of a quantized node: an integer kernel, nothing at all, or only overhead.

The table was read off ONNX Runtime's own optimized graphs (1.31, ``optimized_model_filepath``); the rules behind it are
in its core/optimizer/qdq_transformer/selectors_actions. ``tests/test_quantization_support.py`` holds every row against
the installed onnxruntime. The CUDA provider has no int8 kernels for QDQ graphs: all is overhead there.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from .providers import Device
from .quantization import QuantType

Execution = Literal["integer", "folded", "overhead"]


@dataclasses.dataclass(frozen=True)
class Support:
    """What becomes of a node between DequantizeLinear and QuantizeLinear.

    Attributes:
        execution: ``integer``: one integer kernel runs instead; ``folded``: the node itself runs on 8-bit data and
            Q/DQ around it vanish, where its input and output have one scale; ``overhead``: Q/DQ stay, and the node
            runs in float.
        kernel: the operator that runs, e.g. ``QLinearConv``.
        needs_output: the integer kernel also needs QuantizeLinear right behind the node.
        reason: why it is overhead, in words a user can act on.
    """

    execution: Execution
    kernel: str = ""
    needs_output: bool = False
    reason: str = ""


_INTEGER = {
    "MatMul": Support("integer", "MatMulIntegerToFloat"),  # with QuantizeLinear behind it: QLinearMatMul
    "Gemm": Support("integer", "QGemm"),
    "Conv": Support("integer", "QLinearConv", needs_output=True),
    "Add": Support("integer", "QLinearAdd", needs_output=True),
    "Mul": Support("integer", "QLinearMul", needs_output=True),
    "Concat": Support("integer", "QLinearConcat", needs_output=True),
    "Where": Support("integer", "QLinearWhere", needs_output=True),
    "Softmax": Support("integer", "QLinearSoftmax", needs_output=True),
    "Sigmoid": Support("integer", "QLinearSigmoid", needs_output=True),
    "LeakyRelu": Support("integer", "QLinearLeakyRelu", needs_output=True),
    "AveragePool": Support("integer", "QLinearAveragePool", needs_output=True),
    "GlobalAveragePool": Support("integer", "QLinearGlobalAveragePool", needs_output=True),
}
_FOLDED = (
    "MaxPool", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Gather", "Flatten", "Identity", "Tile",
    "Expand", "Split", "Resize", "DepthToSpace", "ReduceMax", "ReduceMin",
)  # fmt: skip
_ABSORBED = ("Relu", "Clip")
_FLOAT = (
    "Relu", "Clip", "Sub", "Div", "Pow", "Min", "Max", "Tanh", "Gelu", "Erf", "Sqrt", "Exp", "Neg", "Abs", "Elu",
    "Softplus", "HardSigmoid", "HardSwish", "LayerNormalization", "ReduceMean", "Pad", "SpaceToDepth", "ConvTranspose",
)  # fmt: skip
INTEGER_OPS, FOLDED_OPS, FLOAT_OPS = tuple(_INTEGER), _FOLDED, _FLOAT


def predict(op_type: str, domain: str = "", activation: QuantType = "uint8", device: Device = "cpu") -> Support:
    """What happens to an operator whose inputs come from DequantizeLinear.

    Args:
        op_type: the operator.
        domain: its domain; contrib operators have no rule.
        activation: type of the quantized activations.
        device: execution provider.
    """
    if device != "cpu":
        return Support("overhead", reason="the CUDA provider has no int8 kernels for QDQ graphs")
    if activation in ("int16", "uint16"):
        return Support("overhead", reason="there are no 16-bit kernels: Q/DQ around a float kernel, for accuracy only")
    if domain:
        return Support("overhead", reason=f"no integer kernel for {domain}.{op_type}")
    if op_type in _INTEGER:
        return _INTEGER[op_type]
    if op_type in _FOLDED:
        return Support("folded", op_type)
    if op_type in _ABSORBED:
        reason = "not fused between DequantizeLinear and QuantizeLinear; behind a kernel, QuantizeLinear itself clips"
        return Support("overhead", reason=reason)
    return Support("overhead", reason=f"no integer kernel for {op_type}")


def product_problem(node: ir.Node) -> str:
    """Why a MatMul, Gemm or Conv does not get its integer kernel although its operator has one; empty if it does."""
    if node.op_type == "Gemm" and _number(node, "beta") != 1.0 and len(node.inputs) > 2:
        return "Gemm with beta other than 1 has no integer kernel: run fuse-linear first"
    left, weight = (*node.inputs, None)[:2]
    if node.op_type == "MatMul" and left is not None and left.is_initializer() and weight is not None:
        return "a constant on the left of MatMul has no integer kernel for signed weights"
    if node.op_type == "MatMul" and weight is not None and weight.shape is not None and len(weight.shape) == 1:
        return "a product with a vector has no integer kernel"
    return ""


def _number(node: ir.Node, name: str) -> float:
    return float(node.attributes[name].value) if name in node.attributes else 1.0


@functools.cache
def has_vnni() -> bool:
    """Whether 8-bit products add up in 32 bits on this CPU: AVX512-VNNI, AVX-VNNI, or not x86 at all.

    Elsewhere two neighbouring products are added in saturating 16-bit arithmetic (``vpmaddubsw``), so full-range uint8
    activations times full-range int8 weights can saturate; and int8 activations have no fast kernel.
    """
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return True
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), None)
    return flags is None or any(name in flags.split() for name in ("avx512_vnni", "avx_vnni", "avx512vnni"))
