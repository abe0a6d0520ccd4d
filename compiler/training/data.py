"""Training samples: as feeds, with labels or without, or cut from streams of tokens."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ...runtime.errors import ModelError, PassError
from ...runtime.feeds import FeedSource, Samples, check_feeds
from ...runtime.generation.causal_lm import MASK, POSITIONS, TOKENS
from ..base import Array, Feeds
from ..scores import LABELS

IGNORED = -100
"""The label of what does not count."""
Data = FeedSource | Iterable[Sequence[int] | Array]


def training_samples(data: Data, model: ir.Model, window: int, batch: int) -> list[Feeds]:
    """The samples in ``data``, each checked against the inputs of ``model``.

    Args:
        data: what ``Samples`` takes, the samples optionally with ``labels``; or one-dimensional integer sequences:
            streams of tokens, cut into windows whose labels are the tokens that follow.
        model: the model to be trained.
        window: tokens of a window.
        batch: windows of a sample.

    Raises:
        ModelError: a sample does not fit the inputs, a stream is no integers, or the model takes no tokens.
        PassError: there is no sample.
    """
    plain = isinstance(data, (str, os.PathLike)) or callable(data)
    source: Any = data
    items: Any = source if plain else list(source)
    streams = [] if plain else [item for item in items if not isinstance(item, (Mapping, str, os.PathLike))]
    if streams and len(streams) != len(items):
        raise ModelError("The training data mix samples and streams of tokens.", "Give one kind.")
    samples = list(_windows(streams, model, window, batch)) if streams else list(Samples(items))
    for number, sample in enumerate(samples):
        inputs = {name: array for name, array in sample.items() if name != LABELS}
        check_feeds(model.graph.inputs, inputs, f"training sample {number}")
        labels = np.asarray(sample.get(LABELS, np.zeros(0, np.int64)))
        if labels.dtype.kind not in "iu":
            raise ModelError(f"The labels of training sample {number} are {labels.dtype}.", "Labels are integers.")
    if not samples:
        raise PassError("There are no training data.", "Give Distill(data=...) or compile(..., calibration=...).")
    return samples


def _windows(streams: Sequence[Any], model: ir.Model, window: int, batch: int) -> Iterable[Feeds]:
    inputs = {value.name or "": value for value in model.graph.inputs}
    if TOKENS not in inputs:
        raise ModelError(
            f"The model has no input {TOKENS}, so it cannot be trained on streams of tokens.",
            f"Give samples; its inputs are: {', '.join(inputs)}.",
        )
    rows: list[Array] = []
    for number, stream in enumerate(streams):
        tokens = np.asarray(stream)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ModelError(
                f"Stream {number} has shape {list(tokens.shape)} and dtype {tokens.dtype}.",
                "A stream is a list of token ids.",
            )
        rows += [tokens[start : start + window] for start in range(0, len(tokens) - 1, window)]
    rows.sort(key=len)  # little padding within a batch
    for start in range(0, len(rows), batch):
        yield sample_of_rows(rows[start : start + batch], inputs)


def sample_of_rows(rows: Sequence[Array], inputs: Mapping[str, ir.Value]) -> Feeds:
    """Rows of tokens padded on the right, from an empty cache, for a model with ``inputs``; labels are the next tokens.

    Raises:
        ModelError: the model has an input that tokens say nothing of.
    """
    longest = max(len(row) for row in rows)
    ids = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros_like(ids)
    labels = np.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
        labels[number, : len(row) - 1] = row[1:]
    known = {TOKENS: ids, MASK: mask, POSITIONS: np.broadcast_to(np.arange(longest), ids.shape)}
    sample: Feeds = {LABELS: labels}
    for name, value in inputs.items():
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.int64)
        if name in known:
            sample[name] = np.ascontiguousarray(known[name], dtype)
            continue
        shape = [dim if isinstance(dim, int) else None for dim in value.shape or ()]
        if name.startswith("past"):  # [batch, heads, 0, size]
            shape = [len(rows), shape[1], 0, shape[3]] if len(shape) == 4 else shape
        elif len(shape) == 2:  # token_type_ids and the like
            shape = list(ids.shape)
        if not all(isinstance(size, int) for size in shape):
            raise ModelError(f"Streams of tokens say nothing of the input {name!r}.", "Give samples instead.")
        sample[name] = np.zeros([int(size or 0) for size in shape], dtype)
    return sample
