"""What the tests of tensor parallelism share: small layers, and the comparison of ranks with the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.graph import weight_bytes
from onnxlathe.compiler.placement import read_placement
from onnxlathe.compiler.ranks import rank_model, save_ranks
from onnxlathe.compiler.verify import check_structure
from onnxlathe.passes.partition.partition_tensor import PartitionTensor
from onnxlathe.runtime.feeds import make_feeds
from onnxlathe.runtime.inference import open_session, run_session, session_options
from rewriting import from_text


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: (rng.standard_normal(shape) * 0.2).astype(np.float32) for name, shape in shapes.items()}


def check_ranks(
    model: ir.Model, ranks: int, folder: Path, share: float | None = None, *, as_written: bool = False
) -> list[ir.Model]:
    """Divides ``model``, runs the ranks, compares with the whole; returns the ranks' graphs.

    Args:
        model: the model; not changed.
        ranks: how many.
        folder: for the files.
        share: the part of the weights that a rank may have at most.
        as_written: ranks run without ONNX Runtime's own rewriting, which rounds activations of weights-only QDQ.
    """
    model = model.clone()
    PartitionTensor(ranks)(model, PassContext(threads=1))
    config = {"graph_optimization_level": "disable"} if as_written else {}
    session = lathe.RankedSession(save_ranks(model, folder, ort_config=config))
    whole = open_session(model, session_options(threads=1, optimize=False))
    for feeds in make_feeds(model, 3, 2):
        got = session.run(feeds)
        for name, expected in run_session(whole, feeds).items():
            scale = max(1e-6, float(np.abs(expected).max(initial=0)))
            assert got[name].shape == expected.shape
            assert np.abs(got[name] - expected).max(initial=0) <= 1e-5 * scale, name
    placement = read_placement(model)
    assert placement is not None
    for part in session.manifest.parts:
        assert part.weight_bytes <= placement.figures["rank_weight_bytes"] + 4096  # and small new constants
        if share is not None:
            assert part.weight_bytes <= share * weight_bytes(model)
    graphs = [rank_model(model, placement.edits, rank) for rank in range(ranks)]
    for graph in graphs:
        check_structure(graph)
    return graphs


FFN = """<ir_version: 10, opset_import: ["" : 20]> g (float[batch, n, 64] x, {inputs}) => (float[batch, n, 64] y) {{
  {body} }}"""


def ffn(body: str, **arrays: np.ndarray) -> ir.Model:
    inputs = ", ".join(f"float[{', '.join(map(str, a.shape))}] {name}" for name, a in arrays.items())
    return from_text(FFN.format(inputs=inputs, body=body), **arrays)
