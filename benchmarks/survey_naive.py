"""The survey's own formulas, kept as controls: what they predict, and what is there when it is measured.

They are wrong on purpose: nothing outside this benchmark uses them.
"""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]

CLAIMS = {"pruning": 2.0, "int8": 1.5, "data parallel": 3.0, "memory": 1.2}
"""Times as fast, as the survey says, for 20 % of the weights pruned, 8 bits, more workers, memory optimized."""


def composed_claim() -> float:
    """Techniques multiplied, as if none stood in another's way."""
    return math.prod(CLAIMS.values())


def quantize_low(weights: Array, bits: int) -> Array:
    """``Q(x) = round(x / 2^bits)``: no scale of the data; what is below ``2^bits / 2`` becomes zero."""
    return np.round(weights / 2**bits) * 2.0**bits


def quantize_high(weights: Array, bits: int) -> Array:
    """``Q(x) = round(x 2^bits)``, kept in so many bits: fixed point up to 1/2, whatever the data."""
    half = 2 ** (bits - 1)
    return np.clip(np.round(weights * 2**bits), -half, half - 1) / 2.0**bits


def prune_threshold(weights: Array, theta: float) -> Array:
    """``w = 0 where |w| < theta``."""
    return np.where(np.abs(weights) < theta, 0, weights)


def merge_by_sum(shards: list[Array]) -> Array:
    """``y = sum(y_i)`` of data-parallel shards, which must be put one behind the other."""
    return np.sum(shards, axis=0)


def hit_rate(size: float, seconds: float) -> float:
    """``1 / (1 + exp(-size / time))``: of a cache; never below one half."""
    return 1.0 / (1.0 + math.exp(-size / seconds))


def lru_hits(keys: list[int], size: int) -> float:
    """Hits of a real cache that forgets what was not used for the longest time."""
    held: collections.OrderedDict[int, None] = collections.OrderedDict()
    hits = 0
    for key in keys:
        hits += key in held
        held[key] = None
        held.move_to_end(key)
        if len(held) > size:
            held.popitem(last=False)
    return hits / len(keys)


def with_weights(model: ir.Model, change: Any) -> ir.Model:
    """A copy of ``model`` whose matrices are changed."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and len(tensor.shape) == 2 and tensor.dtype == ir.DataType.FLOAT:
            array = np.ascontiguousarray(change(tensor.numpy()).astype(np.float32))
            value.const_value = ir.tensor(array, name=value.name)
    return copy


def controls(model: ir.Model, accuracy: Any, predict: Any, pixels: Array) -> list[dict[str, Any]]:
    """Every naive formula on the trained MLP: what it promises and what happens.

    Args:
        model: the MLP.
        accuracy: model -> percent.
        predict: (model, pixels) -> logits.
        pixels: float32 [rows, 784].
    """
    rows: list[dict[str, Any]] = []
    for name, change in (
        ("Q(x) = round(x / 2^8)", lambda w: quantize_low(w, 8)),
        ("Q(x) = round(x 2^8) in 8 bits", lambda w: quantize_high(w, 8)),
        ("Q(x) = round(x 2^2) in 2 bits", lambda w: quantize_high(w, 2)),
    ):
        found = accuracy(with_weights(model, change))
        rows.append({"formula": name, "predicts": "accuracy kept", "measured": f"{found:.2f} % right"})
    everything = np.concatenate([np.abs(_array(v)).ravel() for v in model.graph.initializers.values()])
    for share in (0.2, 0.9):
        theta = float(np.quantile(everything, share))
        found = accuracy(with_weights(model, lambda w, theta=theta: prune_threshold(w, theta)))
        said = "2.0 x as fast" if share == 0.2 else "faster still"
        name = f"w = 0 where |w| < {theta:.3g} ({share:.0%})"
        rows.append({"formula": name, "predicts": said, "measured": f"{found:.2f} % right, as fast as before"})
    shards = np.array_split(pixels[:1000], 2)
    merged, right = merge_by_sum([predict(model, shard) for shard in shards]), predict(model, pixels[:1000])
    agreed = 50 * float((merged.argmax(1) == right[: len(merged)].argmax(1)).mean())
    rows.append({
        "formula": "y = sum(y_i) of 2 data-parallel shards", "predicts": "the answers",
        "measured": f"{agreed:.0f} % of the rows have their answer; half have none",
    })  # fmt: skip
    keys = (np.random.default_rng(0).zipf(1.2, 20_000) % 5000).tolist()
    for size in (0, 10, 1000):
        real = lru_hits(keys, size) if size else 0.0
        said = f"{hit_rate(size, 100.0):.2f}"
        name = f"hits = 1 / (1 + exp(-size / time)), size {size}"
        rows.append({"formula": name, "predicts": said, "measured": f"{real:.2f}"})
    return rows


def _array(value: ir.Value) -> Array:
    return value.const_value.numpy() if value.const_value is not None else np.zeros(0)
