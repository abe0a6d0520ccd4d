"""What a compile costs: seconds, private memory and nodes left, each tool in a fresh process.

    python benchmarks/peers.py && python benchmarks/compile_cost.py [--timeout 300] [--only decoder|synthetic]

Models: a 30-layer Llama-like decoder with KV cache (135M parameters, 538 MB of weights in an external file), and
synthetic graphs of 1k, 10k and 100k nodes. Memory is private (anonymous) memory at its peak above what the process had
with its libraries' interpreter started: memory-mapped weights do not count, copies of them do.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

from harness import prepare, write_result
from peers import python_of
from rich.console import Console
from rich.table import Table

CACHE = Path.home() / ".cache" / "onnxlathe" / "bench-models"
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


def decoder() -> Path:
    """The 30-layer decoder, exported once and kept."""
    path = CACHE / "llama-135m.onnx"
    if not path.exists():
        import onnxlathe as lathe
        from onnxlathe.models import zoo
        from onnxlathe.runtime.artifact import save

        CACHE.mkdir(parents=True, exist_ok=True)
        save(lathe.export_causal_lm(zoo.build("llama-135m").module), path, external_data=True)
    return path


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


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=300, help="seconds a tool may take")
    parser.add_argument("--only", choices=["decoder", "synthetic"])
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, Any]]] = {}
    if options.only != "synthetic":
        results["decoder"] = measure("decoder", decoder(), options.timeout)
    if options.only != "decoder":
        for size in SIZES:
            results[f"synthetic {size}"] = measure(f"synthetic {size}", synthetic_file(size), options.timeout)
    show(results)
    print("wrote", write_result("compile_cost", 2, {"models": results}, {"ours", "tools"}))


if __name__ == "__main__":
    main()
