"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from ..errors import ModelError

Array = np.ndarray[Any, Any]
_CANDIDATES = 1024  # top_p rarely needs more; sorting a whole vocabulary takes milliseconds


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen, in transformers' order: temperature, then ``top_k``, then ``top_p``.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only the ``top_k`` most likely tokens; None for all.
        top_p: only the fewest tokens, most likely first, whose probabilities reach ``top_p`` (Holtzman et al. 2020,
            "The Curious Case of Neural Text Degeneration"); None for all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ModelError(f"temperature is {self.temperature}.", "Give 0 for greedy, or a positive number.")
        if self.top_k is not None and self.top_k < 1:
            raise ModelError(f"top_k is {self.top_k}.", "Give at least 1, or leave it out.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ModelError(f"top_p is {self.top_p}.", "Give a number above 0 and up to 1, or leave it out.")
        if self.temperature == 0 and (self.top_k or self.top_p):
            raise ModelError("top_k and top_p were given without a temperature.", "Give one, for example 1.0.")

    def choose(self, logits: Array, rng: np.random.Generator) -> int:
        """One token id for float32 ``logits`` [vocabulary].

        Raises:
            ModelError: the logits hold NaN.
        """
        best = int(logits.argmax())
        if math.isnan(logits[best]):  # argmax finds the first NaN, if there is one
            raise ModelError("The model's logits are NaN.", "Run `onnxlathe diff` against the model it was made from.")
        if self.temperature == 0:
            return best
        tokens, probabilities = self.kept(logits)
        cumulative = np.cumsum(probabilities)
        chosen = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
        return int(tokens[min(chosen, len(tokens) - 1)])

    def kept(self, logits: Array) -> tuple[Array, Array]:
        """The tokens that may be drawn, and their probabilities up to a common factor."""
        scores = (logits - logits.max()).astype(np.float64) / self.temperature
        tokens: Array = np.arange(len(scores))
        if self.top_k is not None and self.top_k < len(scores):
            tokens = np.argpartition(scores, -self.top_k)[-self.top_k :]
        weights = np.exp(scores[tokens])
        if self.top_p is None or self.top_p == 1:
            return tokens, weights
        wanted = self.top_p * weights.sum()
        order = _largest(weights, min(_CANDIDATES, len(weights)))
        if weights[order].sum() < wanted:
            order = _largest(weights, len(weights))
        count = int(np.searchsorted(np.cumsum(weights[order]), wanted)) + 1
        return tokens[order[:count]], weights[order[:count]]


def _largest(weights: Array, count: int) -> Array:
    """Indices of the ``count`` largest, largest first."""
    part = np.argpartition(weights, -count)[-count:]
    return part[np.argsort(-weights[part], kind="stable")]
