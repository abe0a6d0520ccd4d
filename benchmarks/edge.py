"""Edge bundles of real models: do they test themselves elsewhere, and what do they cost to load?

    python benchmarks/edge.py [--folder DIR] [--only bundles|load]

Bundles of MiniLM (fp32, int8, int4, edge) and stories260k (fp32, int8 weights, int4) are written with ``--target
web``; ``selftest.py`` of each runs in a virtual environment with nothing but onnxruntime and numpy (from the package
index), and ``web.html`` in onnxruntime-web (wasm, one thread, headless Chromium). Then each artifact is loaded and run
once in fresh processes of that environment: time until the session is there, and the peak of resident memory above an
imported onnxruntime, against the fp32 export with onnxruntime's defaults. Answers are compared with the fp32 export's:
mean cosine of mean-pooled embeddings on 64 held-out sentences.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from encoder_int8 import batches, sentences
from harness import exported, write_result
from rich.console import Console
from rich.table import Table
from web import browser_page, problem, served

import onnxlathe as lathe
from onnxlathe.compiler.bundle import bundle_folder
from onnxlathe.models.stories import BOS, stories_tokenizer
from onnxlathe.runtime.artifact import load, save

ENCODERS = {"minilm-fp32": "cpu-fp32", "minilm-int8": "cpu-int8", "minilm-int4": "cpu-int4", "minilm-edge": "edge"}
DECODERS: dict[str, list[Any] | str] = {
    "stories260k-fp32": "cpu-fp32",
    "stories260k-int8": ["cpu-fp32", lathe.passes.QuantizeWeights(bits=8)],
    "stories260k-int4": "cpu-int4",
}
ORIGINAL = "minilm-original"
# Session options that might lower the peak, for the int8 artifact.
OPTIONS: dict[str, dict[str, Any]] = {
    "without arena": {"enable_cpu_mem_arena": False},
    "without arena and pattern": {"enable_cpu_mem_arena": False, "enable_mem_pattern": False},
    "without repacking": {"session.disable_prepacking": "1"},
}
_LOAD = """
import json, sys, time
from pathlib import Path
import numpy as np, onnxruntime as ort
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
feeds, options = dict(np.load(sys.argv[2])), ort.SessionOptions()
options.intra_op_num_threads = 2
for key, value in json.loads(sys.argv[3]).items():
    options.add_session_config_entry(key, value) if "." in key else setattr(options, key, value)
before = resident("VmRSS")
start = time.perf_counter()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
loaded = time.perf_counter() - start
session.run(None, feeds)
print(json.dumps({"load": loaded, "peak": resident("VmHWM") - before}))
"""


def main() -> None:
    """Writes, tests, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", choices=("bundles", "load"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        python = _environment(folder)
        if arguments.only != "load":
            _write_bundles(folder)
        results = {} if arguments.only == "load" else {"selftests": _selftests(folder, python), "web": _web(folder)}
        if arguments.only != "bundles":
            results["load"] = _loads(folder, python)
            results["cosine"] = _fidelity(folder)
        _print(results)
        print(write_result(f"edge_{arguments.only}" if arguments.only else "edge", 0, results, set()))


def _environment(folder: Path) -> Path:
    """A virtual environment with onnxruntime and numpy only."""
    home = folder / "venv"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        packages = [f"onnxruntime=={onnxruntime.__version__}", "numpy"]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def _write_bundles(folder: Path) -> None:
    from onnxlathe.models import zoo

    original = folder / f"{ORIGINAL}.onnx"
    if not original.exists():
        save(exported("minilm"), original)
    calibration = batches(sentences()[:64], 8)
    np.savez(folder / "sample.npz", **calibration[0])
    for name, passes in ENCODERS.items():
        _save(load(original), passes, calibration, folder / f"{name}.onnx")
    stories = lathe.export_causal_lm(zoo.build("stories260k").module, check=False)
    ids = np.array([[BOS, *stories_tokenizer().encode("Once upon a time, there was a").ids]], np.int64)
    sample = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    caches = [value.name for value in stories.graph.inputs if (value.name or "").startswith("past")]
    sample |= {name or "": np.zeros((1, 4, 0, 8), np.float32) for name in caches}
    for name, passes in DECODERS.items():
        _save(stories, passes, [sample], folder / f"{name}.onnx")


def _save(model: Any, passes: Any, calibration: list[Any], path: Path) -> None:
    if bundle_folder(path).exists():
        return
    out = lathe.compile(
        model, passes, calibration=calibration, target="web", speed_gate=False, threads=2, progress=False
    )
    print(out.save(path, bundle=True), out.report.summary(), flush=True)


def _names(folder: Path) -> list[str]:
    return [name for name in (*ENCODERS, *DECODERS) if (folder / f"{name}.bundle").is_dir()]


def _selftests(folder: Path, python: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _names(folder):
        command = [python, folder / f"{name}.bundle" / "selftest.py"]
        done = subprocess.run(command, capture_output=True, text=True)
        found[name] = {"passed": done.returncode == 0, "said": (done.stdout + done.stderr).splitlines()}
    return found


def _web(folder: Path) -> dict[str, Any]:
    if reason := problem():
        return {name: {"failure": reason} for name in _names(folder)}
    found: dict[str, Any] = {}
    with served(folder) as address, browser_page() as page:
        page.set_default_timeout(300_000)
        for name in _names(folder):
            page.goto(f"{address}/{name}.bundle/web.html?threads=1")
            page.wait_for_function("window.result")
            found[name] = page.evaluate("window.result")
    return found


def _loads(folder: Path, python: Path) -> dict[str, Any]:
    """Medians of five fresh processes each, in turns; ratios against the original."""
    files = {name: _model_file(folder, name) for name in (ORIGINAL, *ENCODERS)}
    sides = {name: (file, {}) for name, file in files.items() if file.exists()}
    sides |= {f"minilm-int8, {name}": (files["minilm-int8"], options) for name, options in OPTIONS.items()}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(5):
        for name, (file, options) in sides.items():
            command = [python, "-c", _LOAD, file, folder / "sample.npz", json.dumps(options)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured[name].append(json.loads(done.stdout))
    middle = {
        name: {key: statistics.median(item[key] for item in items) for key in ("load", "peak")}
        for name, items in measured.items()
    }
    return {
        name: {
            "load": middle[ORIGINAL]["load"] / values["load"],
            "peak": values["peak"] / middle[ORIGINAL]["peak"],
            "bytes": sides[name][0].stat().st_size / files[ORIGINAL].stat().st_size,
        }
        for name, values in middle.items()
    }


def _fidelity(folder: Path) -> dict[str, float]:
    feeds = batches(sentences()[64:128], 8)
    expected = _embeddings(folder, ORIGINAL, feeds)
    found: dict[str, float] = {}
    for name in ENCODERS:
        if (folder / f"{name}.bundle").is_dir():
            got = _embeddings(folder, name, feeds)
            norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
            found[name] = float(((got * expected).sum(1) / norms).mean())
    return found


def _embeddings(folder: Path, name: str, feeds: list[dict[str, Any]]) -> Any:
    session = lathe.Session(_model_file(folder, name), threads=2)
    pooled: list[Any] = []
    for sample in feeds:
        hidden = next(iter(session.run(sample).values()))
        mask = sample["attention_mask"][..., None]
        pooled.append((hidden * mask).sum(1) / mask.sum(1))
    return np.concatenate(pooled)


def _model_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.onnx" if name == ORIGINAL else folder / f"{name}.bundle" / f"{name}.onnx"


def _print(results: dict[str, Any]) -> None:
    table = Table(title="edge bundles", title_justify="left")
    columns = ("self-test", "in wasm: error (allowed)", "same tokens", "loads faster", "peak memory", "bytes", "cosine")
    for column in ("bundle", *columns):
        table.add_column(column)
    for name in dict.fromkeys((ORIGINAL, *ENCODERS, *DECODERS, *results.get("load", {}))):
        web, load = results.get("web", {}).get(name, {}), results.get("load", {}).get(name, {})
        test = results.get("selftests", {}).get(name, {})
        table.add_row(
            name,
            {True: "passes", False: "FAILS"}.get(test.get("passed"), "-"),
            web.get("failure") or (f"{web['error']:.1e} ({web['tolerance']:.1e})" if web else "-"),
            "-" if "tokens" not in web else str(web["ok"]),
            *(f"{load[key]:.2f} x" if load else "-" for key in ("load", "peak", "bytes")),
            f"{results['cosine'][name]:.4f}" if name in results.get("cosine", {}) else "-",
        )
    Console(width=150).print(table)
    for name, test in results.get("selftests", {}).items():
        if not test["passed"]:
            print(name, *test["said"], sep="\n  ", file=sys.stderr)


if __name__ == "__main__":
    main()
