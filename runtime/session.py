"""``Session``: an artifact, or any ONNX model, on a device."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from .artifact import load, read_config
from .assignment import LAYER_KEY, RECORD_OPTION, Misplaced, misplaced
from .benchmark import Timing, interleaved
from .errors import ModelError
from .feeds import check_feeds
from .generation.causal_lm import CausalLM, read_causal_lm
from .generation.generate import Runnable
from .generation.generates import Generates
from .generation.prefix_cache import PrefixCache
from .huge_pages import huge_pages
from .inference import open_session, run_session, session_options
from .memory import BufferPool, PoolUse, SharedWeights
from .providers import Device, resolve_device

Array = np.ndarray[Any, Any]


class Session(Generates):
    """Runs a model: a dict of arrays in, a dict of arrays out.

    Args:
        source: path of a ``.onnx`` file, or an ``onnx_ir.Model``.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``; ``.device`` says what was taken. CUDA that is not there is an
            error, never a silent fallback.
        threads: intra-op threads, 0 for ONNX Runtime's default.
        ort_config: session options; None takes those stored in the artifact.
        profile: write an ONNX Runtime profile, read by ``profile()``.
        weights: weights that other sessions of the same model use too.
        prefix_cache: bytes of keys and values that ``generate`` keeps, so that a prompt that begins like an earlier
            text does not compute that part again; ``prefixes.use`` shows what it is worth. 0: none.

    Attributes:
        misplaced: nodes that are not on the device that ``partition-devices`` placed them on.

    Raises:
        RuntimeUnavailable: the device asked for cannot run here.
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | ir.Model,
        device: str = "cpu",
        threads: int = 0,
        *,
        ort_config: Mapping[str, Any] | None = None,
        profile: bool = False,
        weights: SharedWeights | None = None,
        prefix_cache: int = 0,
    ) -> None:
        self.prefixes = PrefixCache(prefix_cache) if prefix_cache else None
        self.device: Device = resolve_device(device)
        model = source if isinstance(source, ir.Model) else load(source)
        self.metadata = dict(model.metadata_props)
        self.inputs: Sequence[ir.Value] = [v for v in model.graph.inputs if not v.is_initializer()]
        self._causal_lm = _causal_lm_or_error(model)
        config = read_config(self.metadata) if ort_config is None else ort_config
        options = session_options(threads=threads, ort_config=config)
        placed = any(LAYER_KEY in node.metadata_props for node in model.graph)
        if placed:
            options.add_session_config_entry(RECORD_OPTION, "1")
        options.enable_profiling = profile
        if profile:
            options.profile_file_prefix = str(Path(os.environ.get("TMPDIR", "/tmp")) / "onnxlathe-profile")
        self._weights = weights
        if weights is not None:
            weights.apply(options)
        self._buffers = BufferPool()
        self._shapes: dict[tuple[Any, ...], dict[str, tuple[tuple[int, ...], np.dtype[Any]]]] = {}
        # A file is opened by its path, so that ORT maps external weights itself and plain ORT behaves the same.
        with huge_pages(self.device == "cpu"):
            self._session = open_session(source, options, self.device)
        self._profiling = profile
        self.misplaced: list[Misplaced] = misplaced(model, self._session) if placed else []

    @property
    def ort(self) -> ort.InferenceSession:
        """The raw onnxruntime session."""
        return self._session

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Runs the model once.

        Args:
            inputs: ``{input name: array}`` with the dtypes and shapes the model declares.
            outputs: names of the outputs wanted; None for all.

        Raises:
            ModelError: wrong names, dtypes or shapes, or a failure inside ONNX Runtime.
        """
        self._check(inputs, outputs)
        return run_session(self._session, inputs, list(outputs) if outputs is not None else None)

    def run_bound(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Runs the model and writes results straight into preallocated arrays; allocates no output.

        Args:
            inputs: as in ``run``.
            outputs: ``{output name: C-contiguous array of the right dtype and shape}``, filled in place.

        Raises:
            ModelError: wrong names, dtypes or shapes.
        """
        self._check(inputs, list(outputs))
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, array in outputs.items():
            if not array.flags.c_contiguous:
                raise ModelError(f"The array for output {name!r} is not C-contiguous.", "Allocate it with numpy.empty.")
            binding.bind_output(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ORT's exception classes are not public
            raise ModelError(
                f"ONNX Runtime failed while running the model: {str(error).splitlines()[0]}",
                "Check that the output arrays have the shapes the model produces for these inputs.",
            ) from error

    def _generator(self) -> tuple[Runnable, CausalLM]:
        if isinstance(self._causal_lm, ModelError):
            raise self._causal_lm
        return self._session, self._causal_lm

    def run_pooled(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Like ``run``, with outputs in buffers that are used again as soon as their arrays are gone.

        From the second run with the same input shapes on nothing is allocated for outputs; ``memory()`` shows it.
        Outputs whose shape depends on the data cannot be bound: such a model runs as with ``run``.

        Raises:
            ModelError: as ``run``.
        """
        self._check(inputs, None)
        key = tuple((name, inputs[name].shape) for name in sorted(inputs))
        known = self._shapes.get(key)
        if known is None:
            results = run_session(self._session, inputs)
            self._shapes[key] = {name: (array.shape, array.dtype) for name, array in results.items()}
            return results
        if any(dtype.kind not in "fiub" or 0 in shape for shape, dtype in known.values()):
            return run_session(self._session, inputs)
        outputs = {name: self._buffers.empty(shape, dtype) for name, (shape, dtype) in known.items()}
        try:
            self.run_bound(inputs, outputs)
        except ModelError:  # another shape than the last time: it depends on the data
            return run_session(self._session, inputs)
        return outputs

    def memory(self) -> PoolUse:
        """What the buffers of ``run_pooled`` and ``generate`` did: hits, misses, bytes held, fragmentation, peak."""
        return self._buffers.use

    def shrink(self) -> int:
        """Frees pooled buffers that nobody uses; returns how many bytes."""
        return self._buffers.shrink()

    def benchmark(self, inputs: Mapping[str, Array], seconds: float = 2.0) -> Timing:
        """Median time of a run on this device, and its noise.

        Args:
            inputs: one sample.
            seconds: about how long to measure.
        """
        self._check(inputs, None)
        return interleaved([functools.partial(self._session.run, None, dict(inputs))], budget=seconds)[0]

    def profile(self) -> dict[str, float]:
        """Ends profiling and returns microseconds by operator type, largest first. Once per session.

        Raises:
            ModelError: the session was opened without ``profile=True``.
        """
        if not self._profiling:
            raise ModelError("This session does not profile.", "Open it with Session(..., profile=True).")
        path = Path(self._session.end_profiling())
        events = json.loads(path.read_text())
        path.unlink()
        self._profiling = False
        total: dict[str, float] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                op = event["args"]["op_name"]
                total[op] = total.get(op, 0.0) + event["dur"]
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def _check(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None) -> None:
        check_feeds(self.inputs, inputs, "the inputs of run()")
        unknown = [name for name in outputs or [] if name not in self.outputs]
        if unknown:
            raise ModelError(f"The model has no output {unknown}.", f"Its outputs are: {', '.join(self.outputs)}.")


def _causal_lm_or_error(model: ir.Model) -> CausalLM | ModelError:
    """What ``generate`` runs, or why it cannot; only ``generate`` minds."""
    try:
        return read_causal_lm(model)
    except ModelError as error:
        return error
