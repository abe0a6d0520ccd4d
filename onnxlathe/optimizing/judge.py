"""What a candidate loses on the samples that judge, run as a user runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxlathe.compiler.budget import Budget, Metric
from onnxlathe.compiler.scores import LABELS
from onnxlathe.runtime.errors import ModelError
from onnxlathe.runtime.feeds import Feeds
from onnxlathe.runtime.session import Session

_MOST = 1_000_000_000
"""Bytes of the original's outputs that are kept to compare with."""


def default_metric(decoder: bool, labelled: bool) -> Metric:
    """What is lost, where the user does not say: labels make it accuracy, tokens that follow KL, else a cosine."""
    if labelled:
        return "accuracy"
    return "kl" if decoder else "pooled_cosine"


def metric_words(budget: Budget, decoder: bool, outputs: Sequence[str]) -> str:
    """The metric in words, for the table."""
    if callable(budget.metric):
        return f"the fall of {getattr(budget.metric, '__name__', 'the score')}"
    of = " of the logits" if decoder else f" of {', '.join(outputs)}"
    return {
        "pooled_cosine": f"1 - pooled cosine{of}",
        "cosine": f"1 - cosine{of}",
        "relative_error": f"largest error over largest value{of}",
        "kl": f"KL in nats a token{of}" if decoder else f"KL in nats{of}",
        "accuracy": "accuracy (share of right answers)",
        "nats": "nats a token of the samples' text",
        "sqnr": f"-SQNR in dB{of}",
    }[budget.metric]


class Judge:
    """Compares candidates with the original on the judged samples.

    Args:
        original: the model as it was.
        samples: what decides, with labels where there are any.
        budget: how it is compared.
        decoder: only the logits count, as every pipeline lays its cache out as it likes.
        device, threads: where candidates run.

    Attributes:
        samples: those that are compared: as many of the first as have outputs of 1 GB together.
        outputs: names of the outputs compared.
    """

    def __init__(
        self, original: Path, samples: Sequence[Feeds], budget: Budget, decoder: bool, device: str, threads: int
    ) -> None:
        self._budget, self._device, self._threads = budget, device, threads
        session = Session(original, device, threads)
        floats = [out.name for out in session.ort.get_outputs() if out.type in _FLOATS]
        self.outputs: list[str] = ["logits"] if decoder else floats
        if not self.outputs and not callable(budget.metric):
            raise ModelError(
                "No output of the model is a float array, so no metric applies.",
                "Give your own: metric=function(samples, outputs) -> score.",
            )
        self._wanted = None if callable(budget.metric) and not decoder else self.outputs
        self.samples: list[Feeds] = []
        self._exact: list[Mapping[str, np.ndarray[Any, Any]]] = []
        held = 0
        for sample in samples:
            result = self._run(session, sample)
            held += sum(array.nbytes for array in result.values())
            self.samples.append(sample)
            self._exact.append(result)
            if held > _MOST:
                break

    def drop(self, candidate: Path | ir.Model) -> float:
        """What ``candidate`` loses, in the metric's unit, smaller is better.

        Raises:
            ModelError: it does not run on the samples.
        """
        session = Session(candidate, self._device, self._threads)
        got = [self._run(session, sample) for sample in self.samples]
        return float(self._budget.loss(self.samples, self._exact, got))

    def _run(self, session: Session, sample: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        return session.run({name: array for name, array in sample.items() if name != LABELS}, self._wanted)


_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)", "tensor(bfloat16)")
