"""``lathe.compile``: resolves what the user gave (model, pass names, samples) and runs the pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from rich.console import Console

from onnxlathe.compiler.base import Pass, PassContext, no_progress
from onnxlathe.compiler.compiled import Compiled
from onnxlathe.compiler.graph import weight_bytes
from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.compiler.pipeline import OnError, Settings, run_pipeline
from onnxlathe.compiler.report import Report
from onnxlathe.compiler.verify import check_model
from onnxlathe.passes.presets import resolve_passes
from onnxlathe.runtime.artifact import REPORT_KEY, load
from onnxlathe.runtime.capabilities import KernelCosts
from onnxlathe.runtime.environment import environment
from onnxlathe.runtime.errors import ModelError
from onnxlathe.runtime.feeds import FeedSource, Samples, make_feeds
from onnxlathe.runtime.inference import open_session, run_session, session_options
from onnxlathe.runtime.providers import Device
from onnxlathe.runtime.ranges import TensorRange
from onnxlathe.runtime.targets import Target, check_target, device_of, facts

from .reporting import call_text, memory_pictures

if TYPE_CHECKING:
    import torch

Calibration = FeedSource | Report

# What the gate measures when no samples are given: the extremes of what people run, not the tiny shapes of the check.
_TIMED_ENCODER = ({"batch": 1, "sequence": 16}, {"batch": 8, "sequence": 128})
_FIRST = 2  # samples that the checks and the gate look at
_LARGE = 256_000_000  # bytes of weights; every comparison reads all of them
_TIMED_DECODER = (
    {"batch": 1, "sequence": 1, "past_sequence": 128},
    {"batch": 1, "sequence": 128, "past_sequence": 0},
)


def compile(
    model: ir.Model | onnx.ModelProto | str | os.PathLike[str] | torch.nn.Module,
    passes: str | Sequence[str | Pass] = "basic",
    *,
    args: tuple[Any, ...] | None = None,
    target: str = "cpu",
    threads: int = 0,
    calibration: Calibration | None = None,
    tolerance: float | None = None,
    speed_gate: bool | None = None,
    verify: bool = True,
    on_error: OnError = "raise",
    profile: bool = False,
    seed: int = 0,
    progress: bool | Callable[[str], None] = True,
) -> Compiled:
    """Compiles a model.

    Args:
        model: an ``onnx_ir.Model``, a ``ModelProto``, a path, or a ``torch.nn.Module`` with its ``args``. Not changed.
        passes: a preset's name, or pass names and pass values in order.
        args: example inputs, for a torch module.
        target: ``"cpu"``, ``"cuda"`` or ``"auto"``; or ``"web"`` (onnxruntime-web, wasm) and ``"mobile"`` (its full
            packages), for which everything is measured on the CPU here, passes that make nodes they cannot run are left
            out, and a result they cannot run is an error (see ``runtime.targets``).
        threads: intra-op threads of the target, 0 for ONNX Runtime's default.
        calibration: samples for the checks, the gate and calibrating passes: ``{input name: array}`` items, an ``.npz``
            file or a folder of them, or a callable that returns an iterator; they are read one at a time. Or the report
            (``.json``) or artifact (``.onnx``) of an earlier compile, whose calibrated ranges then need no samples.
            None: made from the input types, for the checks and the gate only.
        tolerance: largest relative error of passes that claim equivalence; None: each pass's own (1e-5).
        speed_gate: measure each pass on the target and drop what is slower; None: as the preset says.
        verify: compare the numbers after each pass.
        on_error: ``"raise"``, or ``"skip"`` to leave a failing pass out and say so in the report.
        profile: also measure, for the report, the time of each operator before and after and, of a quantized model,
            the error of each layer.
        seed: seed of the samples and of passes that draw random numbers.
        progress: show what is being done on a terminal; or a function that is told.

    Raises:
        ModelError: the model or the samples cannot be used, or the target cannot run the result.
        PassError: an unknown pass or option, or a pass that failed.
        VerifyError: a pass changed the numbers beyond the tolerance.
        RuntimeUnavailable: the target is not there.
    """
    call = call_text(compile, locals())
    device = device_of(target)
    place: Target = target if target in ("web", "mobile") else device
    steps, preset_gate = resolve_passes(passes)
    graph = to_graph(model, args)
    with progress_sink(progress) as sink, _gc_paused():
        sink("checking the model")
        infer_shapes(graph)
        check_model(graph)
        ranges = _known_ranges(calibration)
        given = None if isinstance(calibration, Report) or ranges is not None else calibration
        feeds = Samples(given, graph.graph.inputs) if given is not None else None
        samples = list(itertools.islice(feeds, _FIRST)) if feeds is not None else make_feeds(graph, seed)
        if not samples:
            raise ModelError("No samples were given.", "Give at least one, or leave calibration out.")
        gate = preset_gate if speed_gate is None else speed_gate
        measured = (samples if feeds is not None else timed_samples(graph, seed, device)) if gate or profile else []
        context = PassContext(
            device=device,
            threads=threads,
            feeds=feeds if feeds is not None else (),
            ranges=ranges or {},
            seed=seed,
            progress=sink,
            costs=KernelCosts.of_machine(device, threads, progress=sink),
        )
        settings = Settings(
            samples=_compared(graph, samples) if verify else [],
            timed=measured if gate else [],
            profiled=measured if profile else [],
            tolerance=tolerance,
            on_error=on_error,
            target=place,
        )
        compiled = run_pipeline(graph, steps, context, settings)
        sink("checking the result")
        check_model(compiled.model)
        if place in ("web", "mobile"):
            check_target(compiled.model, place)
            compiled.report.notes += [f"checked for {place}", *facts(compiled.model, place)]
    compiled.report = dataclasses.replace(
        compiled.report,
        source=str(model) if isinstance(model, (str, os.PathLike)) else type(model).__name__,
        environment={**environment(threads), "call": call},
        pictures=memory_pictures(compiled.model),
    )
    return compiled


def to_graph(model: Any, args: tuple[Any, ...] | None) -> ir.Model:
    """The graph of anything that ``compile`` takes.

    Raises:
        ModelError: it is no model, or a torch module without example inputs.
    """
    if isinstance(model, (ir.Model, onnx.ModelProto, str, os.PathLike)):
        return load_model(model)
    if hasattr(model, "state_dict") and hasattr(model, "forward"):
        if args is None:
            raise ModelError("A torch module needs example inputs.", "Give compile(module, args=(...)).")
        from onnxlathe.compiler.exporting.export import export

        return load_model(export(model, args))
    raise ModelError(
        f"Cannot compile a {type(model).__name__}.", "Give a path, a ModelProto, an onnx_ir.Model or a torch module."
    )


def _known_ranges(calibration: Any) -> dict[str, TensorRange] | None:
    """The ranges in a report or an artifact; None where ``calibration`` is neither."""
    if isinstance(calibration, Report):
        return calibration.known_ranges()
    path = Path(calibration) if isinstance(calibration, (str, os.PathLike)) else Path()
    if path.suffix not in (".onnx", ".json"):
        return None
    try:
        text = path.read_text() if path.suffix == ".json" else load(path).metadata_props.get(REPORT_KEY, "{}")
        ranges = Report.from_dict(json.loads(text)).known_ranges()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} holds no report of onnxlathe ({error}).", "Write it with --json.") from error
    if not ranges:
        raise ModelError(
            f"The report in {path} has no calibrated ranges.", "Give the one of a compile with quantize-static."
        )
    return ranges


def _compared(graph: ir.Model, samples: list[dict[str, np.ndarray[Any, Any]]]) -> list[dict[str, np.ndarray[Any, Any]]]:
    """The samples that numbers are compared on after each pass: two; for large models the last of them only.

    Of the made samples that is the one with two rows, padding and a filled cache.
    """
    return samples[1:2] or samples[:1] if weight_bytes(graph) > _LARGE else samples


def timed_samples(graph: ir.Model, seed: int, device: Device) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Made samples for the speed gate: those of the usual sizes that the model can run, else one of those checked."""
    cached = any("past" in (value.name or "") for value in graph.graph.inputs)
    sizes = _TIMED_DECODER if cached else _TIMED_ENCODER
    samples = [make_feeds(graph, seed, 1, size)[0] for size in sizes]
    if all(samples[0][name].shape == samples[1][name].shape for name in samples[0]):
        samples = samples[:1]  # a model without symbolic dims has one shape
    session = open_session(graph, session_options(optimize=False), device)
    usable: list[dict[str, np.ndarray[Any, Any]]] = []
    for sample in samples:
        with contextlib.suppress(ModelError):  # longer than the model's table of positions, for one
            run_session(session, sample)
            usable.append(sample)
    return usable or make_feeds(graph, seed, 1)


@contextlib.contextmanager
def _gc_paused() -> Generator[None]:
    """Python's cycle collector walks every node of a graph again and again: 40 % of the time at 100k nodes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def progress_sink(wanted: bool | Callable[[str], None]) -> Generator[Callable[[str], None]]:
    """A sink that shows the current step on stderr, if that is a terminal."""
    if callable(wanted):
        yield wanted
        return
    if not wanted or not sys.stderr.isatty():
        yield no_progress
        return
    with Console(stderr=True).status("compiling") as status:
        yield lambda message: status.update(f"onnxlathe: {message}")
