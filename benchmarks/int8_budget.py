"""The real MiniLM encoder under quality budgets: what the ladder does, how far it gets, and what each rung is worth.

    python benchmarks/int8_budget.py [--metric relative_error] [--drops 0.2 0.1 0.05] [--samples 16] [--text FILE]

The samples are real sentences (TinyStories from ../shared, or a text file of yours); the loss is measured on sentences
that neither calibration nor the ladder has seen.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import exported, write_result
from rich.console import Console
from rich.table import Table

TEXT = Path(__file__).parent.parent.parent / "shared" / "data" / "stories260k" / "tinystories_val_a.txt"


def sentences(path: Path, count: int) -> list[str]:
    """The first ``count`` sentences of 20 to 200 characters."""
    if not path.is_file():
        raise SystemExit(f"There is no text at {path}: give one with --text.")
    parts = re.split(r"(?<=[.!?])\s+", path.read_text(encoding="utf-8", errors="replace"))
    return [part.strip() for part in parts if 20 < len(part.strip()) < 200][:count]


def tokenize(texts: list[str], batch: int = 4) -> list[dict[str, np.ndarray]]:
    """Batches of token ids with their masks."""
    from onnxlathe.models.encoder import minilm_tokenizer

    tokenizer = minilm_tokenizer()
    samples: list[dict[str, np.ndarray]] = []
    for start in range(0, len(texts), batch):
        encoded = tokenizer.encode_batch(texts[start : start + batch])
        ids = np.array([item.ids for item in encoded], np.int64)
        mask = np.array([item.attention_mask for item in encoded], np.int64)
        samples.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    return samples


def main() -> None:
    """Prints the table and writes the JSON."""
    import onnxlathe as lathe
    from onnxlathe.compiler.verify import run_reference
    from onnxlathe.passes import QuantizeStatic

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metric", default="relative_error", choices=["relative_error", "cosine", "sqnr", "kl"])
    parser.add_argument("--drops", type=float, nargs="+", default=[1.0, 0.15, 0.1, 0.05])
    parser.add_argument("--samples", type=int, default=16, help="batches of four sentences; as many again stay unseen")
    parser.add_argument("--text", type=Path, default=TEXT)
    options = parser.parse_args()
    samples = tokenize(sentences(options.text, 8 * options.samples))
    seen, unseen = samples[: len(samples) // 2], samples[len(samples) // 2 :]
    fused = lathe.compile(exported("minilm"), "cpu-fp32", speed_gate=False, progress=False).model
    exact = run_reference(fused, unseen)
    table = Table(title=f"MiniLM int8 under a budget of {options.metric}: loss on {len(unseen)} unseen batches")
    for column in ("budget", "loss unseen", "MatMul int8", "float", "seconds", "steps"):
        table.add_column(column, justify="left" if column == "steps" else "right")
    rows: list[dict[str, Any]] = []
    for drop in options.drops:
        budget = lathe.Budget(options.metric, drop)
        start = time.perf_counter()
        out = lathe.compile(fused, [QuantizeStatic(quality=budget)], calibration=seen, verify=False, progress=False)
        seconds = time.perf_counter() - start
        record = out.report.passes[-1]
        loss = budget.loss(unseen, exact, run_reference(out.model, unseen))
        products = record.counts.get("MatMul on integers", 0) + record.counts.get("Gemm on integers", 0)
        left = sum(refusal.reason.startswith("left float") for refusal in record.refusals)
        rows.append({"budget": drop, "loss": loss, "products": products, "float": left, "notes": record.notes})
        notes = "\n".join(record.notes)
        table.add_row(f"{drop:g}", budget.say(loss), str(products), str(left), f"{seconds:.0f}", notes)
    Console(width=160).print(table)
    print("wrote", write_result("int8_budget", 0, {"metric": options.metric, "rows": rows}, {"ours"}))


if __name__ == "__main__":
    main()
