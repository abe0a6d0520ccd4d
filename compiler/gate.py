"""The speed gate: is the rewritten graph faster where it will run? Measured, interleaved, with the noise said."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..runtime.benchmark import interleaved, paired_ratio
from ..runtime.inference import open_session, run_session, session_options
from ..runtime.providers import Device
from .report import Speed

_LEAST_NOISE = 0.02


def measure_speed(
    before: ir.Model,
    after: ir.Model,
    feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]],
    *,
    device: Device,
    threads: int,
    config_before: Mapping[str, Any],
    config_after: Mapping[str, Any],
    budget: float = 2.0,
    feeds_after: Sequence[Mapping[str, np.ndarray[Any, Any]]] | None = None,
) -> Speed:
    """Times two versions of a model with ORT's default optimizations plus what each version asks for.

    Args:
        before: reference graph.
        after: rewritten graph.
        feeds: samples; each is measured by itself.
        device: execution provider.
        threads: intra-op threads, 0 for ORT's default.
        config_before: session options the reference wants.
        config_after: session options the rewritten graph wants.
        budget: seconds per sample.
        feeds_after: the samples as the rewritten graph takes them, where that is different.

    Returns:
        The worst ratio over the samples, and all of them by shape.
    """
    sessions = [
        open_session(model, session_options(threads=threads, ort_config=config), device)
        for model, config in ((before, config_before), (after, config_after))
    ]
    ratios: dict[str, float] = {}
    noise = _LEAST_NOISE
    for sample, adapted in zip(feeds, feeds if feeds_after is None else feeds_after, strict=True):
        both = list(zip(sessions, (sample, adapted), strict=True))
        for session, inputs in both:
            run_session(session, inputs)  # what fails here is said as a ModelError
        runs = [functools.partial(session.run, None, dict(inputs)) for session, inputs in both]
        old, new = interleaved(runs, budget=budget)
        ratios[shape_of(sample)], spread = paired_ratio(old, new)
        noise = max(noise, spread)
    return Speed(min(ratios.values(), default=1.0), noise, ratios)


def shape_of(sample: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """A short label of a sample: the shape of its first input."""
    return str(tuple(next(iter(sample.values())).shape)).replace(" ", "") if sample else "()"
