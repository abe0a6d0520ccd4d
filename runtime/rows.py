"""Batches cut into shards of rows, and results put together again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from .errors import ModelError

Array = np.ndarray[Any, Any]


def batch_inputs(inputs: Sequence[ir.Value]) -> list[str]:
    """Names of the inputs that have a row for each item of a batch: their first dim is symbolic, and one name.

    Raises:
        ModelError: there are none, or their first dims differ.
    """
    first = {v.name or "": v.shape[0] for v in inputs if v.shape is not None and len(v.shape)}
    rows = {name: dim.value for name, dim in first.items() if isinstance(dim, ir.SymbolicDim)}
    if not rows or len(set(rows.values())) != 1:
        raise ModelError(
            f"The batch cannot be divided: the first dims of the inputs are {rows or first}.",
            "Export the model with one dynamic batch dim, the first of each input.",
        )
    return list(rows)


def count_rows(inputs: Mapping[str, Array], names: Sequence[str]) -> int:
    """Rows of a batch.

    Raises:
        ModelError: the inputs called ``names`` have different numbers of rows.
    """
    counts = {name: len(inputs[name]) for name in names}
    if len(set(counts.values())) != 1:
        raise ModelError(f"The inputs have different numbers of rows: {counts}.", "Give a row of each for each item.")
    return counts[names[0]]


def split_rows(inputs: Mapping[str, Array], names: Sequence[str], sizes: Sequence[int]) -> list[dict[str, Array]]:
    """Shards of ``sizes`` rows, in order; other inputs are in every shard."""
    ends = np.cumsum([0, *sizes])
    return [
        {name: array[start:end] if name in names else array for name, array in inputs.items()}
        for start, end in itertools.pairwise(ends)
    ]


def even_sizes(rows: int, parts: int) -> list[int]:
    """``rows`` in at most ``parts`` shards whose sizes differ by one at most; none is empty unless all are."""
    parts = max(1, min(rows, parts))
    return [rows // parts + (number < rows % parts) for number in range(parts)]


def join_rows(results: Sequence[Mapping[str, Array]], sizes: Sequence[int]) -> dict[str, Array]:
    """The results of shards as those of the whole batch, in order.

    Raises:
        ModelError: an output has not one row for each row of its shard.
    """
    for name in results[0]:
        for result, size in zip(results, sizes, strict=True):
            if result[name].ndim == 0 or len(result[name]) != size:
                raise ModelError(
                    f"Output {name!r} has the shape {list(result[name].shape)} for {size} rows: it cannot be put "
                    "together from shards.",
                    "Run the model whole.",
                )
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}
