"""The real MiniLM encoder in fp32 on the CPU, against everything a user could take instead.

    python benchmarks/peers.py && python benchmarks/encoder_fp32.py [--rounds 9] [--threads 2] [--padded]

Baseline: the dynamo export in ONNX Runtime with its default optimizations (ORT_ENABLE_ALL). Ratios above 1 are faster.
Each side is alone in its process; sides take turns; threads are fixed. The error is against PyTorch in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from harness import Side, compare, prepare, write_result
from peers import python_of
from rich.console import Console
from rich.table import Table

SHAPES = {"(1,16)": (1, 16), "(1,128)": (1, 128), "(8,128)": (8, 128)}


def export_both(folder: Path) -> dict[str, Path]:
    """Four exports: dynamo and torchscript, SDPA and eager attention."""
    import torch

    import onnxlathe as lathe
    from onnxlathe.models import encoder
    from onnxlathe.models.zoo import build
    from onnxlathe.runtime.artifact import save

    entry = build("minilm")
    paths: dict[str, Path] = {}
    for attention in ("sdpa", "eager"):
        module = encoder.minilm(attention=attention).eval()
        names = ["input_ids", "attention_mask", "token_type_ids"]
        paths[f"dynamo {attention}"] = folder / f"dynamo-{attention}.onnx"
        save(lathe.export(module, entry.args, dynamic_shapes=entry.dynamic_shapes), paths[f"dynamo {attention}"])
        paths[f"torchscript {attention}"] = path = folder / f"torchscript-{attention}.onnx"
        axes = {name: {0: "batch", 1: "sequence"} for name in [*names, "last_hidden_state"]}
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module, entry.args, path, dynamo=False, opset_version=17, input_names=names,
                output_names=["last_hidden_state"], dynamic_axes=axes,
            )  # fmt: skip
    return paths


def make_samples(folder: Path, padded: bool) -> tuple[dict[str, Path], dict[str, Any]]:
    """Inputs of every shape, and what PyTorch in float64 makes of them."""
    import torch

    from onnxlathe.models import encoder

    module = encoder.minilm(attention="eager").eval().double()
    rng = np.random.default_rng(0)
    samples: dict[str, Path] = {}
    reference: dict[str, Any] = {}
    for label, (batch, length) in SHAPES.items():
        mask = np.ones((batch, length), np.int64)
        if padded:
            for row in range(batch):
                mask[row, length - row * length // (2 * batch) - length // 8 :] = 0
        feeds = {
            "input_ids": rng.integers(1000, 30000, (batch, length)),
            "attention_mask": mask,
            "token_type_ids": np.zeros((batch, length), np.int64),
        }
        samples[label] = folder / f"{batch}-{length}.npz"
        np.savez(samples[label], **feeds)
        with torch.inference_mode():
            reference[label] = module(*(torch.from_numpy(array) for array in feeds.values())).numpy()
    return samples, reference


def make_sides(folder: Path, exports: dict[str, Path]) -> list[Side]:
    """Everything measured, the baseline first."""
    main, script = exports["dynamo sdpa"], exports["torchscript sdpa"]
    sides = [
        Side("ORT default, dynamo export", "ort", str(main)),
        Side("ORT default, torchscript export", "ort", str(script)),
        Side("PyTorch eager", "torch", "minilm"),
        Side("torch.compile", "torch.compile", "minilm"),
        Side("OpenVINO fp32", "openvino", str(main), python="openvino"),
    ]
    tools = [
        ("ORT transformers optimizer", main, "dynamo", "tools"),
        ("ORT transformers optimizer", script, "torchscript", "tools"),
        ("onnxslim", main, "dynamo", "tools"),
        ("onnxsim", main, "dynamo", "tools"),
        ("onnxscript ort_fusions", main, "dynamo", "tools"),
        *(("onnxlathe", path, name, "ours") for name, path in exports.items()),
    ]
    for tool, source, export, python in tools:
        target = folder / f"{tool}-{export}.onnx".replace(" ", "-")
        side = Side(f"{tool}, {export} export", "lathe" if tool == "onnxlathe" else "ort", str(target))
        if not python_of(python).exists():
            side.failure = "not installed: run benchmarks/peers.py"
        else:
            done = prepare(tool, source, target, python)
            side.failure = done.get("failure", "")
            ops = done.get("ops", {})
            fused = sum(ops.get(op, 0) for op in ("Attention", "MultiHeadAttention"))
            side.note = f"{done.get('nodes', '-')} nodes, {fused} attentions"
        sides.append(side)
        if tool == "onnxlathe" and export == "dynamo sdpa":
            sides.append(Side("onnxlathe, in plain onnxruntime", "ort", str(target), failure=side.failure))
    return sides


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.7, help="per turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--padded", action="store_true", help="with real padding in every row")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        exports = export_both(folder)
        samples, reference = make_samples(folder, options.padded)
        sides = make_sides(folder, exports)
        results = compare(
            sides, samples, threads=options.threads, rounds=options.rounds, seconds=options.seconds, reference=reference
        )
    table = Table(title=f"MiniLM fp32, CPU, {options.threads} threads: times ORT default on the dynamo export")
    table.add_column("side")
    for label in SHAPES:
        table.add_column(label, justify="right")
    table.add_column("error", justify="right")
    table.add_column("note")
    for side in sides:
        rows = results[side.name]
        if side.failure or not rows:
            table.add_row(side.name, *["-"] * len(SHAPES), "-", side.failure)
            continue
        ratios = [f"{rows[label]['ratio']:.2f} ±{rows[label]['spread']:.2f}" for label in SHAPES]
        table.add_row(side.name, *ratios, f"{max(rows[label]['error'] for label in SHAPES):.1e}", side.note)
    Console(width=150).print(table)
    name = "encoder_fp32_padded" if options.padded else "encoder_fp32"
    notes = {side.name: {"note": side.note, "failure": side.failure, **results[side.name]} for side in sides}
    print("wrote", write_result(name, options.threads, {"sides": notes}, {"ours", "tools", "openvino"}))


if __name__ == "__main__":
    main()
