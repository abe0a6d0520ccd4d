"""How long parts of a model take, measured in ONNX Runtime on this machine."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from ...compiler.base import Feeds, PassContext
from ...runtime.benchmark import interleaved, paired_ratio
from ...runtime.inference import open_session, run_session, session_options

_SECONDS = 0.8


def relative_time(
    model: ir.Model, other: ir.Model, sample: Feeds, context: PassContext, config: Mapping[str, Any] | None = None
) -> float:
    """Time of ``other`` over time of ``model`` on one sample, measured in turns with ORT's default optimizations."""
    sessions = [
        open_session(item, session_options(threads=context.threads, ort_config=config), context.device)
        for item in (model, other)
    ]
    for session in sessions:
        run_session(session, sample)  # what fails here is said as a ModelError
    first, second = interleaved(
        [functools.partial(session.run, None, dict(sample)) for session in sessions], budget=_SECONDS
    )
    return paired_ratio(second, first)[0]
