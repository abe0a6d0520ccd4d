"""The survey's experiments, measured: pruning, int8, data parallelism and memory, alone and composed.

    python benchmarks/survey.py prepare --folder F [--only mlp encoder decoder llama]   # half an hour
    python benchmarks/survey.py time --folder F [--only ...]                            # a minute a model, machine idle
    python benchmarks/survey.py bounds --folder F                                       # half a minute, likewise
    python benchmarks/survey.py report --folder F                                       # table, JSON, docs/survey.svg

The survey claims 2.0 x for 20 % of the weights pruned, 1.5 x for 8 bits, 3.0 x for data parallelism, 1.2 x for memory,
and multiplies them (10.8 x). Here: LeNet-300-100 on 1000 digits in batches of 1, 100 and 1000, MiniLM, stories260k, and
a 135M Llama with random weights (speed only). Every factor is against ONNX Runtime with all its optimizations on the
fp32 export, one session with one thread; each side alone in its process, in turns. Quality is on data that neither
training nor calibration saw. Next to each: what the survey claims, and what arithmetic allows (``allowed``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from distillation import digits
from harness import Side, compare, write_result
from rich.console import Console
from rich.table import Table
from survey_models import SUBJECTS, TRAINED, accuracy, logits, model_path, prepare
from survey_naive import CLAIMS, composed_claim, controls

from onnxlathe.passes.partition.costs import this_machine
from onnxlathe.runtime.artifact import load
from onnxlathe.runtime.files import write_atomically
from onnxlathe.runtime.inference import open_session, session_options
from onnxlathe.runtime.session import Session

Known = dict[str, Any]
DOCS = Path(__file__).parent.parent / "docs"
CORES = min(2, os.cpu_count() or 1)
VNNI = 4.0
"""Products of int8 a second over those of fp32, in one instruction; weights are as much smaller."""
# row -> (model, kind of worker for batches, for texts); {n}: workers
ROWS: dict[str, tuple[str, str]] = {
    "as exported": ("original", "run 1"),
    "fused": ("fused", "run 1"),
    "zeros 20 %": ("zeros 20 %", "run 1"),
    "width 20 %": ("width 20 %", "run 1"),
    "width for 2 x": ("width for 2 x", "run 1"),
    "int8": ("int8", "run 1"),
    "8-bit weights": ("8-bit weights", "run 1"),
    "2 workers": ("original", "run 2"),
    "3 workers": ("original", "run 3"),
    "memory": ("original", "bound 1"),
    "cache copied": ("fused", "plain run 1"),
    "composed, 20 %": ("width 20 % + int8", "bound 2"),
    "composed, for 2 x": ("width for 2 x + int8", "bound 2"),
    "composed, 8-bit weights": ("width 20 % + 8-bit weights", "bound 2"),
}
CLAIMED = {
    "zeros 20 %": CLAIMS["pruning"],
    "width 20 %": CLAIMS["pruning"],
    "width for 2 x": CLAIMS["pruning"],
    "int8": CLAIMS["int8"],
    "8-bit weights": CLAIMS["int8"],
    "2 workers": CLAIMS["data parallel"],
    "3 workers": CLAIMS["data parallel"],
    "memory": CLAIMS["memory"],
    "composed, 20 %": composed_claim(),
    "composed, for 2 x": composed_claim(),
    "composed, 8-bit weights": composed_claim(),
}


def sides(folder: Path, name: str, known: Known) -> list[Side]:
    """What is timed of one model; the first is the baseline."""
    text = known[""]["text"]
    found: list[Side] = []
    for row, (technique, kind) in ROWS.items():
        if technique not in known or (text and row == "memory") or (not text and row == "cache copied"):
            continue
        if name == "llama" and row == "3 workers":  # there are two texts
            continue
        side = Side(
            row, f"text {kind}" if text else kind, str(model_path(folder, name, technique)), worker="survey_worker.py"
        )
        side.failure = known[technique].get("failure", "")
        found.append(side)
    return found


def measure(folder: Path, name: str, rounds: int, seconds: float) -> None:
    """Times one model's sides and keeps the figures in the folder."""
    known = json.loads((folder / name / "known.json").read_text())
    began = time.monotonic()
    results = compare(
        sides(folder, name, known), workloads(folder, name, known), threads=1, rounds=rounds, seconds=seconds,
        reference={}, warm=2,
    )  # fmt: skip
    figures = {"speed": results, "seconds": time.monotonic() - began}
    write_atomically(folder / name / "timed.json", json.dumps(figures, indent=1).encode())
    print(f"{name}: {figures['seconds']:.0f} s")


def workloads(folder: Path, name: str, known: Known) -> dict[str, Path]:
    """What is timed, by label."""
    return {label: folder / name / f"workload-{number}.npz" for number, label in enumerate(known[""]["workloads"])}


def bounds(folder: Path, name: str) -> None:
    """Measures what ``allowed`` needs, and keeps it in the folder."""
    known = json.loads((folder / name / "known.json").read_text())
    shares = {
        label: _text_share(folder, name, np.load(path)) if known[""]["text"] else _shares(folder, name, np.load(path))
        for label, path in workloads(folder, name, known).items()
    }
    write_atomically(folder / name / "shares.json", json.dumps(shares, indent=1).encode())
    print(name, shares)


def allowed(known: Known, fused: float, shares: dict[str, float]) -> dict[str, float]:
    """What arithmetic allows each row on one workload, times as fast as the original.

    Everything but the plain workers begins at the fused graph, ``fused`` times as fast. In it, products are a share p
    of a call: what makes them k times faster reaches 1 / (1 - p + p / k).

    * Zeros: no more, as ONNX Runtime multiplies with them.
    * Width: all work shrinks at most as much as the weights, or as the kind of units of which most went.
    * int8: k = 4, four times as many products in an instruction and a quarter of the bytes.
    * Workers: the cores. Memory: all but the call of a model that does nothing, and writing the results once, is left.
    * Composed: all of that multiplied.
    """
    cores, memory = float(CORES), shares.get("memory", 1.0)
    found = {"zeros 20 %": fused, "2 workers": cores, "3 workers": cores, "memory": memory}
    widths: dict[str, float] = {}
    for row in ("width 20 %", "width for 2 x"):
        if (cut := known.get(row, {})).get("weights"):
            notes = " ".join(cut["notes"] + known.get(row.replace("width", "pruned"), {}).get("notes", []))
            kinds = [int(whole) / int(left) for left, whole in re.findall(r"(\d+) of (\d+) left", notes)]
            widths[row] = max(known["fused"]["weights"] / cut["weights"], *kinds)
            found[row] = fused * widths[row]
    eight = 1 / (1 - shares["products"] + shares["products"] / VNNI)
    found |= {"int8": fused * eight, "8-bit weights": fused * eight}
    for row, width in (("composed, 20 %", "width 20 %"), ("composed, for 2 x", "width for 2 x")):
        if width in widths:
            found[row] = fused * eight * widths[width] * cores * memory
    found["composed, 8-bit weights"] = found.get("composed, 20 %", fused * eight * cores)
    return found


def _shares(folder: Path, name: str, sample: Any) -> dict[str, float]:
    """Share of products in a call, and what memory allows."""
    size = int(sample["batch"])
    feeds = {key: sample[key][:size] for key in sample.files if key != "batch"}
    session = Session(model_path(folder, name, "original"), threads=1)
    run = min(_time(lambda: session.ort.run(None, feeds)) for _ in range(20))
    nothing = open_session(_nothing(), session_options(threads=1))
    empty = {"x": np.zeros(1, np.float32)}
    call = min(_time(lambda: nothing.run(None, empty)) for _ in range(200))
    written = sum(array.nbytes for array in session.run(feeds).values()) / this_machine().bandwidth
    memory = run / max(run - call - written, 1e-9)
    return {"products": _product_share(model_path(folder, name, "fused"), feeds) / memory, "memory": memory}


def _text_share(folder: Path, name: str, sample: Any) -> dict[str, float]:
    """Share of products where a prompt runs, or one token."""
    path = model_path(folder, name, "fused")
    model = load(path)
    length = sample["prompt"].shape[1] if int(sample["new"]) == 1 else 1
    past = int(sample["new"]) // 2 if length == 1 else 0
    feeds: dict[str, Any] = {
        "input_ids": sample["prompt"][:1, :length].copy(), "attention_mask": np.ones((1, past + length), np.int64),
        "position_ids": np.arange(past, past + length)[None],
    }  # fmt: skip
    for value in model.graph.inputs:
        if value.name and value.name.startswith("past") and value.shape is not None:
            feeds[value.name] = np.zeros([1, value.shape[1], past, value.shape[3]], np.float32)
    wanted = {value.name for value in model.graph.inputs}
    return {"products": _product_share(path, {key: array for key, array in feeds.items() if key in wanted})}


def _product_share(path: Path, feeds: dict[str, Any]) -> float:
    session = Session(path, threads=1, profile=True)
    for _ in range(30):
        session.run(feeds)
    spent = session.profile()
    products = sum(value for op, value in spent.items() if op in ("MatMul", "Gemm", "FusedGemm", "FusedMatMul"))
    return products / sum(spent.values())


def _nothing() -> Any:
    import onnx_ir as ir

    header = '<ir_version: 10, opset_import: ["" : 20]>'
    return ir.from_onnx_text(f"{header} nothing (float[1] x) => (float[1] y) {{ y = Identity(x) }}")


def _time(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def report(folder: Path, names: list[str]) -> None:
    """Prints the tables, writes JSON and SVG."""
    console, content = Console(width=180), dict[str, Any]()
    for name in names:
        known = json.loads((folder / name / "known.json").read_text())
        timed = json.loads((folder / name / "timed.json").read_text())
        shares = json.loads((folder / name / "shares.json").read_text())
        fused = {label: cell["ratio"] for label, cell in timed["speed"]["fused"].items()}
        timed["bounds"] = {label: allowed(known, fused[label], each) for label, each in shares.items()}
        timed["shares"] = shares
        content[name] = {"models": known, **timed}
        console.print(_table(name, known, timed))
    images, labels = digits()
    pixels, order = images.reshape(-1, 784) / 255, np.random.default_rng(0).permutation(len(images))
    unseen = order[TRAINED:]
    if "mlp" in names:
        model = load(model_path(folder, "mlp", "original"))
        naive = controls(model, lambda m: accuracy(m, pixels[unseen], labels[unseen]), logits, pixels[unseen])
        table = Table("formula", "predicts", "measured", title="the survey's formulas, as controls")
        for row in naive:
            table.add_row(*row.values())
        console.print(table)
        content["naive"] = naive
    from survey_plot import draw

    content["claims"] = {**CLAIMS, "composed": composed_claim()}
    draw(content, DOCS / "survey.svg", CLAIMED)
    print("wrote", DOCS / "survey.svg", write_result("survey", 1, content, {"ours"}))


def _table(name: str, known: Known, timed: dict[str, Any]) -> Table:
    labels, metric = known[""]["workloads"], known[""]["metric"]
    table = Table(title=f"{name}: times as fast as ONNX Runtime in fp32, one thread (arithmetic allows)")
    for column in ("", "claimed", *labels, f"quality: {metric}" if metric else "quality"):
        table.add_column(column, justify="left" if not column else "right")
    for row, (technique, _) in ROWS.items():
        figures = timed["speed"].get(row)
        if not figures:
            failure = known.get(technique, {}).get("failure", "")
            table.add_row(row, failure[:60]) if failure else None
            continue
        cells = [f"{CLAIMED[row]:.1f}" if row in CLAIMED else ""]
        for label in labels:
            bound = timed["bounds"][label].get(row)
            said = f" ({bound:.2f})" if bound is not None else ""
            cells.append(f"{figures[label]['ratio']:.2f} ±{figures[label]['spread']:.2f}{said}")
        quality = known[technique].get("quality")
        table.add_row(row, *cells, "" if quality is None else f"{quality:.4f}")
    speed = {row: [cells[label]["ratio"] for label in labels] for row, cells in timed["speed"].items() if cells}
    if "cache copied" in speed:  # the same graph, with its cache in place and copied
        in_place = [a / b for a, b in zip(speed["fused"], speed["cache copied"], strict=True)]
        table.add_row("memory: cache in place", f"{CLAIMS['memory']:.1f}", *(f"{value:.2f}" for value in in_place))
    singles = [row for row in ("width 20 %", "int8", "8-bit weights", "2 workers", "memory") if row in speed]
    products = [math.prod(column) for column in zip(*(speed[row] for row in singles), strict=True)]
    table.add_row(f"product of {', '.join(singles)}", "", *(f"{value:.2f}" for value in products))
    return table


def main() -> None:
    """Prepares, times or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "time", "bounds", "report"))
    parser.add_argument("--folder", type=Path, required=True, help="where models and figures are kept")
    parser.add_argument("--only", nargs="*", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="per turn")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.what == "report":
        return report(options.folder, options.only)
    for name in options.only:
        if options.what == "prepare":
            prepare(name, options.folder)
        elif options.what == "bounds":
            bounds(options.folder, name)
        else:
            measure(options.folder, name, options.rounds, options.seconds)


if __name__ == "__main__":
    main()
