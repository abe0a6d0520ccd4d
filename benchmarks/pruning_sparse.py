"""Zeros in the weights of two real models, without training: what they cost in quality, and in bytes.

    python benchmarks/pruning_sparse.py                          # a quarter of an hour on an idle machine
    python benchmarks/pruning_sparse.py --only "70 %" peers      # these; the other figures of the JSON stay
    python benchmarks/pruning_sparse.py --quick                  # few stories, no MiniLM

stories260k: increase in nats per token on 80 held-out stories (magnitude and a random mask as controls). Calibration is
on other stories: 80 of the same file and, where ../shared has the longer validation text, those of it that are not in
that file. MiniLM: cosine of pooled embeddings with the dense model's on held-out sentences. Layers: squared error on
inputs of the dense model from held-out text; ratios to SparseGPT without refit, as in its paper, and with.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from encoder_int8 import batches, pooled, save_all, sentences
from harness import RESULTS, exported, write_result
from lowbit import TEXT, Feeds, Judge, sample_of
from pruners import pruned_by
from pruning_data import story_samples
from rich.console import Console
from rich.table import Table

from onnxlathe.compiler.base import Outcome, PassContext
from onnxlathe.compiler.exporting.export_lm import export_causal_lm
from onnxlathe.compiler.load import load_model
from onnxlathe.models.stories import heldout_stories, split_stories, stories260k
from onnxlathe.passes import Cleanup, FoldConstants, PruneSparse
from onnxlathe.passes.pruning.sparse_layers import Prunable, find_prunable
from onnxlathe.passes.pruning.sparse_solvers import Goal, Second, loss, prune
from onnxlathe.passes.pruning.sparse_walk import Moments, original_moments
from onnxlathe.runtime.artifact import save
from onnxlathe.runtime.inference import open_session, run_session, session_options

GOALS: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}, "70 %": {"sparsity": 0.7}}
PARTS = [*GOALS, "layers", "peers", "minilm", "minilm layers"]
PEERS = [("50 %", "onnxsim Wanda"), ("50 %", "onnxsim SparseGPT"), ("2:4", "onnxsim Wanda 2:4")]
PEERS += [("2:4", "onnxsim SparseGPT 2:4"), ("70 %", "onnxsim SparseGPT"), ("50 %", "NNCF")]
PLAIN = {"refit": False, "target": 0.0}
SIDES: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", **PLAIN},
    "random mask": {"method": "magnitude", **PLAIN},
    "Wanda": {"method": "wanda", **PLAIN},
    "SparseGPT": {"method": "sparsegpt", **PLAIN},
    "SparseGPT + refit": {"method": "sparsegpt", "target": 0.0},
    "ADMM + refit": {"target": 0.0},
    "ADMM + refit, original's outputs": {},
    "the same, biases": {"add_bias": True},
    "the same, shares by effect": {"add_bias": True, "allocation": "sensitivity"},
    "the same, tokens shuffled": {"add_bias": True, "allocation": "sensitivity"},
}


@dataclasses.dataclass
class Row:
    """One way to prune: its loss, and the bytes of the file compressed."""

    model: str
    goal: str
    side: str
    figure: float
    zeros: float
    compressed: int


def more_stories() -> list[Feeds]:
    """The stories of the longer validation text that are not among the held-out ones."""
    if not TEXT.is_file():
        return []
    openings = {story[:60] for story in heldout_stories()}
    texts = split_stories(TEXT.read_text(encoding="utf-8"))
    return [sample_of(story) for story in texts if not any(opening in story for opening in openings)]


def shuffled(feeds: list[Feeds]) -> list[Feeds]:
    """The samples with their tokens in random order: a control, as calibration text that means nothing."""
    rng = np.random.default_rng(0)
    return [{**sample, "input_ids": rng.permuted(sample["input_ids"], axis=1)} for sample in feeds]


def with_random_masks(dense: ir.Model, pruned: ir.Model) -> ir.Model:
    """``dense`` with as many zeros in each weight as ``pruned`` has, anywhere."""
    rng = np.random.default_rng(0)
    model = dense.clone()
    for weight in find_prunable(model, (), (), Outcome()):
        matrix = weight.matrix()
        mask = pruned.graph.initializers[weight.name].const_value.numpy() != 0  # type: ignore[union-attr]
        kept = rng.permutation(mask.reshape(-1)).reshape(matrix.shape)
        weight.value.const_value = weight.stored(matrix * kept)
    return model


def packed(model: ir.Model) -> int:
    """Bytes of the file that ``save`` writes to ``.onnx.gz``."""
    return len(gzip.compress(ir.to_proto(model).SerializeToString(), mtime=0))


def row_of(name: str, goal: str, side: str, model: ir.Model, figure: float) -> Row:
    """The figures of one pruned model."""
    arrays = [weight.matrix() for weight in find_prunable(model, (), (), Outcome())]
    zeros = sum(int((array == 0).sum()) for array in arrays) / sum(array.size for array in arrays)
    return Row(name, goal, side, figure, zeros, packed(model))


def by_peers(model: ir.Model, calibration: list[Feeds]) -> Iterator[tuple[str, str, ir.Model | str]]:
    """Goal, tool, and what onnxsim and NNCF make of the model, or why they do not."""
    with tempfile.TemporaryDirectory() as temporary:
        source, target, samples = (Path(temporary) / name for name in ("source.onnx", "target.onnx", "samples"))
        save(model, source)
        save_all(calibration, samples)
        for goal, tool in PEERS:
            failure = pruned_by(tool, GOALS[goal].get("sparsity", 0.5), source, target, samples)
            yield goal, tool, failure or load_model(target)


def stories(quick: bool, parts: set[str], console: Console) -> Iterator[tuple[float, list[Row], list[dict[str, Any]]]]:
    """Nats a token of the dense model, the rows so far, and the layers' errors; one goal after the other."""
    calibration, judged = story_samples(16 if quick else 80)
    calibration = calibration if quick else calibration + more_stories()
    tokens = sum(sample["input_ids"].size for sample in calibration)
    console.print(f"{len(calibration)} stories to calibrate on, {tokens} tokens")
    model = export_causal_lm(stories260k(), check=False)
    for step in (Cleanup(), FoldConstants()):
        step(model, PassContext())
    judge = Judge(model, judged)
    errors = list(layers("stories260k", model, calibration[:80], judged)) if "layers" in parts else []
    rows: list[Row] = []
    for goal, options in GOALS.items():
        if goal not in parts:
            continue
        for side, choice in SIDES.items():
            if goal == "2:4" and side == "the same, shares by effect":
                continue
            if goal == "2:4":
                choice = {key: value for key, value in choice.items() if key != "allocation"}
            feeds = shuffled(calibration) if "shuffled" in side else calibration
            changed = model.clone()
            PruneSparse(**options, **choice)(changed, PassContext(feeds=feeds, threads=1))
            changed = with_random_masks(model, changed) if side == "random mask" else changed
            rows.append(row_of("stories260k", goal, side, changed, judge(changed)[0]))
            console.print(f"stories260k {goal} {side}: {rows[-1].figure:+.4f} nats a token")
        yield judge.loss, rows, errors
    for goal, tool, changed in by_peers(model, calibration) if "peers" in parts else ():
        if isinstance(changed, str):
            console.print(f"{goal} {tool}: {changed}")
        else:
            rows.append(row_of("stories260k", goal, tool, changed, judge(changed)[0]))
            console.print(f"stories260k {goal} {tool}: {rows[-1].figure:+.4f} nats a token")
    yield judge.loss, rows, errors


def minilm(parts: set[str], console: Console) -> tuple[list[Row], list[dict[str, Any]]]:
    """Fidelity of MiniLM, and its layers' errors."""
    model = load_model(exported("minilm"))
    for step in (Cleanup(), FoldConstants()):
        step(model, PassContext())
    texts = sentences()
    calibration, judged = batches(texts[:512], 16), batches(texts[512:768], 16)
    output = model.graph.outputs[0].name or ""

    def embeddings(changed: ir.Model) -> Any:
        session = open_session(changed, session_options(threads=2))
        return pooled([run_session(session, sample, [output])[output] for sample in judged], judged)

    reference, rows = embeddings(model), list[Row]()
    for side in ("magnitude", "SparseGPT", "ADMM + refit, original's outputs") if "minilm" in parts else ():
        changed = model.clone()
        PruneSparse(**SIDES[side])(changed, PassContext(feeds=calibration, threads=2))
        cosine = float((reference * embeddings(changed)).sum(1).mean())
        rows.append(row_of("MiniLM", "50 %", side, changed, cosine))
        console.print(f"MiniLM 50 % {side}: cosine {cosine:.4f}")
    return rows, list(layers("MiniLM", model, calibration, judged)) if "minilm layers" in parts else []


def layers(name: str, model: ir.Model, calibration: list[Feeds], judged: list[Feeds]) -> Iterator[dict[str, Any]]:
    """Each layer alone, on the dense model's inputs: errors of three ways to get half of the weights."""
    weights = find_prunable(model, (), (), Outcome())
    fit = _moments(model, weights, calibration)
    judge = _moments(model, weights, judged)
    for weight in weights:
        matrix, goal = weight.matrix()[0], Goal(weight.size // 2)
        seen, unseen = Second(fit[weight]), Second(judge[weight])
        errors: dict[str, float] = {}
        for side, method, refitted in (
            ("SparseGPT", "sparsegpt", False),
            ("SparseGPT + refit", "sparsegpt", True),
            ("ADMM + refit", "admm", True),
        ):
            errors[side] = loss(matrix, prune(matrix, seen, goal, method, refitted), unseen)  # type: ignore[arg-type]
        whole = loss(matrix, np.zeros_like(matrix), unseen)
        yield {"model": name, "weight": weight.name, **{side: figure / whole for side, figure in errors.items()}}


def _moments(model: ir.Model, weights: list[Prunable], feeds: list[Feeds]) -> dict[Prunable, Any]:
    found: dict[Prunable, Moments] = dict(original_moments(model, weights, PassContext(feeds=feeds, threads=2)))
    return {weight: moments.hessian[0] for weight, moments in found.items() if moments.hessian is not None}


def report(base: float, rows: list[Row], errors: list[dict[str, Any]], name: str, console: Console) -> None:
    """Prints the tables and writes the JSON, with what it has of other parts."""
    path = RESULTS / f"{name}.json"
    if path.exists():
        before = json.loads(path.read_text())
        known = {(row.model, row.goal, row.side) for row in rows}
        measured = {item["model"] for item in errors}
        kept = [Row(**row) for row in before["rows"] if (row["model"], row["goal"], row["side"]) not in known]
        rows = sorted([*kept, *rows], key=lambda row: (row.model != "stories260k", list(GOALS).index(row.goal)))
        errors = [item for item in before["layers"] if item["model"] not in measured] + errors
    magnitude = {(row.model, row.goal): row.figure for row in rows if row.side == "magnitude"}
    table = Table("model", "goal", "side", "nats more / cosine", "/ magnitude", "zeros", ".onnx.gz bytes")
    for row in rows:
        share = f"{row.figure / magnitude[row.model, row.goal]:.3f}" if row.model == "stories260k" else ""
        figure, zeros = f"{row.figure:.4f}", f"{row.zeros:.4f}"
        table.add_row(row.model, row.goal, row.side, figure, share, zeros, str(row.compressed))
    console.print(f"stories260k, dense: {base:.4f} nats a token")
    console.print(table)
    ratios: dict[str, dict[str, float]] = {}
    for model in dict.fromkeys(item["model"] for item in errors):
        for other in ("SparseGPT", "SparseGPT + refit"):
            values = [item["ADMM + refit"] / item[other] for item in errors if item["model"] == model]
            spread = {"median": float(np.median(values)), "smallest": min(values), "largest": max(values)}
            ratios[f"{model}, ADMM + refit / {other}"] = spread
    console.print("layer errors at 50 % on held-out text", ratios)
    content = {"dense": base, "rows": [dataclasses.asdict(row) for row in rows], "ratios": ratios, "layers": errors}
    write_result(name, 1, content, {"onnxsim"})


def main() -> None:
    """Each goal on stories260k, then MiniLM; what is known is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    console, parts = Console(), set(options.only)
    name = "pruning_sparse-quick" if options.quick else "pruning_sparse"
    base, rows, errors = 0.0, list[Row](), list[dict[str, Any]]()
    for base, rows, errors in stories(options.quick, parts, console):
        report(base, rows, errors, name, console)
    if not options.quick and parts & {"minilm", "minilm layers"}:
        more, layer_errors = minilm(parts, console)
        report(base, rows + more, errors + layer_errors, name, console)


if __name__ == "__main__":
    main()
