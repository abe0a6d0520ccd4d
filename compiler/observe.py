"""Runs samples through a model and hands out values inside it, one sample at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..runtime.inference import open_session, run_session, session_options
from .graph import with_outputs

Array = np.ndarray[Any, Any]


def observe(model: ir.Model, names: Sequence[str], feeds: Iterable[Mapping[str, Array]]) -> Iterator[dict[str, Array]]:
    """The values called ``names`` for each sample, with ORT's own optimizations off.

    Memory holds the values of one sample. Nodes that none of the values needs are not run.

    Args:
        model: the model; it is not changed.
        names: values of the main graph: made by nodes, or inputs.
        feeds: samples.

    Raises:
        ModelError: the model does not run on a sample.
    """
    inputs = {value.name for value in model.graph.inputs}
    made = [name for name in dict.fromkeys(names) if name not in inputs]
    session = None
    if made:
        session = open_session(with_outputs(model, made, only=True), session_options(optimize=False, repack=False))
    for sample in feeds:
        values = run_session(session, sample, made) if session is not None else {}
        yield {**{name: np.asarray(sample[name]) for name in names if name in inputs}, **values}
