"""What the report measures on demand: where the time goes, and where the error of a quantized model comes from."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from ...runtime.errors import ModelError
from ...runtime.node_profile import profile_in_turns
from ..analyze import analyze
from ..base import Feeds, PassContext
from ..gate import shape_of
from ..padding import without_padding
from ..report import Report
from ..variants import is_quantized
from .records import Latency, NodeTime

_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Side:
    """A version of a model.

    Attributes:
        model: the graph.
        config: session options that it wants.
        samples: feeds as it takes them.
    """

    model: ir.Model
    config: Mapping[str, Any]
    samples: Sequence[Feeds]


def profile(report: Report, before: Side, after: Side, context: PassContext) -> None:
    """Adds to ``report`` the time of each operator, for each sample, and the errors of quantized layers.

    Layers are compared with ``context.reference``, the last graph in which nothing was quantized, where samples have no
    padding: what is computed there is arbitrary.

    Raises:
        ModelError: a model does not run on its samples.
    """
    for old, new in zip(before.samples, after.samples, strict=True):
        context.progress("timing the operators")
        report.latency.append(_latency(before, after, old, new, context))
    if not is_quantized(after.model) or context.reference is None or is_quantized(context.reference):
        return
    samples = [without_padding(sample) for sample in after.samples]
    try:
        found = analyze(context.reference, after.model, samples, threads=context.threads, progress=context.progress)
        report.analysis = found.to_dict()
    except ModelError as error:
        report.notes.append(f"the quantized layers were not compared: {error.what}")


def _latency(before: Side, after: Side, old: Feeds, new: Feeds, context: PassContext) -> Latency:
    """Both versions in turns, with ORT's default optimizations plus what each asks for."""
    sides = profile_in_turns(
        [before.model, after.model],
        [before.config, after.config],
        [old, new],
        device=context.device,
        threads=context.threads,
    )
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for index, side in enumerate(sides):
        for (_, op), seconds in side.items():
            total[op][index] += seconds
    ops = {op: (a, b) for op, (a, b) in sorted(total.items(), key=lambda item: -max(item[1]))}
    return Latency(shape_of(old), ops, (_slowest(sides[0]), _slowest(sides[1])))


def _slowest(side: Mapping[tuple[str, str], float]) -> list[NodeTime]:
    ranked = sorted(side.items(), key=lambda item: -item[1])
    return [NodeTime(name, op, seconds) for (name, op), seconds in ranked[:_SHOWN]]
