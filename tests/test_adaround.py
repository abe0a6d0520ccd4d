"""AdaRound: against brute force, never worse, better on data it has not seen, every layer form, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from quantized import quantize

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.graph import constant
from onnxlathe.compiler.verify import check_structure, run_reference
from onnxlathe.passes import AdaRound
from onnxlathe.passes.linear_layers import linear_layer
from onnxlathe.passes.quantization.rounding import Grid, adaround, output_error
from onnxlathe.runtime.errors import PassError
from rewriting import from_text

RNG = np.random.default_rng(0)
MIX = RNG.standard_normal((12, 12)) * np.exp(-np.arange(12) / 4)[:, None]


def correlated(rows: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, 12)) @ MIX).astype(np.float32)


def four_bits(weight: np.ndarray) -> Grid:
    scale = np.abs(weight).max(axis=1, keepdims=True) / 7
    return Grid(scale, np.zeros_like(scale), -7, 7)


@pytest.mark.parametrize(("iterations", "gap"), [(0, 0.4), (200, 0.25)])
def test_close_to_the_best_of_all_roundings(iterations: int, gap: float) -> None:
    """10 inputs: of the way from the nearest to the best of all 1024 roundings of each row, at most ``gap`` is left."""
    weight = RNG.standard_normal((6, 10))
    x = correlated(60, 1)[:, :10].astype(np.float64)
    gram = x.T @ x + 0.1 * np.eye(10)
    grid = four_bits(weight)
    ups = np.array(list(itertools.product((0, 1), repeat=10)), np.float64)
    floor = grid.floor(weight)
    best = np.array([output_error(grid.scale[r] * (floor[r] + ups) - weight[r], gram).min() for r in range(6)])
    nearest = output_error(grid.back(grid.nearest(weight)) - weight, gram)
    got = output_error(grid.back(adaround(weight, grid, gram, iterations=iterations)) - weight, gram)
    assert (got >= best - 1e-9).all() and (got <= nearest + 1e-12).all()
    assert got.sum() <= best.sum() + gap * (nearest.sum() - best.sum())


def test_a_gram_of_the_identity_gives_the_nearest() -> None:
    weight = RNG.standard_normal((5, 9))
    grid = four_bits(weight)
    assert np.array_equal(adaround(weight, grid, np.eye(9), iterations=50), grid.nearest(weight))


def test_never_worse_than_a_start_off_the_grid_of_two() -> None:
    """A start from another method may lie two steps from the weight; if nothing better is found it stays."""
    weight = RNG.standard_normal((8, 12))
    grid = four_bits(weight)
    gram = correlated(100, 2).astype(np.float64)
    gram = gram.T @ gram
    start = np.clip(grid.nearest(weight) + RNG.integers(-1, 2, weight.shape), -7, 7)
    got = output_error(grid.back(adaround(weight, grid, gram, iterations=20, start=start)) - weight, gram)
    assert (got <= output_error(grid.back(start) - weight, gram)).all()


HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
FORMS = {
    "dilated": (
        f"{HEAD} m (float[n, 4, 6, 5] x, float[8, 1, 2, 2] w) => (y)"
        " { y = Conv<group=4, dilations=[2,3], pads=[1,2,0,1]>(x, w) }",
        (8, 1, 2, 2),
    ),
    "matmul": (f"{HEAD} m (float[n, 12] x, float[12, 20] w) => (y) {{ y = MatMul(x, w) }}", (12, 20)),
    "gemm": (f"{HEAD} m (float[n, 12] x, float[20, 12] w) => (y) {{ y = Gemm<transB=1>(x, w) }}", (20, 12)),
    "conv": (
        f"{HEAD} m (float[n, 4, 6, 5] x, float[8, 4, 3, 2] w) => (y) {{ y = Conv<pads=[1,0,1,1]>(x, w) }}",
        (8, 4, 3, 2),
    ),
    "grouped": (
        f"{HEAD} m (float[n, 4, 6, 5] x, float[8, 2, 3, 3] w) => (y)"
        " { y = Conv<group=2, strides=[2,1], auto_pad=\"SAME_LOWER\">(x, w) }",
        (8, 2, 3, 3),
    ),
}  # fmt: skip


def samples(form: str, count: int, seed: int) -> list[dict[str, np.ndarray]]:
    if form in ("matmul", "gemm"):
        return [{"x": correlated(40, seed + number)} for number in range(count)]
    rng = np.random.default_rng(seed)
    noise = [rng.standard_normal((3, 4, 6, 5)) for _ in range(count)]
    smooth = [array.cumsum(axis=2).cumsum(axis=3).astype(np.float32) for array in noise]
    return [{"x": array} for array in smooth]


@pytest.mark.parametrize("form", ["matmul", "gemm", "conv", "grouped"])
@pytest.mark.parametrize("bits", [4, 8])
def test_beats_the_nearest_on_held_out_data(form: str, bits: int) -> None:
    text, shape = FORMS[form]
    weight = (RNG.standard_normal(shape) / 4).astype(np.float32)
    model = from_text(text, w=weight)
    feeds, held_out = samples(form, 8, 1), samples(form, 4, 100)
    nearest = quantize(model, feeds, bits=bits, activations=False)
    before = nearest.clone()
    after = nearest.clone()
    outcome = AdaRound(iterations=60, reference=model)(after, PassContext(feeds=feeds))
    check_structure(after)
    assert outcome.counts == {"weights rounded anew": 1}
    assert np.array_equal(
        constant(nearest.graph.initializers["w_quantized"]), constant(before.graph.initializers["w_quantized"])
    )
    assert error(model, after, held_out) < 0.8 * error(model, nearest, held_out)
    codes = constant(after.graph.initializers["w_quantized"])
    assert codes.dtype == np.int8 and np.abs(codes).max() <= 2 ** (bits - 1) - 1
    again = AdaRound(iterations=60, reference=model)(after, PassContext(feeds=feeds))
    assert not again.changed


def error(exact: ir.Model, got: ir.Model, feeds: list) -> float:
    pairs = zip(run_reference(exact, feeds), run_reference(got, feeds), strict=True)
    return float(sum(np.square(a["y"] - b["y"], dtype=np.float64).sum() for a, b in pairs))


@pytest.mark.parametrize("form", FORMS)
def test_rows_and_matrix_compute_the_layer(form: str) -> None:
    """What the corrections take for X and W is what the operator multiplies, padding, strides and groups included."""
    text, shape = FORMS[form]
    weight = RNG.standard_normal(shape).astype(np.float32)
    model = from_text(text, w=weight)
    feed = samples(form, 1, 5)[0]
    layer = linear_layer(next(iter(model.graph)))
    assert layer is not None
    product = layer.rows(feed["x"].astype(np.float64)) @ layer.matrix(weight.astype(np.float64)).transpose(0, 2, 1)
    y = run_reference(model, [feed])[0]["y"]
    expected = np.moveaxis(y, layer.channel_axis, -1).reshape(-1, shape[layer.out_axis])
    assert np.allclose(np.moveaxis(product, 0, 1).reshape(expected.shape), expected, atol=1e-4)
    assert np.array_equal(layer.unmatrix(layer.matrix(weight), weight.shape), weight)


def test_in_one_compile_with_the_quantizing_pass() -> None:
    """The float graph comes from the pipeline: the last one in which nothing was quantized."""
    import dataclasses
    from typing import ClassVar

    class Quantize(lathe.Pass):
        name: ClassVar[str] = "test-quantize"
        claims: ClassVar = lathe.Claim.APPROXIMATE

        def __call__(self, model: ir.Model, context: PassContext) -> lathe.Outcome:
            done = quantize(model, list(context.feeds), bits=4)
            model.graph = done.graph
            outcome = lathe.Outcome()
            outcome.counts["quantized"] += 1
            return outcome

    text, shape = FORMS["matmul"]
    model = from_text(text, w=RNG.standard_normal(shape).astype(np.float32))
    feeds = samples("matmul", 8, 1)
    step = dataclasses.dataclass(frozen=True)(Quantize)()
    out = lathe.compile(model, [step, AdaRound(iterations=0)], calibration=feeds, progress=False)
    assert out.report.passes[-1].counts == {"weights rounded anew": 1}


def test_what_is_refused() -> None:
    text, shape = FORMS["matmul"]
    model = from_text(text, w=RNG.standard_normal(shape).astype(np.float32))
    feeds = samples("matmul", 4, 1)
    quantized = quantize(model, feeds)
    with pytest.raises(PassError, match="needs the float model"):
        AdaRound()(quantized.clone(), PassContext(feeds=feeds))
    with pytest.raises(PassError, match="needs calibration samples"):
        AdaRound(reference=model)(quantized.clone(), PassContext())
    with pytest.raises(ValueError, match="0 or more"):
        AdaRound(iterations=-1)
    other = from_text(text, w=RNG.standard_normal(shape).astype(np.float32))
    other.graph.initializers["w"].const_value = ir.tensor(np.zeros((3, 3), np.float32), name="w")
    other.graph.initializers["w"].shape = ir.Shape([3, 3])
    outcome = AdaRound(reference=other)(quantized.clone(), PassContext(feeds=feeds))
    assert not outcome.changed and "no weight of the shape" in outcome.refusals[0].reason
    assert not AdaRound(layers=("nothing",), reference=model)(quantized.clone(), PassContext(feeds=feeds)).changed
    assert not AdaRound(reference=model)(model.clone(), PassContext(feeds=feeds)).changed
