"""Scales in a byte each: codes on a logarithmic grid, which ONNX Runtime computes back into floats when it loads them.

Sources: double quantization, Dettmers et al., QLoRA (2305.14314), and the 6-bit scales of llama.cpp's k-quants. A
logarithmic grid has the same relative error everywhere: half of ln(largest / smallest) / 255, under 1 % where the
scales of a weight differ by a factor of 100, while the codes of 4 bits are wrong by 5 % of a block's largest weight.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from ...compiler.graph import PASS_KEY, Names, add_initializer, make_node

if TYPE_CHECKING:
    from .blockwise import Grid

Array = np.ndarray[Any, Any]
Scales = Literal["float", "uint8"]
_TOP = 255
_EXTRA = 8  # bytes of step and lowest logarithm
_FEWEST = 64  # below this many scales there is nothing to save


@dataclasses.dataclass(frozen=True)
class CodedScales:
    """``scale = exp(code * step + low)``.

    Attributes:
        codes: uint8, of the shape of the scales.
        step: distance of two codes' logarithms.
        low: logarithm of the smallest scale.
    """

    codes: Array
    step: np.float32
    low: np.float32

    def decode(self) -> Array:
        """The scales, float32."""
        return np.exp(self.codes.astype(np.float32) * self.step + self.low)


def scales_bytes(count: int, scales: Scales) -> int:
    """Bytes of ``count`` scales."""
    return count + _EXTRA if scales == "uint8" and count >= _FEWEST else 4 * count


def code_scales(scales: Array) -> CodedScales:
    """The nearest codes of positive scales."""
    logarithms = np.log(scales.astype(np.float64))
    low, high = float(logarithms.min()), float(logarithms.max())
    step = (high - low) / _TOP or 1.0
    return CodedScales(np.rint((logarithms - low) / step).astype(np.uint8), np.float32(step), np.float32(low))


def with_positive_scales(codes: Array, grid: Grid) -> tuple[Array, Grid]:
    """The same weight with every scale positive: where it was not, codes and zero point are counted from the top."""
    negative = grid.scales < 0
    if not negative.any():
        return codes, grid
    columns = np.repeat(negative, grid.block_size, axis=1)[:, : codes.shape[1]]
    zero_points = np.where(negative, grid.top - grid.zero_points, grid.zero_points)
    turned = dataclasses.replace(grid, scales=np.abs(grid.scales), zero_points=zero_points)
    return np.where(columns, grid.top - codes, codes), turned


def add_scales(graph: ir.Graph, names: Names, base: str, scales: Array, dtype: ir.DataType, by: str) -> ir.Value:
    """Scales [N, blocks] as uint8 codes, and the nodes in front of the graph that compute them from constants."""
    coded = code_scales(scales)
    value = add_initializer(graph, names, f"{base}_codes", coded.codes)
    step = add_initializer(graph, names, f"{base}_step", np.array(coded.step))
    low = add_initializer(graph, names, f"{base}_low", np.array(coded.low))
    nodes: list[ir.Node] = []

    def then(op_type: str, what: str, *others: ir.Value, to: ir.DataType = ir.DataType.FLOAT) -> None:
        nonlocal value
        name = names.fresh(f"{base}_{what}")
        attributes = {"to": int(to)} if op_type == "Cast" else {}
        inputs = [value, *others]
        node = make_node(op_type, inputs, name=name, output=f"{name}d", like=value, dtype=to, attributes=attributes)
        node.metadata_props[PASS_KEY] = by
        nodes.append(node)
        value = node.outputs[0]

    then("Cast", "float")
    then("Mul", "step", step)
    then("Add", "logarithm", low)
    then("Exp", "exp")
    if dtype != ir.DataType.FLOAT:
        then("Cast", "half", to=dtype)
    graph.insert_before(graph[0], nodes)
    return value
