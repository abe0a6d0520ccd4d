"""How far the output of a changed model is from the original's, in one number."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from ...compiler.base import Feeds, PassContext
from ...runtime.errors import ModelError
from ...runtime.feeds import make_feeds
from ...runtime.inference import open_session, run_session, session_options
from ...runtime.providers import Device
from .streams import PATIENT, token_rows

_MOST_NUMBERS = 1 << 24  # of the reference's outputs that are kept
_EFFECT_SAMPLES = 8
_ROWS = 256  # compared at a time: rows of logits are long


class OutputEffect:
    """Compares models with one original on the same samples.

    For an output called logits the figure is the mean Kullback-Leibler divergence ``KL(original || changed)`` in nats
    per token; for others ``sum (y - y')^2 / sum y^2`` of the first float output. Padding does not count.

    Args:
        model: the original.
        feeds: samples; of large outputs only the first are used.
        device: where to run.
        threads: intra-op threads, 0 for ONNX Runtime's default.

    Raises:
        ModelError: no float output, or the model does not run.
    """

    def __init__(self, model: ir.Model, feeds: Iterable[Feeds], device: Device = "cpu", threads: int = 0) -> None:
        self._device: Device = device
        self._threads = threads
        self.output, self.is_logits = _compared_output(model)
        self._samples: list[tuple[Feeds, np.ndarray]] = []
        options = session_options(threads=threads, optimize=False, repack=False, ort_config=PATIENT)
        session = open_session(model, options, device)
        room = _MOST_NUMBERS
        for sample in feeds:
            rows = self._rows(run_session(session, sample, [self.output])[self.output], sample)
            if room < rows.size and self._samples:
                break
            room -= rows.size
            self._samples.append((sample, rows))

    def __call__(self, model: ir.Model, entries: Mapping[str, str] | None = None) -> float:
        """The figure for ``model``, run with the session options ``entries``; infinite where it is not a number."""
        config = {"config_entries": {**PATIENT["config_entries"], **(entries or {})}, "memory_arena": False}
        session = open_session(model, session_options(threads=self._threads, ort_config=config), self._device)
        return self.of_outputs(run_session(session, sample, [self.output])[self.output] for sample in self.samples)

    @property
    def samples(self) -> list[Feeds]:
        """The samples that count."""
        return [sample for sample, _ in self._samples]

    def of_outputs(self, outputs: Iterable[np.ndarray]) -> float:
        """The figure for outputs computed elsewhere, one for each of ``samples``."""
        total = weight = 0.0
        for (sample, expected), output in zip(self._samples, outputs, strict=True):
            found = token_rows(output, sample)
            for start in range(0, len(expected), _ROWS):
                part, rows = expected[start : start + _ROWS], found[start : start + _ROWS]
                if self.is_logits:
                    total += float((np.exp(part) * (part - _logarithms(rows))).sum(dtype=np.float64))
                    weight += len(rows)
                else:
                    total += float(((part - rows) ** 2).sum(dtype=np.float64))
                    weight += float((part**2).sum(dtype=np.float64))
        figure = total / max(weight, 1e-30)
        return figure if np.isfinite(figure) else float("inf")

    def _rows(self, output: np.ndarray, sample: Feeds) -> np.ndarray:
        """The output's rows; of logits their logarithmic softmax."""
        rows = token_rows(output, sample)
        if not self.is_logits:
            return rows
        found = np.empty_like(rows)
        for start in range(0, len(rows), _ROWS):
            found[start : start + _ROWS] = _logarithms(rows[start : start + _ROWS])
        return found


class Swap:
    """The effect of a model with weights that differ from call to call, in one session.

    The weights are inputs of that session, so that nothing is loaded or packed again.

    Args:
        model: the original.
        weights: those of its main graph's initializers that may differ.
        effect: what is measured, on the same original.
        threads: intra-op threads, 0 for ONNX Runtime's default.
    """

    def __init__(self, model: ir.Model, weights: Iterable[ir.Value], effect: OutputEffect, threads: int = 0) -> None:
        self._effect = effect
        self._arrays: dict[str, np.ndarray] = {}
        open_model = model.clone()
        for weight in weights:
            tensor, name = weight.const_value, weight.name or ""
            if tensor is None:
                continue
            self._arrays[name] = np.asarray(tensor.numpy())
            value = open_model.graph.initializers.pop(name)
            value.const_value = None
            open_model.graph.inputs.append(value)
        self._session = open_session(open_model, session_options(threads=threads, ort_config=PATIENT))

    def __call__(self, changes: Mapping[str, np.ndarray]) -> float:
        """The effect with ``changes`` (name -> array) in place of the original's weights."""
        arrays = {**self._arrays, **changes}
        return self._effect.of_outputs(
            run_session(self._session, {**sample, **arrays}, [self._effect.output])[self._effect.output]
            for sample in self._effect.samples
        )


def _logarithms(rows: np.ndarray) -> np.ndarray:
    """The logarithmic softmax of each row."""
    rows = rows - rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))


def effect_samples(model: ir.Model, context: PassContext, count: int = _EFFECT_SAMPLES) -> list[Feeds]:
    """The samples on which effects are measured: the first ``count`` given, else made ones."""
    samples = list(itertools.islice(context.feeds, count))
    return samples or make_feeds(model, context.seed)


def _compared_output(model: ir.Model) -> tuple[str, bool]:
    floats = [v for v in model.graph.outputs if v.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)]
    if not floats:
        raise ModelError("The model has no float output to compare.", "Choose fixed bits and accuracy_level instead.")
    logits = [value for value in floats if "logit" in (value.name or "").lower()]
    return (logits or floats)[0].name or "", bool(logits)
