"""Writes quantized weights into a graph: as MatMulNBits, DequantizeLinear + product, or GatherBlockQuantized."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import onnx_ir as ir

from ...compiler.graph import (
    MICROSOFT,
    Array,
    Names,
    add_initializer,
    attribute,
    dims,
    is_op,
    make_node,
    replace,
    require_domain,
)
from .blockwise import Grid, pack_codes, pack_zero_points
from .linear_weights import Linear, Weight
from .stored_scales import Scales, add_scales, scales_bytes, with_positive_scales

Form = Literal["operator", "qdq"]
QDQ_OPSET = {2: 25, 4: 21, 8: 21}
"""First opset whose DequantizeLinear takes blocks of these bits."""
_UNSIGNED = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
_SIGNED = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}


@dataclasses.dataclass(frozen=True)
class Coded:
    """A quantized weight: codes uint8 [N, K] on ``grid``."""

    codes: Array
    grid: Grid


class Writer:
    """Replaces the readers of quantized weights.

    Args:
        model: the model, changed in place.
        by: name of the pass.
        form: MatMulNBits, or the portable DequantizeLinear that ONNX Runtime fuses into it.
        level: MatMulNBits' accuracy_level.
        scales: how scales are stored; those of DequantizeLinear stay float.
    """

    def __init__(self, model: ir.Model, by: str, form: Form, level: int, scales: Scales = "float") -> None:
        self._model, self._by, self._form, self._level, self._scales_as = model, by, form, level, scales
        self._names = Names(model)

    def write(self, weight: Weight, coded: Coded, *, linears: bool, gathers: bool) -> list[ir.Node]:
        """Puts ``coded`` in the place of ``weight``; returns the products written.

        Args:
            weight: the weight.
            coded: its codes.
            linears: replace its products.
            gathers: replace its Gathers.
        """
        graph = weight.value.graph
        if not isinstance(graph, ir.Graph):
            raise ValueError(f"{weight.name} is in no graph")
        written: list[ir.Node] = []
        products = weight.linears if linears else []
        if self._form == "qdq" and products:
            stored = self._qdq_tensors(graph, weight, coded)
            written = [self._qdq(weight, coded, linear, stored) for linear in products]
            products = []
        if products or (gathers and weight.gathers):
            require_domain(self._model, MICROSOFT)
            stored = self._packed_tensors(graph, weight, coded, flat=not products)
            written += [self._product(weight, coded, linear, stored) for linear in products]
            if gathers:
                self._lookups(weight, coded, stored, flat=not products)
        drop_unused(weight.value)
        return written

    def _scales(self, weight: Weight, coded: Coded, axes: Literal["nk", "kn"]) -> Array:
        scales = coded.grid.scales if axes == "nk" else coded.grid.scales.T
        return np.ascontiguousarray(scales, (weight.value.dtype or ir.DataType.FLOAT).numpy())

    def _packed_tensors(self, graph: ir.Graph, weight: Weight, coded: Coded, flat: bool) -> list[ir.Value | None]:
        """B, scales and zero points; B as MatMulNBits wants it, [N, blocks, bytes], or ``flat`` for a table alone."""
        base, codes, grid = weight.name, coded.codes, coded.grid
        compact = self._scales_as == "uint8" and scales_bytes(grid.scales.size, "uint8") < grid.scales.nbytes
        if compact:
            codes, grid = with_positive_scales(codes, grid)
        packed = pack_codes(codes, grid)
        if flat:
            packed = packed.reshape(len(packed), -1)[:, : -(-weight.inputs * grid.bits // 8)]
        zero_points = None
        if not grid.is_symmetric:
            zero_points = add_initializer(graph, self._names, f"{base}_zero_points", pack_zero_points(grid))
        stored = add_initializer(graph, self._names, f"{base}_q{grid.bits}", packed)
        if compact:
            dtype = weight.value.dtype or ir.DataType.FLOAT
            scales = add_scales(graph, self._names, f"{base}_scales", grid.scales, dtype, self._by)
        else:
            scales = add_initializer(graph, self._names, f"{base}_scales", self._scales(weight, coded, "nk"))
        return [stored, scales, zero_points]

    def _product(self, weight: Weight, coded: Coded, linear: Linear, stored: list[ir.Value | None]) -> ir.Node:
        grid, old = coded.grid, linear.node
        sizes = {"K": weight.inputs, "N": weight.outputs, "bits": grid.bits, "block_size": grid.block_size}
        operands = [old.inputs[0], *stored, None, _bias(old)]
        while operands[-1] is None:
            operands.pop()
        new = make_node(
            "MatMulNBits",
            operands,
            name=self._names.fresh(f"{old.name}_q{grid.bits}"),
            output=self._names.fresh(f"{old.outputs[0].name}_q{grid.bits}"),
            like=old.outputs[0],
            attributes={**sizes, "accuracy_level": self._level},
            domain=MICROSOFT,
        )
        replace(old, [new], by=self._by)
        return new

    def _lookups(self, weight: Weight, coded: Coded, stored: list[ir.Value | None], flat: bool) -> None:
        """Gathers from a table; where products share it, through a Reshape, so that it is stored once."""
        grid = coded.grid
        attributes = {"bits": grid.bits, "block_size": grid.block_size, "gather_axis": 0, "quantize_axis": 1}
        data, scales, zero_points = stored
        padded = weight.inputs if flat else grid.scales.shape[1] * grid.block_size  # as MatMulNBits stores its rows
        for old in weight.gathers:
            new: list[ir.Node] = []
            rows, result = data, old.outputs[0]
            known = dims(result)
            if not flat and isinstance(old.graph, ir.Graph) and data is not None:
                shape = [weight.outputs, padded * grid.bits // 8]
                sizes = add_initializer(old.graph, self._names, f"{weight.name}_table_shape", np.array(shape, np.int64))
                name = self._names.fresh(f"{weight.name}_table")
                new.append(
                    make_node("Reshape", [data, sizes], name=name, output=f"{name}_rows", like=data, shape=shape)
                )
                rows = new[-1].outputs[0]
            operands = [rows, old.inputs[1], scales, *([zero_points] if zero_points is not None else [])]
            name = self._names.fresh(f"{old.name}_q{grid.bits}")
            output = self._names.fresh(f"{result.name}_q{grid.bits}")
            gather = make_node(
                "GatherBlockQuantized",
                operands,
                name=name,
                output=output,
                like=result,
                shape=[*known[:-1], padded] if known else None,
                attributes=attributes,
                domain=MICROSOFT,
            )
            new.append(gather)
            if padded != weight.inputs:
                new.append(self._without_padding(old, gather.outputs[0], weight.inputs))
            replace(old, new, by=self._by)

    def _without_padding(self, old: ir.Node, rows: ir.Value, width: int) -> ir.Node:
        graph = old.graph
        if not isinstance(graph, ir.Graph):
            raise ValueError(f"{old.name} is in no graph")
        bounds = [
            add_initializer(graph, self._names, f"{old.name}_{what}", np.array([number], np.int64))
            for what, number in (("start", 0), ("end", width), ("axis", -1))
        ]
        name = self._names.fresh(f"{old.name}_columns")
        return make_node("Slice", [rows, *bounds], name=name, output=f"{name}_kept", like=old.outputs[0])

    def _qdq_tensors(self, graph: ir.Graph, weight: Weight, coded: Coded) -> list[ir.Value]:
        """Codes [K, N], scales [blocks, N] and, if asymmetric, zero points [blocks, N], for DequantizeLinear on axis 0.

        Symmetric codes are signed, as the zero point DequantizeLinear leaves out is 0.
        """
        grid, base = coded.grid, weight.name
        codes, zero_points = coded.codes.T, grid.zero_points.T
        dtype = _UNSIGNED[grid.bits]
        if grid.is_symmetric:
            dtype = _SIGNED[grid.bits]
            codes = codes.astype(np.int16) - (1 << (grid.bits - 1))
        tensors = [
            self._integers(graph, f"{base}_q{grid.bits}", codes, dtype),
            add_initializer(graph, self._names, f"{base}_scales", self._scales(weight, coded, "kn")),
        ]
        if not grid.is_symmetric:
            tensors.append(self._integers(graph, f"{base}_zero_points", zero_points, dtype))
        return tensors

    def _integers(self, graph: ir.Graph, base: str, array: Array, dtype: ir.DataType) -> ir.Value:
        name = self._names.fresh(base)
        tensor = ir.Tensor(np.ascontiguousarray(array).astype(dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(dtype), const_value=tensor)
        graph.register_initializer(value)
        return value

    def _qdq(self, weight: Weight, coded: Coded, linear: Linear, stored: list[ir.Value]) -> ir.Node:
        old = linear.node
        name = self._names.fresh(f"{weight.name}_dequantize")
        dequantize = make_node(
            "DequantizeLinear",
            stored,
            name=name,
            output=f"{name}d",
            dtype=weight.value.dtype,
            shape=[weight.inputs, weight.outputs],
            attributes={"axis": 0, "block_size": coded.grid.block_size},
        )
        bias = _bias(old)
        operands = [old.inputs[0], dequantize.outputs[0], *([bias] if bias is not None else [])]
        output = self._names.fresh(f"{old.outputs[0].name}_q{coded.grid.bits}")
        attributes = {key: attribute(old, key) for key in old.attributes if key != "transB"}
        product = make_node(
            old.op_type,
            operands,
            name=self._names.fresh(f"{old.name}_q{coded.grid.bits}"),
            output=output,
            like=old.outputs[0],
            attributes=attributes,
        )
        replace(old, [dequantize, product], by=self._by)
        return product


def _bias(product: ir.Node) -> ir.Value | None:
    """The bias of a Gemm, as it is now: the product that made it may have been replaced before this one."""
    return product.inputs[2] if is_op(product, "Gemm") and len(product.inputs) > 2 else None


def drop_unused(value: ir.Value) -> None:
    """Removes an initializer that nobody reads any more, and a Transpose of it that nobody reads."""
    for use in list(value.uses()):
        node = use.node
        read = bool(node.outputs[0].uses()) or node.outputs[0].is_graph_output()
        if is_op(node, "Transpose") and not read and isinstance(node.graph, ir.Graph):
            node.graph.remove(node, safe=True)
    if isinstance(value.graph, ir.Graph) and not value.uses() and not value.is_graph_output():
        value.graph.initializers.pop(value.name or "", None)
