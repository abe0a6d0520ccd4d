"""Block-wise grids and packing, against an unpacker written from MatMulNBits' contract and ORT's own quantizers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnxruntime.capi import _pybind_state as native

from onnxlathe.passes.low_bit.blockwise import (
    BITS,
    Grid,
    minmax_grid,
    pack_codes,
    pack_zero_points,
    searched_grid,
    stored_bytes,
)
from onnxlathe.passes.low_bit.few_levels import few_levels
from onnxlathe.passes.low_bit.hqq import hqq_grid

RNG = np.random.default_rng(0)


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """MatMulNBits' contract: along the last axis, ``8 / bits`` values a byte, the first in the lowest bits."""
    values = [(int(byte) >> shift) & ((1 << bits) - 1) for byte in packed.reshape(-1) for shift in range(0, 8, bits)]
    return np.array(values).reshape(*packed.shape[:-1], -1)[..., :count]


def dequantize(packed: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, bits: int, inputs: int) -> np.ndarray:
    rows, blocks = scales.shape
    size = packed.shape[-1] * 8 // bits
    codes = unpack(packed, bits, size)
    zeros = unpack(zero_points, bits, blocks)
    return ((codes - zeros[..., None]) * scales[..., None]).reshape(rows, blocks * size)[:, :inputs]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inputs", [32, 80, 33])
@pytest.mark.parametrize("symmetric", [False, True])
def test_packing_agrees_with_the_contract(bits: int, inputs: int, symmetric: bool) -> None:
    weight = RNG.standard_normal((5, inputs)).astype(np.float32)
    grid = searched_grid(weight, bits, 16, symmetric)
    codes = grid.round(weight)
    packed, zero_points = pack_codes(codes, grid), pack_zero_points(grid)
    blocks = -(-inputs // 16)
    assert packed.shape == (5, blocks, 16 * bits // 8)
    assert zero_points.shape == (5, -(-blocks * bits // 8))
    assert np.allclose(dequantize(packed, grid.scales, zero_points, bits, inputs), grid.decode(codes))
    kept = packed.nbytes + grid.scales.nbytes + (0 if symmetric else zero_points.nbytes)
    assert kept == stored_bytes((5, inputs), bits, 16, symmetric)
    padding = unpack(packed, bits, 16)[:, -1, inputs - (blocks - 1) * 16 :]
    assert (padding == grid.zero_points[:, -1:]).all(), "padding must decode to zero"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_like_onnxruntimes_own_quantizer(bits: int, symmetric: bool) -> None:
    """Their tensors read by our unpacker, ours and theirs equally close to the weight."""
    inputs, outputs, size = 96, 7, 32
    weight = RNG.standard_normal((inputs, outputs)).astype(np.float32)
    packed = np.zeros((outputs, inputs // size, size * bits // 8), np.uint8)
    scales = np.zeros((outputs, inputs // size), np.float32)
    zero_points = np.zeros((outputs, -(-inputs // size * bits // 8)), np.uint8)
    quantizer: Any = getattr(native, f"quantize_matmul_{bits}bits")
    quantizer(packed, weight, scales, zero_points, size, outputs, inputs, symmetric)
    if symmetric:
        middle = np.full((outputs, inputs // size), 1 << (bits - 1), np.uint8)
        zero_points = pack_zero_points(Grid(scales, middle, bits, size))
    theirs = np.square(dequantize(packed, scales, zero_points, bits, inputs) - weight.T).sum()
    plain, searched = (make(weight.T, bits, size, symmetric) for make in (minmax_grid, searched_grid))
    errors = [np.square(grid.decode(grid.round(weight.T)) - weight.T).sum() for grid in (plain, searched)]
    assert errors[1] <= errors[0]
    assert errors[1] <= theirs * 1.001
    if not symmetric:
        assert errors[0] == pytest.approx(theirs, rel=0.1)


@pytest.mark.parametrize("make", [minmax_grid, searched_grid, hqq_grid])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_properties(make: Any, symmetric: bool) -> None:
    weight = RNG.standard_normal((4, 64)).astype(np.float32)
    weight[1] = 0
    weight[2] = np.abs(weight[2]) + 3  # one-sided: zero stays exact
    weight[3, 5] = 40  # an outlier
    grid = make(weight, 4, 32, symmetric)
    decoded = grid.decode(grid.round(weight))
    assert np.isfinite(decoded).all()
    assert (decoded[1] == 0).all()
    assert (grid.decode(grid.round(np.zeros_like(weight))) == 0).all()
    assert np.array_equal(grid.round(decoded), grid.round(weight)), "rounding twice changes nothing"
    if make is minmax_grid and not symmetric:
        scale, _ = grid.columns(slice(64))
        assert (np.abs(weight - decoded) <= 0.5001 * np.abs(scale) + 0.5 * np.abs(scale)).all()


def test_search_is_as_good_as_every_single_shrink() -> None:
    """Brute force over ranges for one block, without the refit: the search must not be worse."""
    weight = RNG.standard_t(3, (1, 32)).astype(np.float32)
    grid = searched_grid(weight, 4, 32, False)
    found = np.square(grid.decode(grid.round(weight)) - weight).sum()
    low, high = min(weight.min(), 0), max(weight.max(), 0)
    for shrink in (1.0, 0.9, 0.8, 0.67):
        scale = np.float32((high - low) * shrink / 15)
        zero = np.clip(np.rint(-low * shrink / scale), 0, 15)
        codes = np.clip(np.rint(weight / scale) + zero, 0, 15)
        assert found <= np.square((codes - zero) * scale - weight).sum() * 1.0001


def test_hqq_ignores_outliers_more_than_rounding_does() -> None:
    weight = RNG.standard_normal((64, 128)).astype(np.float32)
    weight[::3, ::17] *= 6
    plain, robust = minmax_grid(weight, 4, 64, False), hqq_grid(weight, 4, 64, False)
    norms = [(np.abs(weight - grid.decode(grid.round(weight))) ** 0.7).sum() for grid in (plain, robust)]
    assert norms[1] < 0.97 * norms[0]


@pytest.mark.parametrize(
    ("levels", "decibel", "values"),
    [("binary", 4.4, {-1, 1}), ("ternary", 7.3, {-1, 0, 1}), ("midrise", 9.27, {-1.5, -0.5, 0.5, 1.5})],
)
def test_few_levels_on_a_gaussian(levels: Any, decibel: float, values: set[float]) -> None:
    weight = RNG.standard_normal((64, 256)).astype(np.float32)
    codes, grid = few_levels(weight, levels, 256)
    decoded = grid.decode(codes)
    noise = np.square(weight - decoded).sum() / np.square(weight).sum()
    assert -10 * np.log10(noise) == pytest.approx(decibel, abs=0.15)
    unit = grid.scales[:, :1] * (2 if levels == "midrise" else 1)
    assert {float(value) for value in np.unique(np.round(decoded / unit, 4))} == values


def test_ternary_is_the_optimum() -> None:
    """Against every threshold of a small block."""
    weight = RNG.standard_normal((6, 16)).astype(np.float32)
    codes, grid = few_levels(weight, "ternary", 16)
    errors = np.square(weight - grid.decode(codes)).sum(axis=1)
    for row in range(len(weight)):
        best = np.inf
        for threshold in np.abs(weight[row]):
            kept = np.abs(weight[row]) >= threshold
            alpha = np.abs(weight[row])[kept].mean()
            best = min(best, np.square(weight[row] - alpha * np.sign(weight[row]) * kept).sum())
        assert errors[row] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("levels", ["binary", "ternary", "midrise"])
def test_few_levels_with_padding_and_zeros(levels: Any) -> None:
    weight = RNG.standard_normal((3, 40)).astype(np.float32)
    weight[1] = 0
    codes, grid = few_levels(weight, levels, 32)
    decoded = grid.decode(codes)
    assert decoded.shape == weight.shape
    assert np.isfinite(decoded).all()
    alone, own = few_levels(weight[:, 32:], levels, 32)  # the padding must not count
    assert np.allclose(decoded[:, 32:], own.decode(alone))
