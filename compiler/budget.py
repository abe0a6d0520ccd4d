"""How much worse a quantized model may be than the float one, measured on samples that calibration does not see."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from .metrics import Distance
from .padding import results_of_tokens
from .scores import SCORES, divergence, pooled_cosine

Array = np.ndarray[Any, Any]
Results = Sequence[Mapping[str, Array]]
Score = Callable[[Results, Results], float]
"""``score(samples, outputs)``, higher is better; both lists are in the same order."""
Metric = Literal["relative_error", "cosine", "pooled_cosine", "sqnr", "kl", "accuracy", "nats"]
_WORDS = {
    "relative_error": "error",
    "cosine": "1 - cosine",
    "pooled_cosine": "1 - pooled cosine",
    "kl": "KL",
    "accuracy": "accuracy lost",
    "nats": "nats a token",
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What must hold between the outputs of the float and of the quantized model, over all held-out samples.

    Attributes:
        metric: ``relative_error``: ``max |float - quantized| / max |float|``; ``cosine``: 1 - cosine; ``sqnr``:
            signal to noise in dB; ``kl``: mean Kullback-Leibler divergence (nats) of softmax over the last axis, for
            logits; ``pooled_cosine``: 1 - mean cosine of each row's mean over its tokens (sentence embeddings), or of
            all its numbers where there are no tokens; of several outputs the worst counts. ``accuracy``: how much the
            share of right answers falls (the samples have ``labels``); ``nats``: how much the nats per token of the
            samples' own text rise. Or a callable ``score(samples, outputs)`` whose fall counts.
        max_drop: the most the metric may be, or the score may fall; for ``sqnr`` the fewest dB.
        held_out: part of the samples kept away from calibration, drawn with the seed of the compile.
        samples: samples to judge on instead; then all others calibrate.
    """

    metric: Metric | Score = "relative_error"
    max_drop: float = 0.1
    held_out: float = 0.25
    samples: Sequence[Mapping[str, Array]] | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.metric) and self.metric not in get_args(Metric):
            raise ValueError(f"metric is a callable or one of {', '.join(get_args(Metric))}, not {self.metric!r}")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out lies between 0 and 1, not {self.held_out}")
        if not math.isfinite(self.max_drop):
            raise ValueError(f"max_drop is a finite number, not {self.max_drop}")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads ``metric<=number`` (``sqnr>=number``), as the command line takes it: ``cosine<=0.005``.

        Raises:
            ValueError: the text says something else.
        """
        metric, sign, number = (*(part.strip() for part in re.split(r"(<=|>=)", text, maxsplit=1)), "", "")[:3]
        if metric not in get_args(Metric) or sign != (">=" if metric == "sqnr" else "<="):
            raise ValueError(f"a budget is METRIC<=NUMBER with {', '.join(get_args(Metric))} (sqnr>=dB), not {text!r}")
        return cls(metric, float(number))  # pyright: ignore[reportArgumentType]

    @property
    def limit(self) -> float:
        """The largest ``loss`` that is still within the budget."""
        return -self.max_drop if self.metric == "sqnr" else self.max_drop

    def loss(self, samples: Results, exact: Results, got: Results) -> float:
        """How much is lost: the metric, smaller is better (for ``sqnr`` the negative dB). Padding does not count."""
        score = self.metric if callable(self.metric) else SCORES.get(self.metric)
        if score is not None:
            return float(score(samples, exact)) - float(score(samples, got))
        floats = [name for name in exact[0] if exact[0][name].dtype.kind == "f"] if exact else []
        if self.metric in ("pooled_cosine", "kl"):
            return max((self._loss_of_rows(name, samples, exact, got) for name in floats), default=0.0)
        exact, got = (
            [results_of_tokens(sample, result) for sample, result in zip(samples, results, strict=True)]
            for results in (exact, got)
        )
        return max((self._loss_of(name, exact, got) for name in floats), default=0.0)

    def say(self, loss: float) -> str:
        """A loss in words."""
        if self.metric == "sqnr":
            return f"SQNR {-loss:.1f} dB"
        name = "score lost" if callable(self.metric) else _WORDS[self.metric]
        return f"{name} {loss:.3g}"

    def _loss_of_rows(self, name: str, samples: Results, exact: Results, got: Results) -> float:
        if self.metric == "kl":
            return divergence(name, samples, exact, got)
        return 1.0 - pooled_cosine(name, samples, exact, got)

    def _loss_of(self, name: str, exact: Results, got: Results) -> float:
        distance = Distance()
        for a, b in zip(exact, got, strict=True):
            distance.update(a[name], b[name])
        if self.metric == "cosine":
            return 1.0 - distance.cosine
        return -distance.sqnr if self.metric == "sqnr" else distance.relative_error


class Part:
    """Some of the samples, readable more than once like the whole."""

    def __init__(self, feeds: Iterable[Mapping[str, Array]], picked: set[int]) -> None:
        self.feeds, self.picked = feeds, picked

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for number, sample in enumerate(self.feeds):
            if number in self.picked:
                yield dict(sample)


def split(feeds: Iterable[Mapping[str, Array]], part: float, seed: int) -> tuple[Part, Part]:
    """Calibration samples and held-out ones; of a single sample both are that sample."""
    count = sum(1 for _ in feeds)
    order = np.random.default_rng(seed).permutation(count)
    held = set(order[: max(1, round(part * count))].tolist()) if count > 1 else set(range(count))
    rest = set(range(count)) - held if count > 1 else held
    return Part(feeds, rest), Part(feeds, held)
