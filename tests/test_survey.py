"""The survey's sides compute what one run of the model computes; its naive formulas do what is said of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from grouped_decoders import VOCABULARY, Rotary, Spec, decoder

import onnxlathe as lathe
from onnxlathe.runtime.artifact import save

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmarks are scripts beside each other, not a package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in ("survey_worker", "survey_naive", "worker"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", ["run 1", "bound 1", "run 2", "bound 2", "run 3"])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_rows_come_out_in_order(kind: str, batch: int, small_file: Path) -> None:
    from survey_worker import Stream  # type: ignore[import-not-found]

    x = np.random.default_rng(0).standard_normal((7, 8)).astype(np.float32)
    side = Stream(kind, str(small_file), 1)
    expected = lathe.Session(small_file).run({"x": x})["y"]
    feeds = {"x": x, "batch": np.array(batch)}
    assert len(side.timed(feeds, 2)) == 2
    np.testing.assert_allclose(side(feeds), expected, rtol=1e-5, atol=1e-6)


def test_texts_are_the_same_however_the_cache_goes_round(tmp_path: Path) -> None:
    from survey_worker import Texts  # type: ignore[import-not-found]

    path = save(decoder(Spec(rotary=(Rotary(16),), windows=(0,))), tmp_path / "model.onnx")
    feeds = {"prompt": np.random.default_rng(0).integers(0, VOCABULARY, (3, 5)), "new": np.array(6)}
    texts = [Texts(kind, str(path), 1)(feeds) for kind in ("text run 1", "text plain run 1", "text run 2")]
    assert texts[0].shape == (3, 6)
    assert (texts[0] == texts[1]).all() and (texts[0] == texts[2]).all()


def test_naive_formulas(small_model: ir.Model) -> None:
    from survey_naive import (  # type: ignore[import-not-found]
        composed_claim,
        hit_rate,
        lru_hits,
        merge_by_sum,
        prune_threshold,
        quantize_high,
        quantize_low,
        with_weights,
    )

    weights = np.array([-3.0, -0.2, 0.004, 0.3, 0.9], np.float32)
    assert composed_claim() == pytest.approx(10.8)
    assert not quantize_low(weights, 8).any(), "what is small beside 2^8 is gone"
    assert quantize_high(weights, 8) == pytest.approx([-0.5, -51 / 256, 1 / 256, 77 / 256, 127 / 256])
    assert prune_threshold(weights, 0.25) == pytest.approx([-3.0, 0, 0, 0.3, 0.9])
    assert merge_by_sum([np.ones((2, 3)), np.ones((2, 3))]).shape == (2, 3), "two rows are lost"
    assert hit_rate(0, 1) == 0.5 and lru_hits([1, 2, 1, 3, 1, 2], 2) == pytest.approx(2 / 6)
    changed = with_weights(small_model, lambda w: 2 * w)
    kept, doubled = (model.graph.initializers["w"].const_value for model in (small_model, changed))
    assert kept is not None and doubled is not None and (doubled.numpy() == 2 * kept.numpy()).all()
