"""Weights of a graph as torch parameters: floats with their zeros, and integers with their grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ...runtime.quantization import pack_bits, unpack_bits
from ..graph import Array, attribute, producer
from .fake_quant import limits, spread, straight_through
from .table import DTYPES

_FEW = 4
"""A weight of so few levels is trained with scales that follow; one of more keeps its scales."""
_SPARSE = 0.3
"""Part of zeros from which on they are a mask: rounding to four bits or more makes fewer of them."""
_INSIDE = 1e-3
"""How far inside its cell, in steps, a latent weight begins at least."""


class FloatWeight(nn.Module):
    """An initializer of floats as a parameter, float32 or float64.

    Args:
        value: the initializer.
        keep_zeros: whether what is zero stays zero.
    """

    mask: Tensor | None

    def __init__(self, value: ir.Value, keep_zeros: bool) -> None:
        super().__init__()
        self.value = value
        self.dtype = DTYPES[value.dtype or ir.DataType.FLOAT]
        array = as_tensor(value.const_value)
        self.latent = nn.Parameter(array.to(torch.float64 if self.dtype == torch.float64 else torch.float32))
        self.register_buffer("mask", (array != 0) if keep_zeros and bool((array == 0).any()) else None, False)

    def forward(self) -> Tensor:
        """The weight, of the initializer's type and shape."""
        weight = self.latent if self.mask is None else self.latent * self.mask
        return weight.to(self.dtype)

    def tensors(self) -> dict[ir.Value, ir.TensorProtocol]:
        """What the graph must hold to compute with this weight."""
        array = (self.latent if self.mask is None else self.latent * self.mask).detach().cpu().numpy()
        dtype = self.value.dtype or ir.DataType.FLOAT
        return {self.value: ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=self.value.name)}


@dataclasses.dataclass(frozen=True)
class Stored:
    """An integer weight as a graph stores it.

    Attributes:
        codes: the integers, of the weight's shape.
        scale: one for the tensor, for each index of ``axis``, or for each block of it.
        zero: zero points shaped like ``scale``.
        axis: which axis scales count.
        block_size: inputs in a block; 0 for none.
        limits: smallest and largest code.
        dtype: element type of the weight.
        values: the initializers of codes and scales.
        write: codes as a tensor for the first of ``values``.
    """

    codes: Array
    scale: Array
    zero: Array
    axis: int
    block_size: int
    limits: tuple[int, int]
    dtype: ir.DataType
    values: tuple[ir.Value, ir.Value]
    write: Callable[[Array], ir.TensorProtocol]


class CodedWeight(nn.Module):
    """An integer weight as a latent float parameter that is rounded in every step; derivatives go straight through.

    1. A weight of at most four levels around its zero point (binary, ternary, two bits) keeps those levels; its scales
       follow the latent weights by least squares: ``s = <w, l> / <l, l>`` for each block with levels l
       (Rastegari et al., 1603.05279; Li et al., 1605.04711).
    2. Any other keeps its scales and zero points; beyond the range there is no derivative.

    Args:
        stored: the weight.
        near: the float weight that it was rounded from, if known; the latent weights begin where that is nearest within
            the cells of the codes, so that training starts from exactly the model given.
        follow: whether scales may change.
    """

    latent: nn.Parameter
    scale: Tensor
    zero: Tensor
    levels: Tensor | None
    mask: Tensor | None

    def __init__(self, stored: Stored, near: Array | None, follow: bool) -> None:
        super().__init__()
        self.stored = stored
        self.register_buffer("scale", torch.tensor(stored.scale, dtype=torch.float32))
        self.register_buffer("zero", torch.tensor(stored.zero.astype(np.float64), dtype=torch.float32), False)
        centred = torch.tensor(stored.codes.astype(np.float64), dtype=torch.float32)
        centred = centred - self._spread(self.zero, centred)
        found = torch.unique(centred)
        few = (
            follow
            and centred.numel() >= 8 * _FEW
            and found.numel() <= _FEW
            and bool((self.zero == self.zero.flatten()[0]).all())
        )
        self.register_buffer("levels", found if few else None, False)
        sparse = not few and float((centred == 0).float().mean()) >= _SPARSE
        self.register_buffer("mask", centred != 0 if sparse else None, False)
        self.latent = nn.Parameter(self._begin(centred, near))

    def forward(self) -> Tensor:
        """The weight that the codes stand for, of the type of the graph's scales."""
        if self.levels is not None and self.training:
            self._follow()
        step = self._spread(self.scale, self.latent)
        rounded = self._round() * step
        exact = self.latent
        if self.levels is None:
            low, high = self._range()
            bounds = torch.minimum(low * step, high * step), torch.maximum(low * step, high * step)
            exact = exact.clamp(*bounds)
        weight = straight_through(exact, rounded)
        weight = weight if self.mask is None else weight * self.mask
        return weight.to(DTYPES[self.stored.dtype])

    def tensors(self) -> dict[ir.Value, ir.TensorProtocol]:
        """What the graph must hold to compute with this weight."""
        codes = self._round() if self.mask is None else self._round() * self.mask
        codes = codes + self._spread(self.zero, codes)
        kept, scales = self.stored.values
        written = {kept: self.stored.write(codes.detach().cpu().numpy().astype(np.int64))}
        if self.levels is not None:
            shape = scales.const_value.shape.numpy() if scales.const_value is not None else ()
            array = self.scale.cpu().numpy().reshape(shape).astype(self.stored.dtype.numpy())
            written[scales] = ir.Tensor(array, dtype=self.stored.dtype, name=scales.name)
        return written

    def _spread(self, values: Tensor, like: Tensor) -> Tensor:
        return spread(values, like, self.stored.axis, self.stored.block_size)

    def _range(self) -> tuple[Tensor, Tensor]:
        zero = self._spread(self.zero, self.latent)
        return self.stored.limits[0] - zero, self.stored.limits[1] - zero

    @torch.no_grad()
    def _round(self) -> Tensor:
        """The level of each latent weight: code minus zero point."""
        scaled = self.latent / self._spread(self.scale, self.latent)
        if self.levels is None:
            return torch.round(scaled).clamp(*self._range())
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        return self.levels[torch.bucketize(scaled, middles, right=True)]

    @torch.no_grad()
    def _follow(self) -> None:
        level = self._round()
        product, square = self._sums(self.latent * level), self._sums(level * level)
        better = product / square.clamp(min=1e-30)
        self.scale.copy_(torch.where((square > 0) & (better.abs() > 1e-20), better, self.scale))

    def _sums(self, values: Tensor) -> Tensor:
        """Sums over all that share a scale."""
        if self.scale.numel() == 1:
            return values.sum().reshape(self.scale.shape)
        axis, size = self.stored.axis % values.dim(), self.stored.block_size
        if not size:
            return values.sum([at for at in range(values.dim()) if at != axis]).reshape(self.scale.shape)
        padding = -values.shape[axis] % size
        padded = nn.functional.pad(values, [0, 0] * (values.dim() - 1 - axis) + [0, padding])
        return padded.unflatten(axis, (-1, size)).sum(axis + 1)

    def _begin(self, centred: Tensor, near: Array | None) -> Tensor:
        """Latent weights whose codes are those stored."""
        step = self._spread(self.scale, centred)
        if near is None:
            return centred * step
        wanted = torch.tensor(near, dtype=torch.float32) / step
        if self.levels is None:
            return torch.clamp(wanted, centred - 0.5 + _INSIDE, centred + 0.5 - _INSIDE) * step
        edges = torch.cat([self.levels[:1] - 1e30, (self.levels[1:] + self.levels[:-1]) / 2, self.levels[-1:] + 1e30])
        at = torch.searchsorted(self.levels, centred)
        return torch.clamp(wanted, edges[at] + _INSIDE, edges[at + 1] - _INSIDE) * step


def as_tensor(tensor: ir.TensorProtocol | None) -> Tensor:
    """A constant as a torch tensor of its own; types below a byte as int8 or uint8, bfloat16 as it is."""
    if tensor is None:
        raise ValueError("the initializer has no data")
    if tensor.dtype == ir.DataType.BFLOAT16:
        return torch.tensor(tensor.numpy().astype(np.float32)).to(torch.bfloat16)
    if tensor.dtype not in DTYPES:
        kind = np.int8 if tensor.dtype.name.startswith("INT") else np.uint8
        return torch.tensor(tensor.numpy().astype(kind))
    return torch.tensor(np.array(tensor.numpy()))


def unreshaped(value: ir.Value | None) -> ir.Value | None:
    """``value``, or what a Reshape made it from: a table that products share is stored once."""
    maker = producer(value, "Reshape")
    return maker.inputs[0] if maker is not None else value


def read_stored(node: ir.Node) -> Stored | None:
    """The integer weight that DequantizeLinear, MatMulNBits or GatherBlockQuantized reads; None if not constant."""
    if node.op_type == "DequantizeLinear":
        return _per_axis(node)
    return _packed(node) if node.op_type in ("MatMulNBits", "GatherBlockQuantized") else None


def _per_axis(node: ir.Node) -> Stored | None:
    codes, scale = node.inputs[0], node.inputs[1]
    if codes is None or codes.const_value is None or scale is None or scale.const_value is None:
        return None
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is not None and zero_point.const_value is None:
        return None
    dtype = codes.const_value.dtype
    scales = scale.const_value.numpy()
    zero = np.zeros(scales.shape) if zero_point is None else _wide(zero_point).reshape(scales.shape)

    def write(array: Array) -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(array).astype(dtype.numpy()), dtype=dtype, name=codes.name)

    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    return Stored(
        _wide(codes), scales, zero, axis, block, limits(dtype), scale.const_value.dtype, (codes, scale), write
    )


def _packed(node: ir.Node) -> Stored | None:
    table = node.op_type == "GatherBlockQuantized"
    codes, scale = unreshaped(node.inputs[0 if table else 1]), node.inputs[2]
    if codes is None or codes.const_value is None or scale is None or scale.const_value is None:
        return None
    bits, block = attribute(node, "bits", 4), attribute(node, "block_size", 128)
    packed = codes.const_value.numpy()
    rows = packed.shape[0]
    scales = np.asarray(scale.const_value.numpy()).reshape(rows, -1)
    flat = packed.reshape(rows, -1)
    inputs = attribute(node, "K", flat.shape[1] * 8 // bits)
    zero = np.full(scales.shape, 1 << (bits - 1))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        zero = unpack_bits(_wide(node.inputs[3]).astype(np.uint8).reshape(rows, -1), bits)[:, : scales.shape[1]]

    def write(array: Array) -> ir.TensorProtocol:
        whole = unpack_bits(flat, bits)
        whole[:, :inputs] = array.astype(np.uint8)
        return ir.Tensor(pack_bits(whole, bits).reshape(packed.shape), dtype=ir.DataType.UINT8, name=codes.name)

    return Stored(
        unpack_bits(flat, bits)[:, :inputs],
        scales,
        zero,
        1,
        block,
        (0, (1 << bits) - 1),
        scale.const_value.dtype,
        (codes, scale),
        write,
    )


def _wide(value: ir.Value) -> Array:
    if value.const_value is None:
        raise ValueError(f"{value.name} has no data")
    return np.asarray(value.const_value.numpy()).astype(np.int64)


def nearest_float(stored: Stored, candidates: list[Array]) -> Array | None:
    """Of float weights of the same shape, as they are or transposed, the one that ``stored`` was rounded from.

    That is the one of the largest cosine, if that is above one half; weights of different layers are nearly orthogonal.
    """
    scale, zero = torch.tensor(stored.scale, dtype=torch.float32), torch.tensor(stored.zero.astype(np.float32))
    codes = torch.tensor(stored.codes.astype(np.float32))
    axis, block = stored.axis, stored.block_size
    exact = ((codes - spread(zero, codes, axis, block)) * spread(scale, codes, axis, block)).numpy()
    size = float(np.linalg.norm(exact))
    best, found = 0.5, None
    for array in candidates:
        for turned in (array, array.T) if array.ndim == 2 else (array,):
            if turned.shape == exact.shape:
                product = float((turned * exact).sum()) / max(size * float(np.linalg.norm(turned)), 1e-30)
                if product > best:
                    best, found = product, np.ascontiguousarray(turned)
    return found
