"""The key/value cache in 8 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from ...compiler.base import Claim, Gate, Outcome, Pass, PassContext
from ...compiler.graph import (
    MICROSOFT,
    PASS_KEY,
    Array,
    Names,
    add_initializer,
    all_nodes,
    attribute,
    is_op,
    only_consumer,
)
from ...runtime.errors import PassError
from ...runtime.generation.quantized_cache import LIMIT, SCALE_OF
from ...runtime.inference import open_session, run_session, session_options

_RULE = "cache -> int8"
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)  # of the largest magnitude seen


@dataclasses.dataclass(frozen=True)
class _Cache:
    """One key or value cache: GroupQueryAttention's input ``index``, and the graph output it returns it as."""

    node: ir.Node
    index: int

    @property
    def past(self) -> ir.Value:
        value = self.node.inputs[self.index]
        if value is None:
            raise ValueError(f"{self.node.name} has no cache")
        return value

    @property
    def present(self) -> ir.Value:
        return self.node.outputs[self.index - 2]


@dataclasses.dataclass(frozen=True)
class QuantizeKVCache(Pass):
    """Keeps the key/value cache as int8: 0.25 x of its float32 bytes.

    1. ``GroupQueryAttention(..., past_key, past_value, ...)`` -> the same with int8 caches and constant scales, one per
       head and channel: of ``scale = share * max |x| / 127`` the one of least squared error over the calibration
       samples. Keys are measured as they are cached, after the rotary embedding.

    The inputs ``past_key_values.*`` and outputs ``present.*`` become int8; ``Session.generate`` takes them as they are.
    A new token is rounded once, when it is appended; what is in the cache is never rounded again. Values beyond the
    calibrated range saturate, so calibrate with texts as long and as varied as those to come.

    Refused: caches that anything but one GroupQueryAttention reads, or whose results are used inside the graph.

    Pays in memory everywhere; in speed on the CPU provider for long texts, where reading the cache dominates.

    Source: com.microsoft.GroupQueryAttention-1 (inputs k_scale and v_scale, k_quant_type PER_CHANNEL); on the CPU
    provider from onnxruntime 1.31 on.

    Attributes:
        bits: 8.
    """

    name: ClassVar[str] = "quantize-kv-cache"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    gate: ClassVar[Gate] = "off"
    changes_signature: ClassVar[bool] = True
    bits: Literal[8] = 8

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        caches = self._caches(model, outcome)
        if not caches or outcome.refusals:  # all layers or none: generation keeps one kind of cache
            return outcome
        if next(iter(context.feeds), None) is None:
            raise PassError(
                "An int8 cache needs calibration samples, which give its scales.",
                "Give compile(..., calibration=...) (--calibration): texts as long as those to come.",
            )
        scales = _scales(model, caches, context)
        names = Names(model)
        for cache in caches:
            _to_int8(cache, scales[cache.present.name or ""], names, self.name)
            outcome.counts["caches in int8"] += 1
        return outcome

    def _caches(self, model: ir.Model, outcome: Outcome) -> list[_Cache]:
        found: list[_Cache] = []
        for node in all_nodes(model):
            if not is_op(node, "GroupQueryAttention", domain=MICROSOFT):
                continue
            for index in SCALE_OF:
                past = node.inputs[index] if index < len(node.inputs) else None
                if past is None or past.dtype == ir.DataType.INT8:
                    continue
                reason = ""
                if node.graph is not model.graph:
                    reason = "it lies in the body of an If or Loop"
                elif not past.is_graph_input() or only_consumer(past) is not node:
                    reason = f"{past.name} is no graph input that only it reads"
                elif not node.outputs[index - 2].is_graph_output() or node.outputs[index - 2].uses():
                    reason = f"{node.outputs[index - 2].name} is not only a graph output"
                elif past.dtype != ir.DataType.FLOAT:
                    reason = f"its cache is {past.dtype}, and the kernels take int8 caches beside float32"
                elif attribute(node, "sliding_window_cache", 0):
                    reason = "its cache is a sliding window"
                if reason:
                    outcome.refuse(node, _RULE, reason)
                    continue
                found.append(_Cache(node, index))
        return found


def _scales(model: ir.Model, caches: list[_Cache], context: PassContext) -> dict[str, Array]:
    """Scales [1, heads, 1, size] by the name of the present output: of the ranges tried, the least squared error."""
    names = [cache.present.name or "" for cache in caches]
    largest: dict[str, Array] = {}
    for name, array in _cached(model, names, context, "ranges of the cache"):
        found = np.abs(array).max(axis=(0, 2), keepdims=True, initial=0)
        largest[name] = np.maximum(largest[name], found) if name in largest else found
    for name, found in largest.items():  # a channel that was always 0 may not stay so
        largest[name] = np.maximum(found, max(float(found.max()), 1e-6) * 1e-3)
    errors: dict[str, Array] = {}
    for name, array in _cached(model, names, context, "scales of the cache"):
        added = np.stack([_squared_error(array, largest[name] * share / LIMIT) for share in _SHARES])
        errors[name] = errors[name] + added if name in errors else added
    shares = np.array(_SHARES)
    return {name: (largest[name] * shares[errors[name].argmin(axis=0)] / LIMIT).astype(np.float32) for name in largest}


def _squared_error(array: Array, scale: Array) -> Array:
    codes = np.clip(np.rint(array / scale), -LIMIT - 1, LIMIT)
    return ((array - codes * scale) ** 2).sum(axis=(0, 2), keepdims=True, dtype=np.float64)


def _cached(model: ir.Model, names: list[str], context: PassContext, what: str) -> Iterator[tuple[str, Array]]:
    """The caches of each sample; of tokens only, which lie from slot 0 on, as many as the mask counts; others are 0."""
    session = open_session(model, session_options(threads=context.threads), context.device)
    for number, sample in enumerate(context.feeds):
        context.progress(f"{what}, sample {number + 1}")
        mask = sample.get("attention_mask")
        for name, array in run_session(session, sample, names).items():
            if mask is None or mask.shape[0] != array.shape[0]:
                yield name, array
                continue
            slots = np.arange(array.shape[2]) < np.asarray(mask).sum(axis=1, keepdims=True)
            yield name, np.where(slots[:, None, :, None], array, np.float32(0))


def _to_int8(cache: _Cache, scale: Array, names: Names, by: str) -> None:
    node, key = cache.node, cache.index == 3
    if not isinstance(node.graph, ir.Graph):
        raise ValueError(f"{node.name} is in no graph")
    value = add_initializer(node.graph, names, f"{cache.past.name}_scale", scale)
    index = SCALE_OF[cache.index]
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
    node.attributes["k_quant_type" if key else "v_quant_type"] = ir.AttrString(
        "k_quant_type" if key else "v_quant_type", "PER_CHANNEL"
    )
    node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
    node.metadata_props[PASS_KEY] = by
    for part in (cache.past, cache.present):
        part.type = ir.TensorType(ir.DataType.INT8)
