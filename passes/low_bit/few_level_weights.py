"""Weights of two, three or four values, for models trained to bear them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import onnx_ir as ir

from ...compiler.base import Claim, Gate, Outcome, Pass, PassContext
from .choices import FLOAT, choices_of, usable
from .few_levels import BITS, Levels, few_levels
from .nbits_nodes import Coded, Writer


@dataclasses.dataclass(frozen=True)
class FewLevelWeights(Pass):
    """Binary, ternary or mid-rise two-bit weights, written as the MatMulNBits codes that kernels execute.

    1. binary: ``x W -> x (a sign W)``; 2. ternary: ``x (a t)``, t in {-1, 0, 1}; 3. midrise: ``x (s l)``, l in {-1.5,
       -0.5, 0.5, 1.5}; each with one scale a block. See passes/low_bit/few_levels.py for the codes.

    These need training: weights that were not trained to have few values lose far too much (a language model does not
    survive binary or ternary rounding). For a trained one the rounding is exact where its blocks have the scales it was
    trained with. Binary and ternary weights are stored in two bits, mid-rise ones in four: there is no kernel for less.

    Products that are outputs of the model stay as they are. Refused: what QuantizeWeights refuses, and blocks of 16 or
    256 with two bits, which the CPU provider would dequantize on every run.

    Pays like QuantizeWeights with 2 (midrise: 4) bits.

    Attributes:
        levels: binary, ternary or midrise.
        block_size: inputs that share a scale.
        accuracy_level: 4 lets the kernels round activations to int8; 0 does not.
    """

    name: ClassVar[str] = "few-level-weights"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    gate: ClassVar[Gate] = "off"
    levels: Levels = "ternary"
    block_size: Literal[16, 32, 64, 128, 256] = 128
    accuracy_level: Literal[0, 4] = 4

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        bits = BITS[self.levels]
        choices = choices_of(model, outcome, lambda _: bits, lambda _: FLOAT, self.block_size, True)
        choices = [choice for choice in choices if choice.weight.linears and not choice.weight.is_head]
        choices = usable(model, choices, "operator", outcome)
        if bits == 2 and self.block_size in (16, 256):
            for choice in choices:
                reason = (
                    f"the CPU provider has no kernel for 2 bits in blocks of {self.block_size} and would dequantize "
                )
                outcome.refuse(choice.weight.linears[0].node, self.levels, reason + "on every run: take 32, 64 or 128")
            return outcome
        writer = Writer(model, self.name, "operator", self.accuracy_level)
        error = total = 0.0
        for choice in choices:
            matrix = choice.weight.matrix()
            codes, grid = few_levels(matrix, self.levels, self.block_size)
            error += float(((matrix - grid.decode(codes)) ** 2).sum())
            total += float((matrix**2).sum())
            writer.write(choice.weight, Coded(codes, grid), linears=True, gathers=False)
            outcome.counts[f"{self.levels} products"] += len(choice.weight.linears)
        if choices and error > 1e-6 * total:
            outcome.notes.append(
                f"the weights were not {self.levels} before: {error / total:.0%} of their squares is lost, which takes "
                "training to recover"
            )
        return outcome
