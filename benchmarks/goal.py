"""What ``lathe.optimize`` finds for MiniLM on the CPU at a drop of 1 % (pooled cosine 0.99), and whether it is true.

    python benchmarks/goal.py [--folder F] [--goal speed] [--max-drop 1%] [--time-budget 20m] [--threads 2]
    python benchmarks/goal.py --folder F --check      # only times what an earlier run left in F, and judges it anew

The search calibrates on three quarters of 512 sentences and judges on the rest; (1,16), (1,128) and (8,128) are timed.
The check is independent of it: speed as in ``encoder_int8.py``, plain ONNX Runtime on the dynamo export against the
artifact in ``Session``, each alone in its process; quality on 256 sentences that the search never had.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from encoder_int8 import SHAPES, batches, fidelity, random_tokens, save_all
from harness import Side, compare, exported, run_once, write_result
from pruning_data import texts
from rich.console import Console

import onnxlathe as lathe
from onnxlathe.runtime.artifact import save
from onnxlathe.runtime.files import write_atomically

SENTENCES = 512


def search(options: argparse.Namespace, folder: Path) -> None:
    """Searches and leaves the artifact, the picture and the table."""
    began = time.monotonic()
    known, _ = texts(SENTENCES)
    sizes = [{"batch": batch, "sequence": length} for batch, length in SHAPES.values()]
    out = lathe.optimize(
        folder / "fp32.onnx", options.goal, options.max_drop, samples=batches(known, 16), sizes=sizes,
        time_budget=options.time_budget, threads=options.threads, progress=options.progress,
    )  # fmt: skip
    seconds = time.monotonic() - began
    out.save(folder / "found.onnx")
    out.search.print(Console(width=150))
    out.search.plot(folder / "pareto.svg")
    found = {**out.search.to_dict(), "minutes": seconds / 60}
    write_atomically(folder / "search.json", json.dumps(found, indent=1).encode())
    print(f"{seconds / 60:.1f} minutes")


def check(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Speed and quality of what was found, measured apart from the search."""
    held = batches(texts(SENTENCES)[1], 32)
    files = sorted(save_all(held, folder / "held").glob("*.npz"))
    sides = [Side("ORT fp32", "ort", str(folder / "fp32.onnx")), Side("found", "lathe", str(folder / "found.onnx"))]
    quality = fidelity(*(run_once(side, files, options.threads) for side in sides), held)
    samples: dict[str, Path] = {}
    for label, shape in SHAPES.items():
        samples[label] = folder / f"{shape[0]}-{shape[1]}.npz"
        np.savez(samples[label], **random_tokens(shape))
    speed = compare(sides, samples, threads=options.threads, rounds=7, seconds=0.5, reference={})["found"]
    mean = math.exp(sum(math.log(cell["ratio"]) for cell in speed.values()) / len(speed))
    for label, cell in speed.items():
        print(f"{label}: {cell['ratio']:.2f} ±{cell['spread']:.2f} x ONNX Runtime's default")
    print(f"geometric mean {mean:.2f} x; pooled cosine on sentences not seen: {quality['cosine']:.4f}")
    return {"speed": speed, "geometric mean": mean, "fidelity": quality}


def main() -> None:
    """Searches, checks, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where model, picture and figures are left")
    parser.add_argument("--goal", default="speed")
    parser.add_argument("--max-drop", default="1%")
    parser.add_argument("--time-budget", default="20m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="only check what is there")
    parser.add_argument("--search", action="store_true", help="only search")
    parser.add_argument("--progress", action="store_true", help="show what is being done")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        source = folder / "fp32.onnx"
        if not source.exists():
            save(exported("minilm"), source)
        if not options.check:
            search(options, folder)
        if options.search:
            return
        content = {"search": json.loads((folder / "search.json").read_text()), "check": check(options, folder)}
    print("wrote", write_result("goal", options.threads, content, set()))


if __name__ == "__main__":
    main()
