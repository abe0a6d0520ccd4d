"""``lathe.analyze`` and what ``onnxlathe analyze`` prints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxlathe.compiler.analysis import Analysis
from onnxlathe.compiler.analyze import analyze as analyze_graphs
from onnxlathe.compiler.base import no_progress
from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.runtime.feeds import check_feeds, load_feeds, make_feeds

Source = ir.Model | onnx.ModelProto | str | os.PathLike[str]
Samples = Iterable[Mapping[str, np.ndarray[Any, Any]]] | str | os.PathLike[str]


def analyze(
    float_model: Source,
    quantized_model: Source,
    feeds: Samples | None = None,
    *,
    threads: int = 0,
    effects: int = 1,
    progress: Callable[[str], None] = no_progress,
) -> Analysis:
    """Says where the error of a quantized model comes from, layer by layer.

    Layers are matched by the names of the values that both graphs make. Each is run on the float graph's inputs (local
    error), inside the quantized graph (cumulative error), with only its weights or only its activations quantized, and
    alone quantized in the float graph (what it adds to the error of the outputs).

    Args:
        float_model: the graph that was quantized: a path, a ``ModelProto`` or an ``onnx_ir.Model``. Not changed.
        quantized_model: the same graph with QuantizeLinear and DequantizeLinear, or with integer operators.
        feeds: samples, an ``.npz`` file or a folder of them; None: made from the input types, which says little about
            a real model.
        threads: intra-op threads, 0 for ONNX Runtime's default.
        effects: on how many samples each layer's contribution is measured; one run of the float graph a layer.
        progress: told what is being done.

    Raises:
        ModelError: the models have no values in common, nothing is quantized, or the samples do not fit.
    """
    reference, quantized = load_model(float_model), load_model(quantized_model)
    for model in (reference, quantized):
        infer_shapes(model)
    samples = make_feeds(reference) if feeds is None else load_feeds(feeds)
    for number, sample in enumerate(samples):
        for model in (reference, quantized):
            check_feeds(model.graph.inputs, sample, f"sample {number}")
    found = analyze_graphs(reference, quantized, samples, threads=threads, effects=effects, progress=progress)
    if feeds is None:
        found.notes.append(
            "The samples were made from the input types; give real ones for figures that mean something."
        )
    return found


def print_analysis(
    float_model: Path,
    quantized_model: Path,
    samples: Path | None,
    json: Path | None,
    plot: Path | None,
    rows: int,
    threads: int,
    progress: Callable[[str], None],
) -> None:
    """Analyzes two files, prints the tables, and writes JSON and SVG where asked."""
    from .arguments import check_writable

    for path in (json, plot):
        if path is not None:
            check_writable(path, [float_model, quantized_model, samples])
    found = analyze(float_model, quantized_model, samples, threads=threads, progress=progress)
    found.print(rows=rows)
    if json is not None:
        found.save_json(json)
    if plot is not None:
        found.plot(plot)
