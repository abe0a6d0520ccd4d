"""Embedding tables as int8: rows are gathered first and only they are dequantized."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..compiler.base import Outcome
from ..compiler.graph import (
    Names,
    add_initializer,
    all_nodes,
    attribute,
    constant,
    is_op,
    make_node,
    opset,
    rank,
    replace,
)
from ..runtime.quantization import QuantSpec
from .quantization_plan import Filter, selected

_RULE = "Gather(table) -> DequantizeLinear(Gather(int8 table))"
_LEAST = 1 << 12  # elements; below, nothing is saved


def quantize_tables(
    model: ir.Model, include: Sequence[Filter], exclude: Sequence[Filter], by: str, outcome: Outcome
) -> None:
    """Quantizes the float tables that Gather reads rows of, with one scale per column.

    ``DequantizeLinear -> Gather`` would be the spelling of a QDQ graph, but ONNX Runtime then dequantizes the whole
    table in every run; ``Gather -> DequantizeLinear`` touches the rows that are read.
    """
    names = Names(model)
    stored: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    for node in all_nodes(model):
        if not is_op(node, "Gather") or not isinstance(node.graph, ir.Graph):
            continue
        table = node.inputs[0]
        if table is None or not table.is_initializer() or table.dtype != ir.DataType.FLOAT or rank(table) != 2:
            continue
        array = constant(table)
        if array is None or array.size < _LEAST or not selected(node, include, exclude):
            continue
        if attribute(node, "axis", 0) != 0 or opset(model) < 13:
            outcome.refuse(node, _RULE, "it gathers along another axis than 0, or the opset is below 13")
            continue
        if not np.isfinite(array).all():
            outcome.refuse(node, _RULE, f"{table.name} holds NaN or infinity")
            continue
        if table not in stored:
            spec = QuantSpec("int8", symmetric=True, axis=1)
            scale, zero = spec.weight_parameters(array)
            owner = table.graph if isinstance(table.graph, ir.Graph) else node.graph
            stored[table] = (
                add_initializer(owner, names, f"{table.name}_quantized", spec.quantize(array, scale, zero)),
                add_initializer(owner, names, f"{table.name}_scale", scale),
                add_initializer(owner, names, f"{table.name}_zero_point", zero),
            )
        integers, scales, zeros = stored[table]
        result = node.outputs[0]
        rows = make_node(
            "Gather", [integers, node.inputs[1]], name=names.fresh(f"{node.name}/rows"),
            output=names.fresh(f"{result.name}_quantized"), like=result, dtype=ir.DataType.INT8, attributes={"axis": 0},
        )  # fmt: skip
        restored = make_node(
            "DequantizeLinear", [rows.outputs[0], scales, zeros], name=names.fresh(f"{node.name}/dequantize"),
            output=names.fresh(f"{result.name}_dequantized"), like=result, attributes={"axis": -1},
        )  # fmt: skip
        replace(node, [rows, restored], by=by)
        outcome.counts["embedding table as int8"] += 1
