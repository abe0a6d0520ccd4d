r"""What a compile costs: seconds, private memory and nodes left, each tool in a fresh process.

    python benchmarks/peers.py && python benchmarks/compile_cost.py [--timeout 300] [--only decoder|synthetic]
    python benchmarks/compile_cost.py --result compile_cost_gptq --timeout 3600 --samples 64 \
        --passes "cpu-fp32,quantize-weights:method=gptq:symmetric=true:head_bits=4:embedding_bits=4"

Models: a 30-layer Llama-like decoder with KV cache (135M parameters, 538 MB of weights in an external file), and
synthetic graphs of 1k, 10k and 100k nodes. Memory is private (anonymous) memory at its peak above what the process had
with its libraries' interpreter started: memory-mapped weights do not count, copies of them do. With ``--passes``
onnxlathe alone compiles the decoder, calibrating on random tokens; then what each part holds is told, and also all that
is resident (``VmRSS``, mapped files included), as shares of the float weights.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from decoder_models import export
from harness import prepare, write_result
from peers import python_of
from rich.console import Console
from rich.table import Table

CACHE = Path.home() / ".cache" / "onnxlathe" / "bench-models"
TOKENS = 128  # of a calibration sample
SIZES = (1_000, 10_000, 100_000)
_FUSED = ("GroupQueryAttention", "RMSNormalization", "SimplifiedLayerNormalization", "QuickGelu")
TOOLS = {
    "onnxlathe": "ours",
    "onnxslim": "tools",
    "onnxsim": "tools",
    "onnxoptimizer": "tools",
    "ORT basic": "tools",
    "ORT extended": "tools",
    "onnxscript optimizer": "tools",
    "onnxscript ort_fusions": "tools",
}


def synthetic_file(nodes: int) -> Path:
    """A synthetic graph, made once and kept."""
    path = CACHE / f"synthetic-{nodes}.onnx"
    if not path.exists():
        from synthetic import synthetic

        from onnxlathe.runtime.artifact import save

        CACHE.mkdir(parents=True, exist_ok=True)
        save(synthetic(nodes), path)
    return path


def measure(label: str, source: Path, timeout: float) -> dict[str, dict[str, Any]]:
    """All tools on one model."""
    results: dict[str, dict[str, Any]] = {}
    for tool, python in TOOLS.items():
        name = tool
        if tool == "onnxlathe":
            name = "onnxlathe cpu-fp32, no gate" if label == "decoder" else "onnxlathe basic"
        with tempfile.TemporaryDirectory() as folder:
            if not python_of(python).exists():
                results[name] = {"failure": "not installed: run benchmarks/peers.py"}
            else:
                results[name] = prepare(name, source, Path(folder) / "out.onnx", python, timeout)
        print(f"{label}: {name}: {results[name].get('failure') or round(results[name]['seconds'], 1)}", flush=True)
    return results


def show(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Prints a table a model, and the growth exponents of the synthetic graphs."""
    console = Console(width=140)
    for label, rows in results.items():
        table = Table(title=f"{label}: time and memory relative to onnxlathe", title_justify="left")
        for column in ("tool", "time", "memory", "nodes", "note"):
            table.add_column(column, justify="left" if column in ("tool", "note") else "right")
        ours = next(row for name, row in rows.items() if name.startswith("onnxlathe"))
        for name, row in rows.items():
            if "failure" in row:
                table.add_row(name, "-", "-", "-", row["failure"])
                continue
            good = "failure" not in ours
            times = f"{row['seconds'] / ours['seconds']:.2f} x" if good else "-"
            memory = f"{row['private_bytes'] / max(1, ours['private_bytes']):.2f} x" if good else "-"
            note = ", ".join(f"{row['ops'][op]} {op}" for op in _FUSED if op in row["ops"])
            if row is ours:
                note = f"{row['seconds']:.1f} s, {row['private_bytes'] / 1e6:.0f} MB; {note}"
            table.add_row(name, times, memory, str(row["nodes"]), note)
        console.print(table)
    growth = Table(title="growth: time ~ nodes^k from 10k to 100k nodes", title_justify="left")
    growth.add_column("tool")
    growth.add_column("k", justify="right")
    small, large = (results.get(f"synthetic {size}", {}) for size in SIZES[1:])
    for name, row in large.items():
        if "seconds" in row and "seconds" in small.get(name, {}):
            growth.add_row(name, f"{math.log10(row['seconds'] / small[name]['seconds']):.2f}")
    if growth.row_count:
        console.print(growth)


def samples(count: int, folder: Path) -> Path | None:
    """Random tokens for the decoder, ``TOKENS`` in each sample, with an empty cache; None without any."""
    random = np.random.default_rng(0)
    for number in range(count):
        ids = random.integers(3, 49152, (1, TOKENS))
        sample: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        sample["position_ids"] = np.arange(TOKENS)[None]
        empty = np.zeros((1, 3, 0, 64), np.float32)
        sample |= {f"past_key_values.{layer}.{kind}": empty for layer in range(30) for kind in ("key", "value")}
        np.savez(folder / f"{number:04}.npz", **sample)
    return folder if count else None


def one(passes: str, count: int, timeout: float) -> dict[str, Any]:
    """onnxlathe's cost on the decoder with ``passes``, calibrated on ``count`` samples."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as given:
        source = export("llama_135m", 20, "sdpa")
        done = prepare(
            f"onnxlathe {passes}", source, Path(folder) / "out.onnx", "ours", timeout, samples(count, Path(given))
        )
        if "failure" in done:
            raise SystemExit(done["failure"])
        weights = sum(file.stat().st_size for file in source.parent.glob(f"{source.name}.data"))
        done |= {"passes": passes, "samples": count, "tokens": TOKENS, "float_bytes": weights}
        done["resident_peak_in"] = max(done["parts"], key=lambda part: done["parts"][part][1])
    table = Table(
        title=f"{done['seconds']:.0f} s; peaks / {weights / 1e6:.0f} MB of float weights", title_justify="left"
    )
    table.add_column("part")
    table.add_column("private", justify="right")
    table.add_column("resident", justify="right")
    for part, peaks in [*done["parts"].items(), ("all", (done["private_bytes"], done["resident_bytes"]))]:
        table.add_row(part, *(f"{peak / weights:.2f} x" for peak in peaks))
    Console(width=140).print(table)
    return done


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=300, help="seconds a tool may take")
    parser.add_argument("--only", choices=["decoder", "synthetic"])
    parser.add_argument("--passes", default="", help="onnxlathe alone, with these")
    parser.add_argument("--samples", type=int, default=0, help="for --passes: how many calibrate")
    parser.add_argument("--result", default="compile_cost", help="name of the file in benchmarks/results")
    options = parser.parse_args()
    if options.passes:
        found = one(options.passes, options.samples, options.timeout)
        print("wrote", write_result(options.result, 2, found, set()))
        return
    results: dict[str, dict[str, dict[str, Any]]] = {}
    if options.only != "synthetic":
        results["decoder"] = measure("decoder", export("llama_135m", 20, "sdpa"), options.timeout)
    if options.only != "decoder":
        for size in SIZES:
            results[f"synthetic {size}"] = measure(f"synthetic {size}", synthetic_file(size), options.timeout)
    show(results)
    print("wrote", write_result(options.result, 2, {"models": results}, {"ours", "tools"}))


if __name__ == "__main__":
    main()
