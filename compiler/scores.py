"""What a model's outputs are worth to a task: right answers, nats per token, embeddings of sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..runtime.errors import ModelError
from ..runtime.generation.causal_lm import MASK, TOKENS

Array = np.ndarray[Any, Any]
Results = Sequence[Mapping[str, Array]]
LABELS = "labels"
"""Key of a sample under which labels stand; it is no input. Negative labels do not count."""


def tokens_of(sample: Mapping[str, Array], array: Array) -> Array | None:
    """Which positions of ``array`` [batch, sequence, ...] are tokens, bool [batch, sequence].

    None where that cannot be told: no 2-D ``attention_mask``, or an output that is not one of positions. The mask may
    count a cache too, whose positions come first.
    """
    mask = sample.get(MASK)
    if mask is None or mask.ndim != 2 or array.ndim < 3 or array.shape[0] != mask.shape[0]:
        return None
    length = sample[TOKENS].shape[1] if TOKENS in sample else mask.shape[1]
    return mask[:, -length:].astype(bool) if array.shape[1] == length <= mask.shape[1] else None


def pooled_cosine(name: str, samples: Results, exact: Results, got: Results) -> float:
    """Mean cosine of each row's result with the exact one, over all rows of all samples.

    The result of a row is the mean over its tokens (a sentence embedding) where the output ``name`` is
    [batch, sequence, features] and the mask says which positions are tokens; else all its numbers. Rows that are zero
    in both are equal (1); NaN, infinity or another shape count as 0.
    """
    total, rows = 0.0, 0
    for sample, a, b in zip(samples, exact, got, strict=True):
        one, other = a[name], b[name]
        if one.shape != other.shape:
            rows += len(one) if one.ndim else 1
            continue
        x, y = (_pooled(sample, array) for array in (one, other))
        sizes = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = np.where(sizes > 0, (x * y).sum(1) / sizes, (x == y).all(1))
        total += float(np.where(np.isfinite(cosines), cosines, 0.0).sum())
        rows += len(x)
    return total / max(rows, 1)


def divergence(name: str, samples: Results, exact: Results, got: Results) -> float:
    """Mean Kullback-Leibler divergence (nats) of the softmax over the last axis of ``name``; padding does not count."""
    total, count = 0.0, 0
    for sample, a, b in zip(samples, exact, got, strict=True):
        p, q = log_softmax(a[name]), log_softmax(b[name])
        each = (np.exp(p) * (p - q)).sum(-1)
        mask = tokens_of(sample, a[name])
        each = each if mask is None else each[mask]
        total += float(each.sum())
        count += each.size
    value = total / max(count, 1)
    return value if math.isfinite(value) else math.inf


def accuracy(samples: Results, outputs: Results) -> float:
    """Share of right answers: the largest of the last axis of the first float output, against the sample's labels.

    Raises:
        ModelError: a sample has no labels, or they do not have the shape of the answers.
    """
    right, count = 0, 0
    for number, (sample, output) in enumerate(zip(samples, outputs, strict=True)):
        answers = _scores(output).argmax(-1)
        labels = np.asarray(sample.get(LABELS, np.zeros(0, np.int64)))
        if labels.size != answers.size:
            raise ModelError(
                f"Sample {number} has {labels.size} labels for {answers.size} answers.",
                f"Give an integer array {LABELS!r} {list(answers.shape)} with each sample, or take another metric.",
            )
        labels = labels.reshape(answers.shape)
        right += int((answers == labels)[labels >= 0].sum())
        count += int((labels >= 0).sum())
    return right / max(count, 1)


def nats(samples: Results, outputs: Results) -> float:
    """Mean negative log-likelihood (nats) that ``logits`` [batch, sequence, vocabulary] give to the next token.

    Raises:
        ModelError: there are no tokens or no logits of each of them.
    """
    total, count = 0.0, 0
    for sample, output in zip(samples, outputs, strict=True):
        logits, ids = output.get("logits"), sample.get(TOKENS)
        if logits is None or ids is None or logits.shape[:2] != ids.shape:
            raise ModelError(
                f"The metric nats needs {TOKENS} [batch, sequence] and logits of each of them.", "Take kl or cosine."
            )
        likely = np.take_along_axis(log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)[..., 0]
        mask = tokens_of(sample, logits)
        both = np.ones(likely.shape, bool) if mask is None else mask[:, 1:] & mask[:, :-1]
        total -= float(likely[both].sum())
        count += int(both.sum())
    value = total / max(count, 1)
    return value if math.isfinite(value) else math.inf


def log_softmax(array: Array) -> Array:
    """In float64, over the last axis."""
    wide = array.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


SCORES: dict[str, Callable[[Results, Results], float]] = {
    "accuracy": accuracy,
    "nats": lambda samples, outputs: -nats(samples, outputs),
}
"""Scores by name; higher is better."""


def _pooled(sample: Mapping[str, Array], array: Array) -> Array:
    """[rows, numbers] in float64."""
    wide = array.astype(np.float64)
    mask = tokens_of(sample, array)
    if mask is None or array.ndim != 3:
        return wide.reshape(len(wide), -1) if wide.ndim and len(wide) else wide.reshape(1, -1)
    chosen = np.where(mask[..., None], wide, 0.0)
    return chosen.sum(1) / np.maximum(mask.sum(1), 1)[:, None]


def _scores(output: Mapping[str, Array]) -> Array:
    for array in output.values():
        if array.dtype.kind == "f" and array.ndim:
            return array
    raise ModelError("No output of the model is a float array, so there are no answers.", "Take another metric.")
