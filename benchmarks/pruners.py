"""Lets a peer prune one model in its own environment, which has nothing of ours.

    PYTHON benchmarks/pruners.py TOOL SHARE IN.onnx OUT.onnx FOLDER

FOLDER holds the calibration samples (``.npz``), the same for all tools; SHARE of each layer's units, or of the blocks,
or of the weights, goes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantizers import samples_in

Prune = Callable[[str, float, list[dict[str, Any]]], Any]


def onnxsim(name: str, calibrated: bool = True, **options: Any) -> Prune:
    """A function of onnxsim, with its defaults."""

    def run(source: str, share: float, samples: list[dict[str, Any]]) -> Any:
        import onnxsim as tool

        data = {"calibration_data": samples} if calibrated else {}
        return getattr(tool, name)(source, sparsity=share, **data, **options)

    return run


def nncf(source: str, share: float, samples: list[dict[str, Any]]) -> Any:
    """NNCF's pruning."""
    import nncf as tool
    import onnx

    return tool.prune(onnx.load(source), tool.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=share)


TOOLS: dict[str, Prune] = {
    "onnxsim units, magnitude": onnxsim("apply_structured_pruning", calibrated=False),
    "onnxsim units, Wanda": onnxsim("apply_structured_wanda_pruning"),
    "onnxsim heads, Wanda": onnxsim("apply_attention_head_wanda_pruning"),
    "onnxsim blocks": onnxsim("apply_transformer_block_pruning"),
    "onnxsim Wanda": onnxsim("apply_wanda_pruning"),
    "onnxsim SparseGPT": onnxsim("apply_sparsegpt_pruning"),
    "onnxsim Wanda 2:4": onnxsim("apply_wanda_pruning", n=2, m=4),
    "onnxsim SparseGPT 2:4": onnxsim("apply_sparsegpt_pruning", n=2, m=4),
    "NNCF": nncf,
}


def pruned_by(tool: str, share: float, source: Path, target: Path, folder: Path, timeout: float = 900) -> str:
    """Runs this file in the tool's environment; returns why it did not work, empty if it did."""
    from harness import why_not
    from peers import python_of

    python = python_of("nncf" if tool == "NNCF" else "onnxsim")
    if not python.exists():
        return "not installed: run benchmarks/peers.py"
    return why_not([python, Path(__file__), tool, str(share), source, target, folder], timeout)


if __name__ == "__main__":
    import onnx

    model = TOOLS[sys.argv[1]](sys.argv[3], float(sys.argv[2]), samples_in(sys.argv[5]))
    onnx.save(model, sys.argv[4])
