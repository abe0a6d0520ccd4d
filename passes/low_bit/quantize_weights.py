"""Weights in 8, 4 or 2 bits."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import onnx_ir as ir

from ...compiler.base import Claim, Gate, Outcome, Pass, PassContext
from ...compiler.graph import weight_bytes
from .accuracy_levels import Level
from .choices import choices_of, usable
from .linear_weights import Weight
from .low_bit import Method, quantize
from .nbits_nodes import Form
from .stored_scales import Scales

Bits = Literal[2, 4, 8, 16]


@dataclasses.dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Stores the weights of linear layers in blocks of low-bit codes, each with a scale and a zero point.

    1. ``x W``, ``Gemm(x, W, b)`` with a constant W -> ``MatMulNBits(x, codes, scales, zero points, b)``.
    2. ``Gather(W, ids)`` -> ``GatherBlockQuantized``; a table that is also the head (tied embeddings) is stored once
       where both have the same bits.

    Pays on the CPU provider in speed for few rows (decoding reads fewer bytes) and everywhere in size. Two bits lose
    too much quality for most models without training; see MixedPrecision, which gives them to the layers that bear it.

    Refused: weights that are not constant, that would not get smaller, operands of unknown rank.

    Sources: com.microsoft.MatMulNBits-1 and GatherBlockQuantized-1; for the methods see gptq.py, hqq.py, awq.py beside
    this file.

    Attributes:
        bits: of the products inside the model; 16 leaves them float.
        block_size: inputs that share a scale.
        symmetric: no zero points: a little smaller, a little worse.
        method: how codes are found. rtn: the nearest, on the range of least squared error. hqq: robust to large
            weights. awq: finer where inputs are large. gptq: least error of the layer's output, the best. The last two
            need calibration samples.
        head_bits: of products that are outputs of the model (logits).
        embedding_bits: of tables.
        form: operator writes MatMulNBits; qdq writes DequantizeLinear (opset 21, for 2 bits 25), which ONNX Runtime
            fuses into it and other runtimes understand.
        accuracy_level: 4 lets the CPU kernels round activations to int8, which more than doubles their speed; 0 does
            not; auto measures its effect on the output and decides product by product.
        scales: float keeps them as the activations are (32 bits on the CPU); uint8 stores a byte each, which ONNX
            Runtime turns into floats as it loads: 0.75 bits a weight less in blocks of 32, at the same speed. Only with
            form operator and zero points.
        target: gptq only; 0 aims at each layer's output on the quantized prefix, 1 at the original model's.
    """

    name: ClassVar[str] = "quantize-weights"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    gate: ClassVar[Gate] = "off"
    bits: Bits = 4
    block_size: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool = False
    method: Method = "rtn"
    head_bits: Bits = 8
    embedding_bits: Bits = 8
    form: Form = "operator"
    accuracy_level: Level = "auto"
    scales: Scales = "float"
    target: float = 0.5

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        choices = choices_of(
            model, outcome, self._bits, lambda _: self.embedding_bits, self.block_size, self.symmetric, self.scales
        )
        choices = usable(model, choices, self.form, outcome)
        if not choices:
            return outcome
        before = weight_bytes(model)
        numbers = sum(choice.weight.outputs * choice.weight.inputs for choice in choices)
        stored = sum(choice.bytes for choice in choices)
        quantize(
            model,
            choices,
            context,
            outcome,
            by=self.name,
            method=self.method,
            form=self.form,
            target=self.target,
            level=self.accuracy_level,
            scales=self.scales,
        )
        outcome.notes.insert(
            0,
            f"{8 * stored / numbers:.3f} bits per weight with scales and zero points; all weights "
            f"{weight_bytes(model) / before:.3f} x of before",
        )
        return outcome

    def _bits(self, weight: Weight) -> int:
        return self.head_bits if weight.is_head else self.bits
