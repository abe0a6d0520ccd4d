"""Structured pruning on real models: what is lost, what is saved, against magnitude and random choices.

    python benchmarks/pruning_structured.py [--folder F] [--sentences 1500] [--only minilm|stories|layers] [--speed]

MiniLM (fused, fp32): calibration on sentences of TinyStories, fidelity on 256 others as in encoder_int8.py; speed
against the fused model as it is. stories260k: nats a token on stories that calibration did not see, as in lowbit.py.
Layers: the error of feed-forward layers at half their width on the original's inputs, held-out samples, as a share of
what leaving out the best units without a refit loses. ``--speed`` only measures the speed of the models that an earlier
run left in F, so that it can run while the machine is idle. PruneAdaptive, which measures time itself, is judged by
``distillation_minilm.py --prune``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from encoder_int8 import batches, fidelity, random_tokens, save_all
from harness import write_result
from lowbit import Judge
from pruners import pruned_by
from pruning_data import minilm, story_samples, texts
from rich.console import Console
from rich.table import Table

import onnxlathe as lathe
from onnxlathe.compiler.base import Outcome, Pass, PassContext
from onnxlathe.compiler.graph import weight_bytes
from onnxlathe.compiler.load import load_model
from onnxlathe.models.zoo import build
from onnxlathe.passes import PruneDepth, PruneWidth
from onnxlathe.passes.pruning.coupling_rules import coupling_of
from onnxlathe.passes.pruning.cut import cut
from onnxlathe.passes.pruning.fit import bias_place, problem_of
from onnxlathe.passes.pruning.module_times import relative_time
from onnxlathe.passes.pruning.obs import activation_scores, least_squares, magnitude_scores, rank_by, rank_by_obs
from onnxlathe.passes.pruning.prune_width import removed
from onnxlathe.passes.pruning.statistics import moments_of
from onnxlathe.runtime.artifact import load, save
from onnxlathe.runtime.inference import open_session, run_session, session_options

Feeds = dict[str, Any]
SHAPES = ((1, 16), (1, 128), (8, 128))
THREADS = 2


@dataclasses.dataclass
class Row:
    """One way to prune one model."""

    name: str
    bytes: float
    figures: dict[str, float]
    notes: list[str]


def steps() -> Iterator[tuple[str, Pass]]:
    """The passes compared."""
    for ratio in (0.2, 0.5):
        for what in (("ffn",), ("heads",)):
            words = f"{what[0]} width -{ratio:.0%}"
            yield f"{words}, magnitude", PruneWidth(ratio=ratio, what=what, method="magnitude", refit=False)
            yield f"{words}, activation", PruneWidth(ratio=ratio, what=what, method="activation", refit=False)
            yield f"{words}, OBS and refit", PruneWidth(ratio=ratio, what=what)
    for layers in (1, 2):
        for method in ("influence", "replace"):
            yield f"depth -{layers}, {method}", PruneDepth(layers=layers, method=method)  # type: ignore[arg-type]


def at_random(model: ir.Model, ratio: float, seed: int = 0) -> ir.Model:
    """Feed-forward units drawn evenly, without a refit: the control."""
    copy, rng = model.clone(), np.random.default_rng(seed)
    coupling = coupling_of(copy)
    found = [item for item in coupling.dimensions() if item.kind == "ffn"]
    cut(coupling, np.concatenate([rng.permutation(d.units)[: removed(d, ratio, 16)] for d in found]), "random")
    return copy


def by_peers(model: ir.Model, calibration: list[Feeds], folder: Path) -> Iterator[tuple[str, ir.Model | str]]:
    """What onnxsim and NNCF make of the model, or why they do not."""
    source, samples = folder / "source.onnx", folder / "samples"
    save(model, source)
    save_all(calibration, samples)
    tools = [(tool, share) for share in (0.2, 0.5) for tool in ("onnxsim units, Wanda", "onnxsim heads, Wanda")]
    for tool, share in [*tools, ("onnxsim blocks", 1 / 6), ("NNCF", 0.5)]:
        target = folder / "peer.onnx"
        failure = pruned_by(tool, share, source, target, samples)
        yield f"{tool} -{share:.0%}", failure or load_model(target)


def compared(
    model: ir.Model, calibration: list[Feeds], judge: Callable[[ir.Model], dict[str, float]], folder: Path
) -> Iterator[Row]:
    """The model with every pass applied, judged."""
    context = PassContext(feeds=calibration, threads=THREADS)
    yield Row("as it is", 1.0, judge(model), [])
    for ratio in (0.2, 0.5):
        changed = at_random(model, ratio)
        yield Row(f"ffn width -{ratio:.0%}, random", weight_bytes(changed) / weight_bytes(model), judge(changed), [])
    for name, step in steps():
        changed = model.clone()
        outcome: Outcome = step(changed, context)
        save(changed, folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.onnx")
        yield Row(name, weight_bytes(changed) / weight_bytes(model), judge(changed), outcome.notes)
    for name, changed in by_peers(model, calibration, folder):
        if isinstance(changed, str):
            yield Row(name, 1.0, {}, [changed])
        else:
            yield Row(name, weight_bytes(changed) / weight_bytes(model), judge(changed), [])


def run_minilm(folder: Path, count: int) -> list[Row]:
    """MiniLM with every pass."""
    model = minilm(folder)
    calibration, held_texts = texts(count)
    feeds, held = batches(calibration, 16), batches(held_texts, 32)

    def outputs(item: ir.Model) -> list[Any]:
        session = open_session(item, session_options(threads=THREADS))
        return [next(iter(run_session(session, sample).values())) for sample in held]

    expected = outputs(model)
    return _told(compared(model, feeds, lambda item: fidelity(expected, outputs(item), held), folder))


def run_stories(folder: Path, count: int) -> list[Row]:
    """stories260k with every pass that fits it."""
    entry = build("stories260k")
    model = lathe.compile(lathe.export_causal_lm(entry.module, check=False), "basic", progress=False).model
    calibration, judged = story_samples(count)
    base = Judge(model, judged).loss

    def judge(item: ir.Model) -> dict[str, float]:
        names = {value.name: value.shape for value in item.graph.inputs}
        narrow = [{k: v[:, : names[k][1]] if "past" in k else v for k, v in f.items() if k in names} for f in judged]
        loss = Judge(item, narrow).loss
        return {"nats a token": loss, "increase": loss - base}

    stories = folder / "stories"
    stories.mkdir(exist_ok=True)
    return _told(compared(model, calibration, judge, stories))


def _told(rows: Iterator[Row]) -> list[Row]:
    found: list[Row] = []
    for row in rows:
        found.append(row)
        print(row.name, {key: round(value, 4) for key, value in row.figures.items()}, *row.notes, sep=" | ", flush=True)
    return found


def layer_errors(model: ir.Model, calibration: list[Feeds], held: list[Feeds]) -> dict[str, Any]:
    """Error of feed-forward layers at half their width, on held-out samples, energy, as shares of the drop's."""
    found = [item for item in coupling_of(model).dimensions() if item.kind == "ffn" and len(item.consumers) == 1]
    layers = [(item.consumers[0].x, item.consumers[0].layer) for item in found]
    fitted = dict(moments_of(model, layers, PassContext(feeds=calibration, threads=THREADS)))
    judged = dict(moments_of(model, layers, PassContext(feeds=held, threads=THREADS)))
    rows: list[dict[str, float]] = []
    for item in found:
        consumer = item.consumers[0]
        centred = bias_place(consumer.layer) is not None
        problem = problem_of(consumer, item.units, fitted[consumer.x].covariance(centred))
        truth = judged[consumer.x].covariance(centred)
        half = len(item.units) // 2
        drop = {"magnitude": magnitude_scores([problem]), "activation": activation_scores([problem])}
        orders = {name: rank_by(scores).order[:half] for name, scores in drop.items()}
        orders["OBS"] = rank_by_obs([problem], half).order[:half]
        row: dict[str, float] = {}
        for name, order in orders.items():
            kept = np.setdiff1d(np.arange(problem.weight.shape[1]), problem.blocks[order].reshape(-1))
            dropped = np.zeros_like(problem.weight)
            dropped[:, kept] = problem.weight[:, kept]
            cross = problem.weight @ problem.covariance
            fits = {"drop": dropped, "refit": least_squares(problem.weight, problem.covariance, cross, kept, 1e-2)}
            for way, weight in fits.items():
                change = weight - problem.weight
                total = np.einsum("nk,nk->", problem.weight @ truth, problem.weight)
                row[f"{name} {way}"] = float(np.einsum("nk,nk->", change @ truth, change) / total)
        rows.append(row)
    medians = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    ratios: dict[str, Any] = {}
    for name, drops in {"magnitude": ("magnitude drop",), "best": ("magnitude drop", "activation drop")}.items():
        energy = [row["OBS refit"] / min(row[drop] for drop in drops) for row in rows]
        ratios[f"OBS refit / {name} drop, energy"] = {"median": float(np.median(energy)), "layers": energy}
        ratios[f"OBS refit / {name} drop, norm"] = {
            "median": float(np.sqrt(np.median(energy))),
            "layers": [float(np.sqrt(value)) for value in energy],
        }
    return {"layers": rows, "median": medians, **ratios}


def run_layers(folder: Path, count: int) -> dict[str, Any]:
    """Layer errors of both models."""
    calibration, held = texts(count)
    entry = build("stories260k")
    stories = lathe.compile(lathe.export_causal_lm(entry.module, check=False), "basic", progress=False).model
    first, second = story_samples(40)
    return {
        "minilm": layer_errors(minilm(folder), batches(calibration, 16), batches(held, 32)),
        "stories260k": layer_errors(stories, first, second),
    }


def run_speed(folder: Path) -> dict[str, dict[str, float]]:
    """Time of MiniLM as it is over time of each pruned one, by shape."""
    model = minilm(folder)
    found: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("*-*.onnx")):
        other = load(path)
        times = {
            shape: relative_time(model, other, random_tokens(shape), PassContext(threads=THREADS)) for shape in SHAPES
        }
        found[path.stem] = {str(shape): 1 / time for shape, time in times.items()}
        print(path.stem, found[path.stem], flush=True)
    return found


def main() -> None:
    """Prints tables and writes ``results/pruning_structured.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/onnxlathe-pruning"), help="keeps the models")
    parser.add_argument("--sentences", type=int, default=1500)
    parser.add_argument("--stories", type=int, default=40)
    parser.add_argument("--only", choices=("minilm", "stories", "layers"))
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = options.folder / "figures.json"
    content: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    if options.speed:
        content["speed"] = run_speed(options.folder)
    else:
        parts: dict[str, Callable[[], Any]] = {
            "layers": lambda: run_layers(options.folder, options.sentences),
            "stories": lambda: [dataclasses.asdict(row) for row in run_stories(options.folder, options.stories)],
            "minilm": lambda: [dataclasses.asdict(row) for row in run_minilm(options.folder, options.sentences)],
        }
        for name, run in parts.items():
            if options.only in (None, name):
                content[name] = run()
                kept.write_text(json.dumps(content, indent=1))
    _show(content)
    print("wrote", write_result("pruning_structured", THREADS, content, {"onnxsim", "nncf"}))


def _show(content: dict[str, Any]) -> None:
    console = Console(width=150)
    for name in ("minilm", "stories"):
        rows = content.get(name)
        if rows:
            table = Table("side", "bytes", *rows[0]["figures"], title=name)
            for row in rows:
                figures = [f"{value:.4f}" for value in row["figures"].values()]
                table.add_row(row["name"], f"{row['bytes']:.2f}", *(figures or row["notes"]))
            console.print(table)
    for name, found in content.get("layers", {}).items():
        console.print(name, {key: value for key, value in found.items() if key != "layers"})
    for name, found in content.get("speed", {}).items():
        console.print(name, found)


if __name__ == "__main__":
    main()
