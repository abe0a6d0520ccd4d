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

Array = np.ndarray[Any, Any]
Results = Sequence[Mapping[str, Array]]
Score = Callable[[Results, Results], float]
"""``score(samples, outputs)``, higher is better; both lists are in the same order."""
Metric = Literal["relative_error", "cosine", "sqnr", "kl"]


@dataclasses.dataclass(frozen=True)
class Budget:
    """What must hold between the outputs of the float and of the quantized model, over all held-out samples.

    Attributes:
        metric: ``relative_error``: ``max |float - quantized| / max |float|``; ``cosine``: 1 - cosine; ``sqnr``:
            signal to noise in dB; ``kl``: mean Kullback-Leibler divergence (nats) of softmax over the last axis, for
            logits; of several outputs the worst counts. Or a callable ``score(samples, outputs)`` whose fall counts,
            e.g. the share of right answers.
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
        if callable(self.metric):
            return float(self.metric(samples, exact)) - float(self.metric(samples, got))
        exact, got = (
            [results_of_tokens(sample, result) for sample, result in zip(samples, results, strict=True)]
            for results in (exact, got)
        )
        floats = [name for name in exact[0] if exact[0][name].dtype.kind == "f"] if exact else []
        return max((self._loss_of(name, exact, got) for name in floats), default=0.0)

    def say(self, loss: float) -> str:
        """A loss in words."""
        if self.metric == "sqnr":
            return f"SQNR {-loss:.1f} dB"
        name = "score lost" if callable(self.metric) else {"cosine": "1 - cosine", "kl": "KL"}.get(self.metric, "error")
        return f"{name} {loss:.3g}"

    def _loss_of(self, name: str, exact: Results, got: Results) -> float:
        if self.metric == "kl":
            return _divergence(name, exact, got)
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


def _divergence(name: str, exact: Results, got: Results) -> float:
    total, rows = 0.0, 0
    for a, b in zip(exact, got, strict=True):
        p, q = _log_softmax(a[name]), _log_softmax(b[name])
        total += float((np.exp(p) * (p - q)).sum())
        rows += p[..., 0].size
    value = total / max(rows, 1)
    return value if math.isfinite(value) else math.inf


def _log_softmax(array: Array) -> Array:
    wide = array.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
