"""Sampling against transformers' own, and against the probabilities it should have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnxlathe.runtime.generation.sampling import Sampling


def wanted(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Probabilities by transformers."""
    pytest.importorskip("transformers")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits[None], dtype=torch.float64))
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize("flat", [1.0, 0.01])  # nearly equal logits: top_p needs more than the first candidates
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, None, None), (1.3, 50, None), (1.0, None, 0.9), (0.8, 50, 0.6), (1.0, 5000, 0.999), (1.0, None, 1e-6)],
)
def test_probabilities_equal_transformers(
    temperature: float, top_k: int | None, top_p: float | None, flat: float
) -> None:
    logits = (np.random.default_rng(0).standard_normal(3000) * 3 * flat).astype(np.float32)
    tokens, weights = Sampling(temperature, top_k, top_p).kept(logits)
    got = np.zeros(3000)
    got[tokens] = weights / weights.sum()
    assert np.allclose(got, wanted(logits, temperature, top_k, top_p), atol=1e-12)


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rng = np.random.default_rng(0)
    counts = np.bincount([Sampling(1.0).choose(logits, rng) for _ in range(20000)], minlength=4)
    assert np.abs(counts / 20000 - [0.5, 0.3, 0.15, 0.05]).max() < 0.01  # three standard deviations
    assert Sampling().choose(logits, rng) == 0
