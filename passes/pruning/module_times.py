"""How long parts of a model take, measured in ONNX Runtime on this machine."""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnx_ir as ir

from ...compiler.base import Feeds, PassContext
from ...compiler.kept_caches import KeptCaches
from ...runtime.benchmark import interleaved, paired_ratio
from ...runtime.inference import open_session, run_session, session_options

_SECONDS = 0.8


def relative_time(model: ir.Model, other: ir.Model, sample: Feeds, context: PassContext) -> float:
    """Time of ``other`` over time of ``model`` on one sample, measured in turns with ORT's default optimizations.

    Args:
        model: a model.
        other: the same without some of its parts; what that did to its caches is in its metadata.
        sample: inputs of ``model``.
        context: device and threads.
    """
    kept = KeptCaches.take(other)
    runs: list[Callable[[], object]] = []
    for item, inputs in ((model, sample), (other, kept.of(sample, other) if kept is not None else sample)):
        session = open_session(item, session_options(threads=context.threads), context.device)
        known = {value.name for value in session.get_inputs()}
        feeds = {name: array for name, array in inputs.items() if name in known}
        run_session(session, feeds)  # what fails here is said as a ModelError
        runs.append(functools.partial(session.run, None, feeds))
    first, second = interleaved(runs, budget=_SECONDS)
    return paired_ratio(second, first)[0]
