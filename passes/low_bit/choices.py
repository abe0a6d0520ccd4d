"""What becomes of each weight: its bits, its blocks, the bytes it takes then, and whether that can be done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import onnx_ir as ir

from ...compiler.base import Outcome
from ...compiler.graph import opset
from .blockwise import stored_bytes
from .linear_weights import Weight, find_weights
from .nbits_nodes import QDQ_OPSET, Form
from .stored_scales import Scales

FLOAT = 16
"""The number of bits that stands for: left as it is."""
_RULE = "constant weight -> low bits"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one weight becomes: bits of its products and of its lookups (16: left float), blocks and scales."""

    weight: Weight
    bits: int
    table_bits: int
    block_size: int
    symmetric: bool
    scales: Scales = "float"

    @property
    def bytes(self) -> int:
        """Bytes stored afterwards; one copy where lookups and products share bits."""
        weight = self.weight
        wanted = {self.bits} if weight.linears else set[int]()
        wanted |= {self.table_bits} if weight.gathers else set[int]()
        return sum(self.bytes_at(bits) for bits in wanted)

    def bytes_at(self, bits: int) -> int:
        """Bytes of one copy at ``bits``; 16 stands for as it is."""
        weight = self.weight
        if bits == FLOAT:
            tensor = weight.value.const_value
            return tensor.nbytes if tensor is not None else 0
        return stored_bytes((weight.outputs, weight.inputs), bits, self.block_size, self.symmetric, self.scales)


def usable(model: ir.Model, choices: Iterable[Choice], form: Form, outcome: Outcome) -> list[Choice]:
    """The choices that can be carried out and save bytes; the others are refused by name."""
    kept: list[Choice] = []
    for choice in choices:
        weight, bits = choice.weight, min(choice.bits, choice.table_bits)
        anchor = [linear.node for linear in weight.linears] + weight.gathers
        if bits == FLOAT or not anchor:
            continue
        reason = ""
        if choice.bytes_at(bits) >= choice.bytes_at(FLOAT):
            reason = f"{weight.name} [{weight.outputs}, {weight.inputs}] would not get smaller"
        elif form == "qdq" and weight.linears and choice.bits != FLOAT and opset(model) < QDQ_OPSET[choice.bits]:
            reason = f"DequantizeLinear takes blocks of {choice.bits} bits from opset {QDQ_OPSET[choice.bits]} on: "
            reason += "run upgrade-opset first"
        elif form == "qdq" and weight.value.dtype != ir.DataType.FLOAT:
            reason = f"{weight.name} is {weight.value.dtype}: only float32 products of DequantizeLinear are fused"
        if not reason and weight.gathers and choice.table_bits != FLOAT and weight.inputs * choice.table_bits % 8:
            reason = f"the rows of {weight.name} are no whole bytes at {choice.table_bits} bits"
        if reason:
            outcome.refuse(anchor[0], _RULE, reason)
            continue
        kept.append(choice)
    return kept


def choices_of(
    model: ir.Model,
    outcome: Outcome,
    bits: Callable[[Weight], int],
    table_bits: Callable[[Weight], int],
    block_size: int,
    symmetric: bool,
    scales: Scales = "float",
) -> list[Choice]:
    """One choice for each weight of the model, by its role."""
    return [
        Choice(
            weight,
            bits(weight) if weight.linears else FLOAT,
            table_bits(weight) if weight.gathers else FLOAT,
            block_size,
            symmetric,
            scales,
        )
        for weight in find_weights(model, outcome)
    ]
