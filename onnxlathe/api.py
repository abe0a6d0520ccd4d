"""``lathe.compile``: resolves what the user gave (model, pass names, samples) and runs the pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from rich.console import Console

from onnxlathe.compiler.base import Pass, PassContext, no_progress
from onnxlathe.compiler.graph import weight_bytes
from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.compiler.pipeline import Compiled, OnError, Settings, run_pipeline
from onnxlathe.compiler.verify import check_model
from onnxlathe.passes.presets import resolve_passes
from onnxlathe.runtime.capabilities import KernelCosts
from onnxlathe.runtime.environment import environment
from onnxlathe.runtime.errors import ModelError
from onnxlathe.runtime.feeds import check_feeds, load_feeds, make_feeds
from onnxlathe.runtime.inference import open_session, run_session, session_options
from onnxlathe.runtime.providers import Device, resolve_device

if TYPE_CHECKING:
    import torch

Samples = Iterable[Mapping[str, np.ndarray[Any, Any]]] | str | os.PathLike[str]

# What the gate measures when no samples are given: the extremes of what people run, not the tiny shapes of the check.
_TIMED_ENCODER = ({"batch": 1, "sequence": 16}, {"batch": 8, "sequence": 128})
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
    calibration: Samples | None = None,
    tolerance: float | None = None,
    speed_gate: bool | None = None,
    verify: bool = True,
    on_error: OnError = "raise",
    seed: int = 0,
    progress: bool = True,
) -> Compiled:
    """Compiles a model.

    Args:
        model: an ``onnx_ir.Model``, a ``ModelProto``, a path, or a ``torch.nn.Module`` with its ``args``. Not changed.
        passes: a preset's name, or pass names and pass values in order.
        args: example inputs, for a torch module.
        target: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        threads: intra-op threads of the target, 0 for ONNX Runtime's default.
        calibration: samples for the checks, the gate and calibrating passes; None: made from the input types.
        tolerance: largest relative error of passes that claim equivalence; None: each pass's own (1e-5).
        speed_gate: measure each pass on the target and drop what is slower; None: as the preset says.
        verify: compare the numbers after each pass.
        on_error: ``"raise"``, or ``"skip"`` to leave a failing pass out and say so in the report.
        seed: seed of the samples and of passes that draw random numbers.
        progress: show what is being done on a terminal.

    Raises:
        ModelError: the model or the samples cannot be used.
        PassError: an unknown pass or option, or a pass that failed.
        VerifyError: a pass changed the numbers beyond the tolerance.
        RuntimeUnavailable: the target is not there.
    """
    device = resolve_device(target)
    steps, preset_gate = resolve_passes(passes)
    graph = _to_graph(model, args)
    with _progress(progress) as sink, _gc_paused():
        sink("checking the model")
        infer_shapes(graph)
        check_model(graph)
        samples = _samples(graph, calibration, seed)
        gate = preset_gate if speed_gate is None else speed_gate
        timed = (samples[:2] if calibration is not None else _timed(graph, seed, device)) if gate else []
        context = PassContext(
            device=device,
            threads=threads,
            feeds=samples if calibration is not None else (),
            seed=seed,
            progress=sink,
            costs=KernelCosts.of_machine(device, threads, progress=sink),
        )
        settings = Settings(_compared(graph, samples) if verify else [], timed, tolerance, on_error)
        compiled = run_pipeline(graph, steps, context, settings)
        sink("checking the result")
        check_model(compiled.model)
    compiled.report = dataclasses.replace(
        compiled.report,
        source=str(model) if isinstance(model, (str, os.PathLike)) else type(model).__name__,
        environment=environment(threads),
    )
    return compiled


def _to_graph(model: Any, args: tuple[Any, ...] | None) -> ir.Model:
    if isinstance(model, (ir.Model, onnx.ModelProto, str, os.PathLike)):
        return load_model(model)
    if hasattr(model, "state_dict") and hasattr(model, "forward"):
        if args is None:
            raise ModelError("A torch module needs example inputs.", "Give compile(module, args=(...)).")
        from onnxlathe.compiler.export import export

        return load_model(export(model, args))
    raise ModelError(
        f"Cannot compile a {type(model).__name__}.", "Give a path, a ModelProto, an onnx_ir.Model or a torch module."
    )


def _samples(graph: ir.Model, calibration: Samples | None, seed: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    if calibration is None:
        return make_feeds(graph, seed)
    samples = load_feeds(calibration)
    if not samples:
        raise ModelError("No samples were given.", "Give at least one, or leave calibration out.")
    for number, sample in enumerate(samples):
        check_feeds(graph.graph.inputs, sample, f"sample {number}")
    return samples


def _compared(graph: ir.Model, samples: list[dict[str, np.ndarray[Any, Any]]]) -> list[dict[str, np.ndarray[Any, Any]]]:
    """The samples that numbers are compared on after each pass: two; for large models the last of them only.

    Of the made samples that is the one with two rows, padding and a filled cache.
    """
    return samples[1:2] or samples[:1] if weight_bytes(graph) > _LARGE else samples[:2]


def _timed(graph: ir.Model, seed: int, device: Device) -> list[dict[str, np.ndarray[Any, Any]]]:
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
def _progress(wanted: bool) -> Generator[Callable[[str], None]]:
    """A sink that shows the current step on stderr, if that is a terminal."""
    if not wanted or not sys.stderr.isatty():
        yield no_progress
        return
    with Console(stderr=True).status("compiling") as status:
        yield lambda message: status.update(f"onnxlathe: {message}")
