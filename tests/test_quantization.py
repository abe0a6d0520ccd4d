"""The arithmetic of quantization, ranges from streams, and calibration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxlathe.runtime.calibrate import collect_ranges, observe
from onnxlathe.runtime.errors import ModelError
from onnxlathe.runtime.feeds import Samples
from onnxlathe.runtime.quantization import QuantSpec, QuantType
from onnxlathe.runtime.ranges import Histogram, MinMax, TensorRange, choose_range
from rewriting import from_text

_TYPES: tuple[QuantType, ...] = ("uint8", "int8", "uint16", "int16")


@settings(max_examples=60, deadline=None)
@given(
    low=st.floats(-1e4, 1e4), width=st.floats(0, 1e4), dtype=st.sampled_from(_TYPES), symmetric=st.booleans(),
    reduced=st.booleans(),
)  # fmt: skip
def test_zero_is_exact_and_rounding_is_bounded(
    low: float, width: float, dtype: QuantType, symmetric: bool, reduced: bool
) -> None:
    spec = QuantSpec(dtype, symmetric, reduced=reduced)
    scale, zero = spec.parameters(low, low + width)
    assert spec.round_trip(np.zeros(1, np.float32), scale, zero)[0] == 0.0
    x = np.linspace(min(low, 0), max(low + width, 0), 101).astype(np.float32)
    # Half a step, and up to half a step more at the ends, where the zero point is rounded.
    assert np.abs(spec.round_trip(x, scale, zero) - x).max() <= scale * 1.001 + 1e-6 * np.abs(x).max()
    assert spec.limits[0] <= zero <= spec.limits[1]


@pytest.mark.parametrize("dtype", _TYPES)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_same_as_onnxruntime(dtype: QuantType, axis: int | None) -> None:
    x = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32) * 3
    spec = QuantSpec(dtype, axis=axis)
    scale, zero = spec.weight_parameters(x)
    at = "" if axis is None else f"<axis={axis}>"
    shape = "" if axis is None else f"[{scale.size}]"
    text = f"""<ir_version: 10, opset_import: ["" : 21]> g (float[6, 5] x, float{shape} s, {dtype}{shape} z)
        => ({dtype}[6, 5] q, float[6, 5] y) {{ q = QuantizeLinear{at}(x, s, z) y = DequantizeLinear{at}(q, s, z) }}"""
    session = ort.InferenceSession(onnx.parser.parse_model(text).SerializeToString())
    outputs: list[Any] = list(session.run(None, {"x": x, "s": scale, "z": zero}))
    assert np.array_equal(outputs[0], spec.quantize(x, scale, zero))
    assert np.array_equal(outputs[1], spec.round_trip(x, scale, zero))


def test_empty_ranges_and_tensors() -> None:
    scale, zero = QuantSpec().parameters(0.0, 0.0)
    assert scale == 1.0 and zero == 0
    scale, _ = QuantSpec("int8", symmetric=True, axis=1).weight_parameters(np.zeros((0, 3), np.float32))
    assert scale.tolist() == [1, 1, 1]


def test_reduced_weights_cannot_saturate_sixteen_bits() -> None:
    low, high = QuantSpec("int8", symmetric=True, reduced=True).limits
    assert 2 * 255 * max(-low, high) <= 32767


def test_range_methods_on_a_stream_with_outliers() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal(50_000).astype(np.float32) * scale for scale in (0.01, 1.0, 0.5)]
    parts.append(np.array([40.0, -3.0], np.float32))
    seen = Histogram()
    for part in parts:
        seen.update(part)
    everything = np.concatenate(parts)
    assert seen.counts.sum() == everything.size
    assert choose_range(seen).high == 40.0
    tails = choose_range(seen, "percentile", percentile=99.9)
    expected = np.quantile(everything, [0.0005, 0.9995])
    assert np.allclose([tails.low, tails.high], expected, atol=0.05) and tails.observed == (seen.low, seen.high)
    spec = QuantSpec()

    def error(chosen: TensorRange) -> float:
        return float(
            ((spec.round_trip(everything, *spec.parameters(chosen.low, chosen.high)) - everything) ** 2).mean()
        )

    best = error(choose_range(seen, "mse", spec))
    clips = [TensorRange(max(seen.low, -t), min(seen.high, t)) for t in np.linspace(8, 40, 30)]
    assert best <= min(error(clip) for clip in clips) * 1.05
    entropy = choose_range(seen, "entropy", spec)
    assert seen.low <= entropy.low and entropy.high < 40.0


def test_histogram_of_growing_values_matches_numpy() -> None:
    seen = Histogram()
    parts = [np.random.default_rng(n).standard_normal(1000) * 10.0 ** (n - 3) for n in range(6)]
    for part in parts:
        seen.update(part)
    edges = np.linspace(-seen.reach, seen.reach, seen.counts.size + 1)
    expected, _ = np.histogram(np.concatenate(parts), edges)
    assert np.abs(np.cumsum(seen.counts) - np.cumsum(expected)).max() <= 2 and seen.reach < 2 * 400


def _model() -> Any:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[n, 4] x) => (float[n, 4] y)
        { a = Mul(x, x) b = Sqrt(a) y = Add(a, b) }"""
    return from_text(text)


def test_one_run_for_all_values_inputs_included() -> None:
    samples = [{"x": np.full((n, 4), float(n), np.float32)} for n in (1, 3, 2)]
    seen = collect_ranges(_model(), {"x": QuantSpec(), "a": QuantSpec(), "y": QuantSpec()}, samples)
    assert {name: (item.low, item.high) for name, item in seen.items()} == {"x": (1, 3), "a": (1, 9), "y": (2, 12)}


def test_nan_is_reported_by_name() -> None:
    samples = [{"x": np.ones((1, 4), np.float32)}, {"x": np.full((1, 4), 1e30, np.float32)}]
    with pytest.raises(ModelError, match="'a' is infinite on calibration sample 1"):
        observe(_model(), {"a": MinMax()}, samples)


def test_unknown_values_and_no_samples() -> None:
    with pytest.raises(ModelError, match="does not make nothing"):
        observe(_model(), {"nothing": MinMax()}, [{"x": np.ones((1, 4), np.float32)}])
    with pytest.raises(ModelError, match="no calibration samples"):
        observe(_model(), {"a": MinMax()}, [])


def test_samples_are_read_one_at_a_time_and_again(tmp_path: Path) -> None:
    alive: list[int] = []

    def stream() -> Iterator[dict[str, Any]]:
        for number in range(3):
            alive.append(number)
            yield {"x": np.full(2, number)}

    samples = Samples(stream)
    assert not alive  # nothing is read before it is needed
    first = iter(samples)
    next(first)
    assert alive == [0]
    assert [s["x"][0] for s in samples] == [0, 1, 2] == [s["x"][0] for s in samples]
    once = Samples(stream())
    assert [s["x"][0] for s in once] == [0, 1, 2] == [s["x"][0] for s in once]
    for number in range(2):
        np.savez(tmp_path / f"{number}.npz", x=np.full(2, number))
    paths = Samples([tmp_path / "1.npz", tmp_path / "0.npz"])
    assert [s["x"][0] for s in paths] == [1, 0]


def test_entropy_is_not_led_by_zeros() -> None:
    """Behind Relu most values are zero; their bin has a code of its own and must not pull the range together."""
    seen = Histogram()
    values = np.abs(np.random.default_rng(0).standard_normal(20_000)).astype(np.float32)
    seen.update(np.concatenate([np.zeros(200_000, np.float32), values]))
    found = choose_range(seen, "entropy")
    assert found.high > 0.6 * values.max()


def test_padded_positions_are_not_shown() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (int64[b, s] attention_mask, float[b, s, 3] x)
        => (float[b, s, 3] y, float[b, 3] z) { y = Neg(x) z = ReduceMax<keepdims=0>(x, axes) }"""
    model = from_text(text.replace("3] x)", "3] x, int64[1] axes)"), axes=np.array([1]))
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    seen = {name: MinMax() for name in ("x", "y", "z")}
    observe(model, seen, [{"attention_mask": np.array([[1, 1], [1, 0]]), "x": x}])
    assert (seen["x"].low, seen["x"].high) == (0.0, 8.0) and (seen["y"].low, seen["y"].high) == (-8.0, 0.0)
    assert seen["z"].high == 11.0, "no axis of tokens"
