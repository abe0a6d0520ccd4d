"""The one loop: run each pass on a clone, check it, measure it, record it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import onnx_ir as ir

from ..runtime.errors import LatheError, ModelError, PassError, VerifyError
from ..runtime.targets import Target, node_obstacles
from . import verify
from .base import Claim, Feeds, Pass, PassContext
from .compiled import Compiled
from .gate import measure_speed
from .graph import count_ops, weight_bytes
from .kept_caches import KeptCaches
from .report import PassRecord, Report, Speed
from .reporting.compare import compare_graphs
from .reporting.profiling import Side, profile
from .variants import is_quantized

OnError = Literal["raise", "skip"]
_HALF = 4 * 2.0**-10  # four units in the last place of float16


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the loop judges passes.

    Attributes:
        samples: feeds for the numeric comparison; empty: numbers are not compared (and the report says so).
        timed: feeds for the speed gate; empty: no gate.
        profiled: feeds on which the operators are timed and quantized layers compared, for the report; empty: not done.
        tolerance: largest relative error of EXACT passes; None takes each pass's own.
        on_error: ``"raise"`` stops at a failing pass, ``"skip"`` leaves it out and says so.
        target: where the model will run; a pass that makes nodes which ``web`` or ``mobile`` cannot run is left out.
    """

    samples: Sequence[Feeds] = ()
    timed: Sequence[Feeds] = ()
    profiled: Sequence[Feeds] = ()
    tolerance: float | None = None
    on_error: OnError = "raise"
    target: Target = "cpu"


@dataclasses.dataclass
class _State:
    """The last accepted graph with its results and session options.

    ``reference`` is what the original gave, as the passes so far are expected to have changed it.
    ``samples``, ``timed``, ``profiled`` and ``feeds`` are those of the compile as it takes them: a pass may leave out
    caches.
    ``spare`` is a clone of it that a pass left as it was, for the next pass to work on.
    """

    model: ir.Model
    results: verify.Results
    reference: verify.Results
    config: dict[str, Any]
    samples: Sequence[Feeds] = ()
    timed: Sequence[Feeds] = ()
    profiled: Sequence[Feeds] = ()
    feeds: Iterable[Feeds] = ()
    spare: ir.Model | None = None


def run_pipeline(model: ir.Model, passes: Sequence[Pass], context: PassContext, settings: Settings) -> Compiled:
    """Runs ``passes`` in order over a clone of ``model``.

    After each pass that changed something: the structure and the signature are checked, outputs are compared with the
    step before (ORT optimizations off on both sides), and with ``settings.timed`` the speed is measured; what is slower
    beyond the noise is dropped.

    Raises:
        PassError: a pass raised, or broke the graph (``on_error="raise"``).
        VerifyError: an EXACT pass changed the numbers beyond the tolerance (``on_error="raise"``).
    """
    report = Report(ops_before=dict(count_ops(model)), weight_bytes=(weight_bytes(model), 0), device=context.device)
    verify.check_structure(model)
    context.progress("running the original")
    results = _original_results(model, settings)
    original = _State(model, results, results, {}, settings.samples, settings.timed, settings.profiled, context.feeds)
    state = dataclasses.replace(original, model=model.clone())
    context = dataclasses.replace(context, original=model)
    for step in passes:
        context.progress(step.name)
        if not is_quantized(state.model):
            context = dataclasses.replace(context, reference=state.model)
        context = dataclasses.replace(context, feeds=state.feeds)
        record = PassRecord(step.name, options=_options(step))
        report.passes.append(record)
        try:
            state = _run_one(step, state, context, settings, record)
        except LatheError as error:
            if settings.on_error == "raise":
                raise
            state = dataclasses.replace(state, spare=None)
            record.status = "failed"
            record.notes.append(f"left out: {error}")
    report.ops_after = dict(count_ops(state.model))
    report.weight_bytes = (report.weight_bytes[0], weight_bytes(state.model))
    if settings.samples:
        report.error, _ = verify.compare_tokens(state.samples, state.reference, state.results)
    if settings.timed:
        context.progress("measuring the result")
        report.speed = _speed(original, state, context)
    context.progress("comparing the graphs")
    report.graph, report.weights = compare_graphs(model, state.model)
    if settings.profiled:
        sides = [Side(item.model, item.config, item.profiled) for item in (original, state)]
        profile(report, sides[0], sides[1], context)
    sample = dict(state.samples[0]) if state.samples else None
    return Compiled(state.model, report, state.config, sample=sample)


def _original_results(model: ir.Model, settings: Settings) -> verify.Results:
    if not settings.samples:
        return []
    try:
        return verify.run_reference(model, settings.samples)
    except ModelError as error:
        raise ModelError(
            f"The original model does not run on the samples: {error.what}",
            "Give samples that fit it (calibration=..., --calibration x.npz); made ones only follow the input types.",
        ) from error


def _run_one(step: Pass, state: _State, context: PassContext, settings: Settings, record: PassRecord) -> _State:
    """Runs one pass; returns the state after it, or ``state`` itself where nothing was kept."""
    candidate = state.spare if state.spare is not None else state.model.clone()
    state = dataclasses.replace(state, spare=None)
    record.nodes = (_size(state.model), _size(state.model))
    stored = weight_bytes(state.model)
    record.weight_bytes = (stored, stored)
    start = time.perf_counter()
    try:
        outcome = step(candidate, context)
    except LatheError:
        raise
    except Exception as error:
        raise PassError(
            f"The pass {step.name} failed: {type(error).__name__}: {error}.",
            "Leave it out (on_error='skip'), and please report it with the model.",
        ) from error
    record.seconds = time.perf_counter() - start
    record.notes += outcome.notes
    record.refusals = outcome.refusals
    record.ranges = {name: seen.to_list() for name, seen in outcome.ranges.items()}
    if not outcome.changed:
        return dataclasses.replace(state, spare=candidate)
    record.counts = dict(outcome.counts)
    if lost := _lost(state.model, candidate, settings.target):
        record.status = "dropped"
        record.notes.append(f"left out, as {settings.target} cannot run what it makes: {lost}")
        return state
    config = _merge(state.config, outcome.ort_config)
    if (kept := KeptCaches.take(candidate)) is not None:
        state = _adapted(state, kept, candidate)
    results = _check(step, state, candidate, settings, record)
    reference = [step.expected(result) for result in state.reference]
    new = dataclasses.replace(state, model=candidate, results=results, reference=reference, config=config)
    if settings.timed and step.gate != "off":
        record.speed = speed = _speed(state, new, context)
        if speed.ratio < (1.0 if step.gate == "faster" else 1.0 - speed.noise):
            record.status = "dropped"
            measured = ", ".join(f"{ratio:.2f} x at {shape}" for shape, ratio in speed.samples.items())
            record.notes.append(f"left out, as it does not pay here: {measured} (noise {speed.noise:.0%})")
            return state
    record.status = "applied"
    record.nodes = (record.nodes[0], _size(candidate))
    record.weight_bytes = (record.weight_bytes[0], weight_bytes(candidate))
    return new


def _lost(before: ir.Model, after: ir.Model, target: Target) -> str:
    """The operators of ``after`` that ``target`` cannot run, if ``before`` had none of them; else empty."""
    if target not in ("web", "mobile"):
        return ""
    known = {(item.what, item.reason) for item in node_obstacles(before, target)}
    fresh = {(item.what, item.reason) for item in node_obstacles(after, target)} - known
    return ", ".join(f"{what} ({reason})" for what, reason in sorted(fresh))


def _adapted(state: _State, kept: KeptCaches, candidate: ir.Model) -> _State:
    """``state`` with samples and results as ``candidate`` takes and gives them."""
    samples, timed, profiled, results, reference = (
        [kept.of(arrays, candidate) for arrays in items]
        for items in (state.samples, state.timed, state.profiled, state.results, state.reference)
    )
    feeds = kept.samples(state.feeds, candidate) if state.feeds != () else ()
    return dataclasses.replace(
        state, samples=samples, timed=timed, profiled=profiled, results=results, reference=reference, feeds=feeds
    )


def _check(step: Pass, state: _State, candidate: ir.Model, settings: Settings, record: PassRecord) -> verify.Results:
    """Structure, signature and numbers of ``candidate`` against the state before."""
    try:
        verify.check_structure(candidate)
        if not step.changes_signature:
            verify.Signature.of(state.model).check_kept(verify.Signature.of(candidate))
    except VerifyError as error:
        raise PassError(f"The pass {step.name} left a malformed graph: {error}", "Please report it.") from error
    if not settings.samples:
        return []
    results = verify.run_reference(candidate, state.samples)
    expected = [step.expected(result) for result in state.results]
    if step.claims is Claim.EXACT:
        record.error, output = verify.compare(expected, results)
    else:
        record.error, output = verify.compare_tokens(state.samples, expected, results)
    tolerance = settings.tolerance if settings.tolerance is not None else _allowed(step, state.model)
    if step.claims is Claim.EXACT and record.error > tolerance:
        found = verify.first_difference(state.model, candidate, settings.samples, tolerance)
        where = f"; it starts at {found[0]} (error {found[1]:.1e})" if found else ""
        raise VerifyError(
            f"The pass {step.name} changed the output {output!r} by {record.error:.1e} "
            f"(allowed {tolerance:.0e}){where}.",
            "Leave it out (on_error='skip') or, if the change is acceptable, raise tolerance.",
        )
    return results


def _allowed(step: Pass, model: ir.Model) -> float:
    """The pass's tolerance, in graphs that compute with half precision at least a few of its units.

    The CPU provider computes those operators in float32 and rounds only where a value leaves such a chain, so that a
    graph in which one of them is folded, fused or shared rounds elsewhere.
    """
    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    half = any(value.dtype in halves for graph in model.graphs() for node in graph for value in node.outputs)
    return max(step.tolerance, _HALF) if half else step.tolerance


def _speed(before: _State, after: _State, context: PassContext) -> Speed:
    return measure_speed(
        before.model,
        after.model,
        before.timed,
        feeds_after=after.timed,
        device=context.device,
        threads=context.threads,
        config_before=before.config,
        config_after=after.config,
    )


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Session options of two passes together; lists of disabled optimizers are united."""
    merged = {**old, **new}
    entries = {**old.get("config_entries", {}), **new.get("config_entries", {})}
    key = "optimization.disable_specified_optimizers"
    names = [config.get("config_entries", {}).get(key, "") for config in (old, new)]
    united = list(dict.fromkeys(name for text in names for name in text.split(";") if name))
    if united:
        entries[key] = ";".join(united)
    if entries:
        merged["config_entries"] = entries
    return merged


def _size(model: ir.Model) -> int:
    return sum(graph.num_nodes() for graph in model.graphs())


def _options(step: Pass) -> str:
    return ", ".join(f"{field.name}={getattr(step, field.name)!r}" for field in dataclasses.fields(step) if field.repr)
