"""Embedding tables in 8 bits: only the rows that are read are dequantized."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.base import Outcome
from ..low_bit.blockwise import minmax_grid
from ..low_bit.linear_weights import find_weights
from ..low_bit.nbits_nodes import Coded, Writer
from .quantization_plan import Filter, selected

_RULE = "Gather(table) -> GatherBlockQuantized(8-bit table)"
_LEAST = 1 << 12  # elements; below, nothing is saved
_BLOCK_SIZE = 128


def quantize_tables(
    model: ir.Model, include: Sequence[Filter], exclude: Sequence[Filter], by: str, outcome: Outcome
) -> None:
    """Quantizes the float tables that Gather reads rows of, with one scale for every 128 numbers of a row.

    ``DequantizeLinear -> Gather`` would be the spelling of a QDQ graph, but ONNX Runtime then dequantizes the whole
    table in every run. ``Gather -> DequantizeLinear`` with a scale per column reads few rows, but its kernel works
    number by number, far slower than GatherBlockQuantized.
    """
    writer = Writer(model, by, "operator", 0)
    for weight in find_weights(model, Outcome()):
        if not weight.gathers or weight.value.dtype != ir.DataType.FLOAT or weight.outputs * weight.inputs < _LEAST:
            continue
        left = [node for node in weight.gathers if not selected(node, include, exclude)]
        if left:
            outcome.refuse(left[0], _RULE, f"{weight.name} is left float by include or exclude")
            continue
        matrix = weight.matrix()
        if not np.isfinite(matrix).all():
            outcome.refuse(weight.gathers[0], _RULE, f"{weight.name} holds NaN or infinity")
            continue
        grid = minmax_grid(matrix, 8, _BLOCK_SIZE, symmetric=True)
        writer.write(weight, Coded(grid.round(matrix), grid), linears=False, gathers=True)
        outcome.counts["embedding table in 8 bits"] += 1
