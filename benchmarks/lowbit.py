"""Low-bit weights on the real stories260k: nats per token on held-out stories, against the peers' quantizers.

    python benchmarks/peers.py nncf onnxsim && python benchmarks/lowbit.py     # a quarter of an hour on an idle core
    python benchmarks/lowbit.py --parts tools                                  # the other parts' rows are kept
    python benchmarks/lowbit.py --quick                                        # few stories, few settings

Every file is run by the same plain onnxruntime without its optimizations, with accuracy_level 0 and one thread, so that
only the weights differ. Of the stories of the text every fourth calibrates and two of four judge (the rest is for
experiments). Embedding and head stay float, except in the part ``mixed``, where they have low bits as well. Bits a
weight count codes, scales and zero points of what the part quantizes; divergence is KL(original || quantized), nats per
token. Results are written after each row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from harness import HERE, RESULTS, write_result
from peers import python_of
from rich.console import Console
from rich.table import Table

from onnxlathe.compiler.base import Outcome, PassContext
from onnxlathe.compiler.exporting.export_lm import export_causal_lm
from onnxlathe.compiler.graph import weight_bytes
from onnxlathe.models.stories import BOS, split_stories, stories260k, stories_tokenizer
from onnxlathe.passes import Cleanup, FoldConstants, MixedPrecision, QuantizeWeights, UpgradeOpset
from onnxlathe.passes.low_bit.linear_weights import find_weights
from onnxlathe.runtime.artifact import load, save
from onnxlathe.runtime.inference import open_session, run_session, session_options

Feeds = dict[str, np.ndarray]
TEXT = HERE.parent.parent / "shared" / "data" / "stories260k" / "tinystories_val_a.txt"
LONGEST = 512
PARTS = ("weights", "tools", "mixed")
# Tool of lowbit_peer.py -> environment, bits and block sizes.
PEERS: dict[str, tuple[str, tuple[tuple[int, int], ...]]] = {
    "ORT default": ("ours", ((4, 16), (4, 32), (4, 64), (8, 32), (2, 32))),
    "ORT RTN": ("ours", ((4, 32),)),
    "ORT k-quant": ("ours", ((4, 32),)),
    "ORT HQQ": ("ours", ((4, 32),)),
    "ORT GPTQ": ("ours", ((4, 32),)),
    "NNCF": ("nncf", ((4, 32), (8, 0))),
    "NNCF AWQ, scale estimation": ("nncf", ((4, 32),)),
    "onnxsim": ("onnxsim", ((4, 32), (8, 32))),
    "onnxsim AWQ": ("onnxsim", ((4, 32),)),
    "onnxsim GPTQ": ("onnxsim", ((4, 32),)),
    "onnxsim GPTAQ": ("onnxsim", ((4, 32),)),
    "onnxsim Qronos": ("onnxsim", ((4, 32),)),
    "onnxsim QuantEase": ("onnxsim", ((4, 32),)),
}


@dataclasses.dataclass
class Row:
    """One way to quantize.

    Attributes:
        name: of the tool and method.
        bits: of the codes; 0: mixed.
        block_size: inputs that share a scale; 0: mixed, or all inputs.
        weight_bits: codes, scales and zero points, bits a weight.
        increase: of the loss, nats per token.
        divergence: KL(original || quantized), nats per token.
        note: what the pass reported.
        failure: why there are no figures.
    """

    name: str
    bits: int
    block_size: int
    weight_bits: float = float("nan")
    increase: float = float("nan")
    divergence: float = float("nan")
    note: str = ""
    failure: str = ""


class Judge:
    """Loss and divergence of models on the judged stories.

    Args:
        model: the original.
        judged: the samples.
    """

    def __init__(self, model: ir.Model, judged: list[Feeds]) -> None:
        self._judged = judged
        self._expected = list(self._logarithms(model))
        self.loss = self._loss(self._expected)
        self.tokens = sum(sample["input_ids"].shape[1] - 1 for sample in judged)

    def __call__(self, model: ir.Model) -> tuple[float, float]:
        """Increase of the loss, and divergence."""
        found = list(self._logarithms(model))
        pairs = zip(self._expected, found, strict=True)
        divergence = sum(float((np.exp(a) * (a - b)).sum(dtype=np.float64)) for a, b in pairs)
        return self._loss(found) - self.loss, divergence / sum(len(rows) for rows in found)

    def _logarithms(self, model: ir.Model) -> Iterator[np.ndarray]:
        session = open_session(model, session_options(threads=1, optimize=False))
        for sample in self._judged:
            logits = run_session(session, sample, ["logits"])["logits"][0]
            logits = logits - logits.max(axis=-1, keepdims=True)
            yield logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def _loss(self, found: list[np.ndarray]) -> float:
        losses = [
            -rows[np.arange(len(rows) - 1), sample["input_ids"][0, 1:]]
            for rows, sample in zip(found, self._judged, strict=True)
        ]
        return float(np.concatenate(losses).mean(dtype=np.float64))


def samples(quick: bool) -> tuple[list[Feeds], list[Feeds]]:
    """Stories to calibrate on, and others to judge by."""
    stories = split_stories(TEXT.read_text(encoding="utf-8"))[1:-1]  # the first and the last are cut off
    calibration, judged = stories[::4], stories[2::4] + stories[3::4]
    counts = (16, 16) if quick else (128, len(judged))
    return [sample_of(s) for s in calibration[: counts[0]]], [sample_of(s) for s in judged[: counts[1]]]


def sample_of(story: str) -> Feeds:
    """The model's inputs for a story from its start, with an empty cache."""
    ids = np.array([[BOS, *stories_tokenizer().encode(story).ids][:LONGEST]], np.int64)
    positions = np.arange(ids.shape[1], dtype=np.int64)[None]
    sample = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
    for layer in range(5):
        for kind in ("key", "value"):
            sample[f"past_key_values.{layer}.{kind}"] = np.zeros((1, 4, 0, 8), np.float32)
    return sample


def weights_part(model: ir.Model, calibration: list[Feeds], quick: bool) -> Iterator[tuple[Row, ir.Model]]:
    """QuantizeWeights in all settings, embedding and head float."""
    four, two = ("rtn", "hqq", "awq", "gptq"), ("rtn", "hqq", "gptq")
    settings: list[dict[str, Any]] = [
        {"method": method, "bits": bits, "block_size": size}
        for bits, sizes, methods in ((4, (16, 32, 64), four), (8, (32, 64), ("rtn", "gptq")), (2, (16, 32), two))
        for size in sizes
        for method in methods
        if not quick or (bits, size) in ((4, 32), (8, 32))
    ]
    settings.append({"method": "gptq", "bits": 4, "block_size": 32, "symmetric": True})
    for options in settings:
        step = QuantizeWeights(head_bits=16, embedding_bits=16, accuracy_level=0, **options)
        changed = model.clone()
        outcome = step(changed, PassContext(feeds=calibration, threads=1))
        name = f"onnxlathe {options['method']}" + (" symmetric" if options.get("symmetric") else "")
        note = next((note for note in outcome.notes if "layer loss" in note), "")
        yield Row(name, options["bits"], options["block_size"], note=note), changed


def mixed_part(model: ir.Model, calibration: list[Feeds], quick: bool) -> Iterator[tuple[Row, ir.Model]]:
    """Uniform four bits for everything, embedding and head included, and MixedPrecision at exactly its bytes."""
    context = PassContext(feeds=calibration, threads=1)
    for method in ("rtn",) if quick else ("rtn", "gptq"):
        changed = model.clone()
        common: dict[str, Any] = {"method": method, "accuracy_level": 0}
        QuantizeWeights(head_bits=4, embedding_bits=4, **common)(changed, context)
        yield Row(f"uniform {method}", 4, 32), changed
        budget = float(weight_bytes(changed) - weight_bytes(model) + 4 * _numbers(model, heads=True))
        changed = model.clone()
        QuantizeWeights(head_bits=4, embedding_bits=4, block_size=16, scales="uint8", **common)(changed, context)
        yield Row(f"uniform {method}, scales of a byte", 4, 16), changed
        for scales, note in (("float", ", scales float"), ("uint8", "")):
            changed = model.clone()
            outcome = MixedPrecision(budget, "bytes", scales=scales, **common)(changed, context)
            yield Row(f"MixedPrecision {method}{note}", 0, 0, note="; ".join(outcome.notes)), changed


def tools_part(model: ir.Model, calibration: list[Feeds], quick: bool) -> Iterator[tuple[Row, ir.Model | None]]:
    """The quantizers of other tools, each in its environment."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        UpgradeOpset()(source := model.clone(), PassContext())  # onnxsim and NNCF write 4-bit tensors
        source_path = save(source, folder / "model.onnx")
        items = {f"{i}/{key}": value for i, sample in enumerate(calibration) for key, value in sample.items()}
        np.savez(folder / "calibration.npz", **items)
        for tool, (environment, settings) in PEERS.items():
            for bits, size in settings[:1] if quick else settings:
                row, target = Row(tool, bits, size), folder / "peer.onnx"
                target.unlink(missing_ok=True)
                command = [python_of(environment), HERE / "lowbit_peer.py", tool, source_path, target, str(bits)]
                try:
                    done = subprocess.run([*command, str(size), folder], capture_output=True, text=True, timeout=1200)
                    if done.returncode:
                        row.failure = (done.stderr.strip().splitlines() or ["?"])[-1][:160]
                except (OSError, subprocess.TimeoutExpired) as error:
                    row.failure = str(error)[:160]
                yield row, None if row.failure else load(target)


def _numbers(model: ir.Model, heads: bool) -> int:
    """How many weights a part quantizes: those of all linear layers, with or without embedding and head."""
    weights = find_weights(model, Outcome())
    return sum(w.outputs * w.inputs for w in weights if heads or not (w.is_head or w.gathers))


def show(content: dict[str, Any]) -> None:
    """Prints the tables."""
    console = Console(width=150)
    text = f"fp32: {content['fp32']:.4f} nats per token on {content['tokens']} tokens of {content['stories']} stories"
    console.print(text)
    for part in PARTS:
        table = Table(title=part)
        for column in ("side", "bits", "block", "bits a weight", "increase", "divergence", "note"):
            table.add_column(column, justify="left" if column in ("side", "note") else "right")
        for row in content.get(part, []):
            figures = [f"{row['weight_bits']:.3f}", f"{row['increase']:+.4f}", f"{row['divergence']:.4f}"]
            cells = [str(row["bits"]), str(row["block_size"]), *(["-"] * 3 if row["failure"] else figures)]
            table.add_row(row["name"], *cells, row["failure"] or row["note"])
        console.print(table)


def main() -> None:
    """Prints the tables and writes ``results/lowbit.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few stories and settings")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--show", action="store_true", help="only print what was measured before")
    options = parser.parse_args()
    name = "lowbit_quick" if options.quick else "lowbit"
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if options.show:
        return show(before)
    calibration, judged = samples(options.quick)
    model = export_causal_lm(stories260k(), check=False)
    for step in (Cleanup(), FoldConstants()):
        step(model, PassContext())
    judge = Judge(model, judged)
    content: dict[str, Any] = {"fp32": judge.loss, "tokens": judge.tokens, "stories": len(judged)}
    if any(before.get(key) != value for key, value in content.items() if key != "fp32"):
        before = {}  # rows judged on another text do not compare
    content.update({part: before[part] for part in PARTS if part in before})
    parts: dict[str, Callable[..., Iterator[tuple[Row, ir.Model | None]]]]
    parts = {"weights": weights_part, "tools": tools_part, "mixed": mixed_part}
    for part in options.parts.split(","):
        count = _numbers(model, heads=part == "mixed")
        content[part] = []
        for row, changed in parts[part](model, calibration, options.quick):
            if changed is not None:
                row.increase, row.divergence = judge(changed)
                row.weight_bits = 8 * (weight_bytes(changed) - weight_bytes(model)) / count + 32
            content[part].append(dataclasses.asdict(row))
            print(f"{row.name}, {row.bits} bits, {row.block_size}: {row.increase:+.4f} {row.failure}", flush=True)
            write_result(name, 1, content, set())
    show(content)
    print("wrote", write_result(name, 1, content, {env for env, _ in PEERS.values() if python_of(env).exists()}))


if __name__ == "__main__":
    main()
