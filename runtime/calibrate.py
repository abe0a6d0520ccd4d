"""Streaming calibration: runs a model on samples and hands intermediate values to observers, one sample at a time.

Memory does not grow with the number of samples: an observer reduces what it sees at once (``runtime/ranges.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from .errors import ModelError
from .generation.causal_lm import MASK
from .inference import expose, open_session, run_session, session_options
from .providers import Device
from .quantization import QuantSpec
from .ranges import Histogram, MinMax, RangeMethod, TensorRange, choose_range

Array = np.ndarray[Any, Any]
_TOGETHER = 256  # values exposed in one session; more of them are run in batches


class Observer(Protocol):
    """Takes in a tensor of every sample and keeps what it needs of it."""

    def update(self, array: Array) -> None:
        """Called once a sample, in the order of the samples."""
        ...


def observe(
    model: ir.Model,
    observers: Mapping[str, Observer],
    feeds: Iterable[Mapping[str, Array]],
    *,
    device: Device = "cpu",
    threads: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> int:
    """Runs ``model`` once on every sample, with ORT's own optimizations off, and shows its values to ``observers``.

    Args:
        model: the graph; not changed.
        observers: value name -> observer. Values inside the bodies of If, Loop and Scan cannot be observed. Of values
            that have the axes of an input ``attention_mask``, [batch, sequence, ...], padded positions are left out:
            the observer gets [tokens, ...]. What is computed there is nobody's business, and often extreme.
        feeds: samples, read one at a time and once.
        device: where to run.
        threads: intra-op threads, 0 for ONNX Runtime's default.
        progress: told how many samples are done.

    Returns:
        The number of samples.

    Raises:
        ModelError: there is no such value, there are no samples, or a value is NaN or infinite (named with its sample).
    """
    names = list(observers)
    inputs = {value.name for value in model.graph.inputs}
    computed = [name for name in names if name not in inputs]
    groups = [computed[start : start + _TOGETHER] for start in range(0, len(computed), _TOGETHER)]
    options = [session_options(threads=threads, optimize=False) for _ in groups]
    sessions = [
        open_session(expose(model, group), option, device) for group, option in zip(groups, options, strict=True)
    ]
    padded = _padded_values(model)
    count = 0
    for sample in feeds:
        progress(f"calibrating: sample {count + 1}")
        tokens = np.asarray(sample[MASK], bool) if padded else None
        for session, group in zip(
            [None, *sessions], [[name for name in names if name in inputs], *groups], strict=True
        ):
            arrays = sample if session is None else run_session(session, sample, group)
            for name in group:
                array = np.asarray(arrays[name])
                _show(observers[name], name, array[tokens] if name in padded else array, count)
        count += 1
    if not count:
        raise ModelError("There are no calibration samples.", "Give some (calibration=..., --calibration x.npz).")
    return count


def _padded_values(model: ir.Model) -> set[str]:
    """Names of the values whose first two axes are those of ``attention_mask``, by their symbolic sizes."""
    mask = next((value for value in model.graph.inputs if value.name == MASK), None)
    axes = mask.shape[:2] if mask is not None and mask.shape is not None and len(mask.shape) == 2 else ()
    if len(axes) != 2 or not all(isinstance(axis, ir.SymbolicDim) and axis.value for axis in axes):
        return set()
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return {value.name or "" for value in values if value.shape is not None and tuple(value.shape[:2]) == tuple(axes)}


def _show(observer: Observer, name: str, array: Array, sample: int) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        kind = "NaN" if np.isnan(array).any() else "infinite"
        raise ModelError(
            f"The value {name!r} is {kind} on calibration sample {sample}.",
            "Quantization needs finite ranges: leave out that sample, or the nodes around it (exclude=...).",
        )
    observer.update(array)


def collect_ranges(
    model: ir.Model,
    specs: Mapping[str, QuantSpec],
    feeds: Iterable[Mapping[str, Array]],
    *,
    method: RangeMethod = "minmax",
    percentile: float = 99.99,
    device: Device = "cpu",
    threads: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, TensorRange]:
    """The ranges of all values in ``specs``, from one run over the samples; arguments as in ``observe``."""
    seen = {name: MinMax() if method == "minmax" else Histogram() for name in specs}
    observe(model, seen, feeds, device=device, threads=threads, progress=progress)
    return {name: choose_range(seen[name], method, spec, percentile) for name, spec in specs.items()}
