"""FewLevelWeights: exact for weights that have few values, said and refused otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from low_bit_models import block, block_feeds

from onnxlathe.passes import FewLevelWeights
from onnxlathe.runtime.inference import open_session, run_session, session_options
from rewriting import from_text, ops, refused, rewrite

RNG = np.random.default_rng(0)
VALUES: dict[str, list[float]] = {"binary": [-1, 1], "ternary": [-1, 0, 1], "midrise": [-1.5, -0.5, 0.5, 1.5]}
TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g (float[b, s, 128] x, float[128, 64] w) => (float[b, s, 64] y) { m = MatMul(x, w)  y = Relu(m) }"""


@pytest.mark.parametrize("levels", VALUES)
def test_exact_for_trained_weights(levels: Any) -> None:
    scale = np.exp(RNG.standard_normal(64)).astype(np.float32)
    weight = RNG.choice(VALUES[levels], (128, 64)).astype(np.float32) * scale
    x = RNG.standard_normal((2, 3, 128)).astype(np.float32)
    step = FewLevelWeights(levels=levels, accuracy_level=0)
    after, outcome = rewrite(step, from_text(TEXT, w=weight), feeds=[{"x": x}], tolerance=1e-5)
    assert ops(after) == {"com.microsoft.MatMulNBits": 1, "Relu": 1}
    assert not outcome.notes
    got = run_session(open_session(after, session_options()), {"x": x})["y"]
    assert np.allclose(got, np.maximum(x @ weight, 0), rtol=1e-4, atol=1e-3)
    stored = sum(v.const_value.nbytes for v in after.graph.initializers.values())  # type: ignore[union-attr]
    assert stored == 64 * (128 * (4 if levels == "midrise" else 2) // 8 + 4)


def test_untrained_weights_are_said() -> None:
    step = FewLevelWeights(block_size=32)
    after, outcome = rewrite(step, block(), feeds=block_feeds(1), tolerance=9.0)
    assert outcome.counts == {"ternary products": 3}  # the head stays
    assert any("takes training to recover" in note for note in outcome.notes)
    assert ops(after)["MatMul"] == 1


@pytest.mark.parametrize("size", [16, 256])
def test_blocks_without_a_kernel_are_refused(size: Any) -> None:
    weight = RNG.standard_normal((512, 64)).astype(np.float32)
    text = TEXT.replace("128", "512")
    refused(FewLevelWeights(block_size=size), from_text(text, w=weight), "dequantize on every run")
    _, outcome = rewrite(FewLevelWeights(levels="midrise", block_size=size), from_text(text, w=weight), tolerance=9.0)
    assert outcome.changed
