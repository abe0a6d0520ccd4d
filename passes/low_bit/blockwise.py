"""Block-wise integer grids for weights: scales and zero points, rounding, and the packing of MatMulNBits.

A weight is [N, K]: N outputs, K inputs. Each row is cut into blocks of ``block_size`` inputs, the last one padded; each
block has a scale and a zero point, ``w = scale * (code - zero_point)`` with codes 0 .. 2^bits - 1. That is the contract
of com.microsoft.MatMulNBits and GatherBlockQuantized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...runtime.quantization import pack_bits
from .stored_scales import Scales, scales_bytes

Array = np.ndarray[Any, Any]

BITS = (2, 4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)
_ROWS = 4096
_ROWS_BYTES = 1 << 21  # a slab of rows that stays in the cache while its grid is searched
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.67, 0.6, 0.52)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the codes of a weight lie.

    Attributes:
        scales: float32 [N, blocks].
        zero_points: uint8 [N, blocks].
        bits: 2, 4 or 8.
        block_size: inputs per block.
    """

    scales: Array
    zero_points: Array
    bits: int
    block_size: int

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is the operator's default, so that none needs to be stored."""
        return bool((self.zero_points == 1 << (self.bits - 1)).all())

    def columns(self, inputs: Array | slice) -> tuple[Array, Array]:
        """Scale and zero point (float32 [N, len(inputs)]) of single inputs."""
        numbers = np.arange(self.scales.shape[1] * self.block_size)[inputs] // self.block_size
        return self.scales[:, numbers], self.zero_points[:, numbers].astype(np.float32)

    def rows(self, rows: slice) -> Grid:
        """The grid of some rows."""
        return dataclasses.replace(self, scales=self.scales[rows], zero_points=self.zero_points[rows])

    def round(self, weight: Array) -> Array:
        """The nearest codes, uint8 [N, K], for a weight [N, K]."""
        codes = np.empty(weight.shape, np.uint8)
        for rows in slabs(len(weight)):
            scale, zero = self.rows(rows).columns(slice(weight.shape[1]))
            codes[rows] = np.clip(np.rint(weight[rows] / scale) + zero, 0, self.top)
        return codes

    def decode(self, codes: Array) -> Array:
        """The weight, float32 [N, K], that ``codes`` stand for."""
        weight = np.empty(codes.shape, np.float32)
        for rows in slabs(len(codes)):
            scale, zero = self.rows(rows).columns(slice(codes.shape[1]))
            weight[rows] = (codes[rows] - zero) * scale
        return weight


def slabs(rows: int) -> Iterator[slice]:
    """Slices of some thousand rows: what is computed on the way stays small beside the weight."""
    for start in range(0, rows, _ROWS):
        yield slice(start, start + _ROWS)


def stored_bytes(shape: tuple[int, int], bits: int, block_size: int, symmetric: bool, scales: Scales = "float") -> int:
    """Bytes of a weight [N, K]: codes, scales (float32, or a byte each) and packed zero points."""
    rows, blocks = shape[0], -(-shape[1] // block_size)
    zero_points = 0 if symmetric else -(-blocks * bits // 8)
    return rows * (blocks * block_size * bits // 8 + zero_points) + scales_bytes(rows * blocks, scales)


def minmax_grid(weight: Array, bits: int, block_size: int, symmetric: bool) -> Grid:
    """The grid of plain rounding: from the smallest to the largest weight of a block, 0 included.

    Symmetric: codes 1 .. 2^bits - 1 around the default zero point 2^(bits - 1), up to the largest magnitude.
    """
    low, high = _range(_blocks(weight, block_size))
    return Grid(*_affine(low, high, bits, symmetric), bits, block_size)


def searched_grid(weight: Array, bits: int, block_size: int, symmetric: bool, importance: Array | None = None) -> Grid:
    """The grid of least squared rounding error among shrunken ranges; each candidate's scale is refit to its codes.

    For a code c of zero point z the best scale is ``sum v w (c - z) / sum v (c - z)^2``. The unshrunken range is a
    candidate, so the error is never above that of ``minmax_grid``.

    Args:
        weight: float32 [N, K].
        bits: 2, 4 or 8.
        block_size: inputs per block.
        symmetric: keep zero points at 2^(bits - 1); then the largest magnitude may also lie at code 0, with a negative
            scale where it is positive.
        importance: weight v of each input's error, [K]; None for equal ones. For GPTQ the diagonal of the Hessian.
    """
    blocks = -(-weight.shape[1] // block_size)
    padded = np.zeros(blocks * block_size, np.float32)
    padded[: weight.shape[1]] = 1.0 if importance is None else importance / max(float(importance.max()), 1e-30)
    v = padded.reshape(blocks, block_size)
    rows = max(1, _ROWS_BYTES // (blocks * block_size * 4))
    parts = [
        _search(_blocks(weight[start : start + rows], block_size), v, bits, symmetric)
        for start in range(0, weight.shape[0], rows)
    ]
    scales, zero_points = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Grid(scales, zero_points, bits, block_size)


def _search(w: Array, v: Array, bits: int, symmetric: bool) -> tuple[Array, Array]:
    low, high = _range(w)
    candidates = [_affine(low * shrink, high * shrink, bits, symmetric) for shrink in _SHRINKS]
    if symmetric:  # one more code on the side of the largest weight
        farthest = np.where(high > -low, high, low) / -(1 << (bits - 1))
        farthest = np.where(farthest == 0, np.float32(1), farthest)
        candidates += [(farthest * np.float32(shrink), candidates[0][1]) for shrink in _SHRINKS]
    best_scale, best_zero = candidates[0]
    best = np.full(low.shape, np.inf, np.float32)
    for scale, zero in candidates:
        centred = _centred_codes(w, scale, zero, bits)
        weighted = centred * v
        squares = np.einsum("nbk,nbk->nb", weighted, centred)
        product = np.einsum("nbk,nbk->nb", weighted, w)
        refit = np.where(squares > 0, product / np.where(squares > 0, squares, 1), scale)
        refit = np.where(np.abs(refit) > 1e-20, refit, scale).astype(np.float32)
        error = -refit * (2 * product - refit * squares)  # less the constant sum v w^2
        better = error < best
        best = np.where(better, error, best)
        best_scale, best_zero = np.where(better, refit, best_scale), np.where(better, zero, best_zero)
    return best_scale, best_zero


def _centred_codes(w: Array, scale: Array, zero: Array, bits: int) -> Array:
    """``code - zero_point`` of the nearest codes, float32 like the blocks ``w``."""
    zero = zero[..., None].astype(np.float32)
    centred = w * (np.float32(1) / scale)[..., None]
    np.rint(centred, out=centred)
    return np.clip(centred, -zero, (1 << bits) - 1 - zero, out=centred)


def _blocks(weight: Array, block_size: int) -> Array:
    """[N, K] as float32 [N, blocks, block_size], padded with zeros."""
    rows, inputs = weight.shape
    padding = -inputs % block_size
    weight = np.asarray(weight, np.float32)
    if padding:
        weight = np.pad(weight, ((0, 0), (0, padding)))
    return weight.reshape(rows, -1, block_size)


def _range(w: Array) -> tuple[Array, Array]:
    return np.minimum(w.min(axis=-1), 0), np.maximum(w.max(axis=-1), 0)


def _affine(low: Array, high: Array, bits: int, symmetric: bool) -> tuple[Array, Array]:
    """Scale and zero point of a range; a block of zeros gets the scale 1."""
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    scale = np.maximum(high, -low) / (middle - 1) if symmetric else (high - low) / top
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    if symmetric:
        return scale, np.full(scale.shape, middle, np.uint8)
    return scale, np.clip(np.rint(-low / scale), 0, top).astype(np.uint8)


def pack_codes(codes: Array, grid: Grid) -> Array:
    """MatMulNBits' B: uint8 [N, blocks, block_size * bits / 8], low bits first; padding decodes to 0."""
    rows, inputs = codes.shape
    blocks = grid.scales.shape[1]
    padded = np.repeat(grid.zero_points, grid.block_size, axis=1)
    padded[:, :inputs] = codes
    return pack_bits(padded, grid.bits).reshape(rows, blocks, -1)


def pack_zero_points(grid: Grid) -> Array:
    """MatMulNBits' zero_points: uint8 [N, ceil(blocks * bits / 8)], low bits first."""
    return pack_bits(grid.zero_points, grid.bits)
