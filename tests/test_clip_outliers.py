"""ClipOutliers: against brute force, worth by inputs, once only, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from quantized import quantize

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.graph import constant
from onnxlathe.compiler.verify import run_reference
from onnxlathe.passes import ClipOutliers
from rewriting import from_text, refused, rewrite

RNG = np.random.default_rng(0)
HEAD = '<ir_version: 10, opset_import: ["" : 20]>'
W = RNG.standard_normal((64, 12)).astype(np.float32)
W[7, ::2] = 9.0
"""Every second output channel has one weight nine times the usual size."""
TEXT = f"{HEAD} m (float[n, 64] x, float[64, 12] w) => (y) {{ y = MatMul(x, w) }}"
ANY = {"tolerance": 1.0}


def rounding_error(column: np.ndarray, limit: float) -> float:
    clipped = np.clip(column, -limit, limit)
    step = np.abs(clipped).max() / 7
    return float(np.square(np.clip(np.rint(clipped / step), -7, 7) * step - column).sum())


def test_each_channel_takes_the_best_of_all_limits() -> None:
    after, outcome = rewrite(ClipOutliers(bits=4), from_text(TEXT, w=W), **ANY)
    assert outcome.counts == {"weights clipped": 1}
    got = constant(after.graph[0].inputs[1])
    for channel in range(12):
        column = W[:, channel].astype(np.float64)
        size = np.abs(column).max()
        least = min(rounding_error(column, size * shrink) for shrink in np.linspace(0.3, 1, 71))
        assert rounding_error(column, np.abs(got[:, channel]).max()) <= least * 1.001
        assert np.abs(got[:, channel]).max() <= size


def test_inputs_that_are_never_large_count_little() -> None:
    """Input 7 is always zero: its outlying weight may go; where it alone is large it must stay."""
    model = from_text(TEXT, w=W)
    x = RNG.standard_normal((50, 64)).astype(np.float32)
    silent, loud = x.copy(), x.copy() / 100
    silent[:, 7], loud[:, 7] = 0, 10
    errors = {}
    for name, rows in (("silent", silent), ("loud", loud)):
        feeds = [{"x": rows}]
        after = model.clone()
        ClipOutliers(bits=4)(after, PassContext(feeds=feeds))
        exact = run_reference(model, feeds)[0]["y"]
        noise = [
            float(
                np.square(run_reference(quantize(item, feeds, bits=4, activations=False), feeds)[0]["y"] - exact).sum()
            )
            for item in (model, after)
        ]
        errors[name] = noise[1] / noise[0]
    assert errors["silent"] < 0.3 and errors["loud"] <= 1.0001


def test_helps_on_held_out_data() -> None:
    model = from_text(TEXT, w=W)
    feeds, unseen = ([{"x": RNG.standard_normal((80, 64)).astype(np.float32)}] for _ in range(2))
    after = model.clone()
    ClipOutliers(bits=4)(after, PassContext(feeds=feeds))
    exact = run_reference(model, unseen)[0]["y"]
    noise = [
        float(np.square(run_reference(quantize(item, feeds, bits=4, activations=False), unseen)[0]["y"] - exact).sum())
        for item in (model, after)
    ]
    assert noise[1] < 0.96 * noise[0]


@pytest.mark.parametrize("body", ["y = Conv<group=2>(x, w)", "y = Conv(x, v)"])
def test_conv(body: str) -> None:
    weights = {"w": RNG.standard_normal((8, 2, 3, 3)), "v": RNG.standard_normal((8, 4, 3, 3))}
    name = "w" if "group" in body else "v"
    array = weights[name].astype(np.float32)
    array[:, 0, 0, 0] = 8
    shape = ",".join(map(str, array.shape))
    model = from_text(f"{HEAD} m (float[n, 4, 6, 6] x, float[{shape}] {name}) => (y) {{ {body} }}", **{name: array})
    feeds = [{"x": RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)}]
    after, outcome = rewrite(
        ClipOutliers(bits=4), model, feeds=feeds, context=PassContext(feeds=feeds), nested=False, **ANY
    )
    assert outcome.counts == {"weights clipped": 1} and constant(after.graph[0].inputs[1]).shape == array.shape


def test_what_is_refused() -> None:
    even = np.sign(RNG.standard_normal((64, 12))).astype(np.float32)
    refused(ClipOutliers(bits=4), from_text(TEXT, w=even), "does not pay")
    shared = f"{HEAD} m (float[n, 64] x, float[64, 12] w) => (y, z) {{ y = MatMul(x, w) z = MatMul(x, w) }}"
    refused(ClipOutliers(bits=4), from_text(shared, w=W), "also used elsewhere")
    half = f"{HEAD} m (float16[n, 64] x, float16[64, 12] w) => (y) {{ y = MatMul(x, w) }}"
    refused(ClipOutliers(bits=4), from_text(half, w=W.astype(np.float16)), "not float32", tolerance=1e-2)
    with pytest.raises(ValueError, match=r"2\.\.8"):
        ClipOutliers(bits=1)
