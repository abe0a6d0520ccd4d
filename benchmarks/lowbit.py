"""Low-bit weights on the real stories260k: nats per token on held-out stories, against the peers' quantizers.

    python benchmarks/peers.py && python benchmarks/lowbit.py     # a quarter of an hour
    python benchmarks/lowbit.py --quick                           # few stories, few settings

Every file is run by the same plain onnxruntime without its optimizations, with accuracy_level 0, so that only the
weights differ. Calibration and judgement use different stories. Embedding and head stay float unless the row says so.
Bytes are those of the whole file's weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from harness import HERE, write_result
from peers import python_of
from rich.console import Console
from rich.table import Table

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.exporting.export_lm import export_causal_lm
from onnxlathe.compiler.graph import weight_bytes
from onnxlathe.models.stories import BOS, heldout_stories, stories260k, stories_tokenizer
from onnxlathe.passes import Cleanup, FoldConstants, MixedPrecision, QuantizeWeights
from onnxlathe.passes.low_bit.output_effect import OutputEffect
from onnxlathe.runtime.artifact import load, save
from onnxlathe.runtime.inference import open_session, run_session, session_options

Feeds = dict[str, np.ndarray]
VALIDATION = HERE.parent.parent / "shared" / "data" / "stories260k" / "tinystories_val_a.txt"
LONGEST = 512


@dataclasses.dataclass
class Row:
    """One way to quantize."""

    name: str
    bits: int
    block_size: int
    bytes: int = 0
    increase: float = float("nan")
    divergence: float = float("nan")
    failure: str = ""


def samples(count: int) -> tuple[list[Feeds], list[Feeds]]:
    """Stories to calibrate on, and others to judge by."""
    found = [sample_of(story) for story in heldout_stories()]
    return found[::2][:count], found[1::2][:count]


def sample_of(story: str) -> Feeds:
    """The model's inputs for a story from its start, with an empty cache."""
    ids = np.array([[BOS, *stories_tokenizer().encode(story).ids][:LONGEST]], np.int64)
    positions = np.arange(ids.shape[1], dtype=np.int64)[None]
    sample = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
    for layer in range(5):
        for kind in ("key", "value"):
            sample[f"past_key_values.{layer}.{kind}"] = np.zeros((1, 4, 0, 8), np.float32)
    return sample


def nats(model: ir.Model | str, judged: list[Feeds]) -> float:
    """Mean negative log-likelihood of the judged stories' tokens."""
    session = open_session(model, session_options(threads=1, optimize=False))
    total, count = 0.0, 0
    for sample in judged:
        logits = run_session(session, sample, ["logits"])["logits"][0, :-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        normalized = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        following = sample["input_ids"][0, 1:]
        total -= normalized[np.arange(len(following)), following].sum()
        count += len(following)
    return total / count


def ours(model: ir.Model, calibration: list[Feeds], quick: bool) -> Iterator[tuple[Row, ir.Model]]:
    """QuantizeWeights in all settings."""
    settings: list[dict[str, Any]] = [
        {"method": method, "bits": bits, "block_size": size}
        for bits, sizes in ((4, (32,) if quick else (16, 32, 64, 128)), (8, (32,)), (2, () if quick else (16, 32)))
        for size in sizes
        for method in ("rtn", "hqq", "awq", "gptq")
    ]
    settings.append({"method": "gptq", "bits": 4, "block_size": 32, "symmetric": True})
    for options in settings:
        step = QuantizeWeights(head_bits=16, embedding_bits=16, accuracy_level=0, **options)
        changed = model.clone()
        step(changed, PassContext(feeds=calibration, threads=1))
        name = f"onnxlathe {options['method']}" + (" symmetric" if options.get("symmetric") else "")
        yield Row(name, options["bits"], options["block_size"]), changed


def mixed(model: ir.Model, calibration: list[Feeds], quick: bool) -> Iterator[tuple[Row, ir.Model]]:
    """Uniform four bits for everything, embedding and head included, and MixedPrecision at exactly its bytes."""
    context = PassContext(feeds=calibration, threads=1)
    sizes = (32, 64) if quick else (16, 32, 64, 128)
    for method in ("rtn", "gptq"):
        uniform = model.clone()
        step = QuantizeWeights(head_bits=4, embedding_bits=4, accuracy_level=0, method=method)
        step(uniform, context)
        yield Row(f"uniform {method}, all weights", 4, 32), uniform
        others = weight_bytes(model) - sum(_product_bytes(model))
        budget = float(weight_bytes(uniform) - others)
        changed = model.clone()
        choose = MixedPrecision(budget, "bytes", block_sizes=sizes, method=method, accuracy_level=0)
        choose(changed, context)
        yield Row(f"MixedPrecision {method}, same bytes", 4, 0), changed


def _product_bytes(model: ir.Model) -> Iterator[int]:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and len(tensor.shape) == 2 and tensor.nbytes > 1024:
            yield tensor.nbytes


def peers(source: Path, calibration: list[Feeds], folder: Path, quick: bool) -> Iterator[tuple[Row, Path]]:
    """The quantizers of other tools, each in its environment."""
    np.savez(
        folder / "calibration.npz", **{f"{i}/{k}": v for i, s in enumerate(calibration[:32]) for k, v in s.items()}
    )
    for tool, settings in (
        ("ort-default", ((4, 32), (8, 32)) if quick else ((4, 16), (4, 32), (4, 64), (4, 128), (8, 32), (2, 32))),
        ("ort-hqq", ((4, 32),)),
        ("ort-rtn", ((4, 32),)),
        ("ort-k_quant", ((4, 32),)),
        ("ort-gptq", ((4, 32),)),
        ("nncf", ((4, 32),)),
        ("nncf-awq", ((4, 32),)),
    ):
        for bits, size in settings:
            row = Row(tool, bits, size)
            target = folder / f"{tool}-{bits}-{size}.onnx"
            python = python_of("nncf" if tool.startswith("nncf") else "ours")
            command = [python, HERE / "lowbit_peer.py", tool, source, target, str(bits), str(size), folder]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
                if done.returncode:
                    row.failure = (done.stderr.strip().splitlines() or ["?"])[-1][:120]
            except (OSError, subprocess.TimeoutExpired) as error:
                row.failure = str(error)[:120]
            yield row, target


def main() -> None:
    """Prints the table and writes ``results/lowbit.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few stories and settings")
    parser.add_argument("--no-peers", action="store_true", help="only onnxlathe")
    options = parser.parse_args()
    calibration, judged = samples(16 if options.quick else 80)
    model = export_causal_lm(stories260k(), check=False)
    for step in (Cleanup(), FoldConstants()):
        step(model, PassContext())
    base = nats(model, judged)
    effect = OutputEffect(model, judged, threads=1)
    rows: list[Row] = []
    console = Console()

    def judge(row: Row, changed: ir.Model | None) -> None:
        if changed is not None:
            row.increase, row.divergence = nats(changed, judged) - base, effect(changed)
            row.bytes = weight_bytes(changed)
        rows.append(row)
        console.print(f"{row.name} {row.bits} bits, blocks of {row.block_size}: {row.increase:+.4f} {row.failure}")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = save(model, folder / "model.onnx")
        for row, changed in ours(model, calibration, options.quick):
            judge(row, changed)
        for row, path in [] if options.no_peers else peers(source, calibration, folder, options.quick):
            judge(row, None if row.failure else load(path))
        for row, changed in mixed(model, calibration, options.quick):
            judge(row, changed)
    table = Table("side", "bits", "block", "bytes", "increase, nats a token", "divergence")
    for row in rows:
        figures = (
            (str(row.bytes), f"{row.increase:+.4f}", f"{row.divergence:.4f}") if not row.failure else (row.failure,)
        )
        table.add_row(row.name, str(row.bits), str(row.block_size), *figures)
    console.print(f"fp32: {base:.4f} nats a token on {len(judged)} stories; {weight_bytes(model)} bytes")
    console.print(table)
    content = {"fp32": base, "stories": len(judged), "rows": [dataclasses.asdict(row) for row in rows]}
    write_result("lowbit-quick" if options.quick else "lowbit", 1, content, set())


if __name__ == "__main__":
    main()
