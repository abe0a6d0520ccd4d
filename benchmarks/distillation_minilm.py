"""Recovery training of a real encoder: all-MiniLM-L6-v2 made 1.5 x as fast, then trained by matching outputs.

    python benchmarks/distillation_minilm.py                 # 25 minutes on two idle cores
    python benchmarks/distillation_minilm.py --steps 200     # minutes
    python benchmarks/distillation_minilm.py --folder F      # keeps the models there, and goes on where it was cut off

Pruned by PruneAdaptive on sentences (TinyStories), then trained without labels. Half of the rows trained on are these
sentences, half are spans of running text, 5 to 31 words from anywhere in it, of which every seventh word was replaced
by another of the text: what the teacher says of them is right whatever they mean. Judged by the cosine of mean-pooled
embeddings with the original's on 256 sentences that neither saw, from the same stories, and on 256 from other stories.
The table of words is not trained: it is half of the weights, and a step takes 2.5 times as long with it.

``--step-seconds`` measures how long a step takes, on an idle machine, and nothing else: the training itself may run
beside other work.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from encoder_int8 import batches, fidelity
from harness import write_result
from lowbit import TEXT
from pruning_data import minilm as fused
from pruning_data import sentences_of, strangers, texts
from rich.console import Console
from rich.table import Table

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.passes import Distill, PruneAdaptive
from onnxlathe.runtime.artifact import save
from onnxlathe.runtime.inference import open_session, run_session, session_options

Array = np.ndarray[Any, Any]
ROWS = 32
REPLACED = 0.15
STEP_SECONDS = "step-seconds.txt"
SORTED = 64
"""Batches among which rows are sorted by length, so that little is padding."""


def spans(words: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Stretches of running text, with words replaced by others of it."""
    found: list[str] = []
    for _ in range(count):
        length = int(rng.integers(5, 32))
        start = int(rng.integers(0, len(words) - length))
        part = words[start : start + length]
        found.append(" ".join(w if rng.random() > REPLACED else words[int(rng.integers(len(words)))] for w in part))
    return found


def training_rows(known: list[str], count: int) -> list[str]:
    """``count`` rows of text, neighbours of about the same length."""
    rng = np.random.default_rng(5)
    allowed = set(known)
    text = sentences_of(TEXT.read_text()) if TEXT.exists() else known
    words = " ".join(part for part in text if part in allowed).split()
    rows: list[str] = []
    while len(rows) < count // 2:
        rows += [known[index] for index in rng.permutation(len(known))]
    rows = rows[: count // 2] + spans(words, count - count // 2, rng)
    mixed = [rows[index] for index in rng.permutation(len(rows))]
    chunk = ROWS * SORTED
    return [row for start in range(0, count, chunk) for row in sorted(mixed[start : start + chunk], key=len)]


def pruned(teacher: ir.Model, known: list[str], folder: Path, options: argparse.Namespace) -> tuple[ir.Model, str]:
    """The smaller model and what its report says, made anew unless they are in the folder."""
    path, notes = folder / "pruned.onnx", folder / "pruned.txt"
    if not path.exists():
        student = teacher.clone()
        feeds = batches(sorted(known[: options.sentences], key=len), ROWS)
        mixed = [feeds[index] for index in np.random.default_rng(0).permutation(len(feeds))]
        context = PassContext(feeds=mixed, threads=options.threads)
        outcome = PruneAdaptive(speedup=1.5, sizes={"batch": 1, "sequence": 128})(student, context)
        notes.write_text("\n".join(outcome.notes))
        save(student, path)
    student = load_model(path)
    infer_shapes(student)
    return student, notes.read_text()


def distillation(teacher: ir.Model, rows: list[str], steps: int, lr: float, checkpoint: Path | None) -> Distill:
    """The training."""
    return Distill(
        teacher=teacher,
        data=batches(rows, ROWS),
        steps=steps,
        lr=lr,
        held_out=0.005,
        exclude=("*word_embeddings*",),
        checkpoint=checkpoint,
    )


def seconds_of_a_step(teacher: ir.Model, student: ir.Model, rows: list[str], threads: int) -> float:
    """The median over stretches of ten steps."""
    said: list[tuple[int, float]] = []

    def progress(text: str) -> None:
        found = re.search(r"step (\d+)/", text)
        if found:
            said.append((int(found[1]), time.monotonic()))

    distillation(teacher, rows, 150, 1e-4, None)(student, PassContext(threads=threads, progress=progress))
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(said[1:]))


def main() -> None:
    """Prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--lr", type=float, default=0.01, help="relative learning rate")
    parser.add_argument("--sentences", type=int, default=6000, help="to prune on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the models here; a pruned one that is there is used")
    parser.add_argument("--prune", action="store_true", help="only prune (with --folder)")
    parser.add_argument("--step-seconds", action="store_true", help="only measure a step (with --folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run(folder, options)


def run(folder: Path, options: argparse.Namespace) -> None:
    """Prunes, trains and judges in a folder."""
    teacher = fused(folder)
    known, judged = texts(1 << 20)
    judges = {"the same stories": batches(judged, 32), "other stories": batches(strangers()[: len(judged)], 32)}
    judges = {name: feeds for name, feeds in judges.items() if feeds}

    def results(model: ir.Model) -> dict[str, list[Array]]:
        session = open_session(model, session_options(threads=options.threads))
        return {
            name: [next(iter(run_session(session, sample).values())) for sample in feeds]
            for name, feeds in judges.items()
        }

    reference = results(teacher)

    def judge(model: ir.Model) -> dict[str, dict[str, float]]:
        got = results(model)
        return {name: fidelity(reference[name], got[name], feeds) for name, feeds in judges.items()}

    student, notes = pruned(teacher, known, folder, options)
    if options.step_seconds:
        rows = training_rows(known, ROWS * 400)
        (folder / STEP_SECONDS).write_text(str(seconds_of_a_step(teacher, student, rows, options.threads)))
        return
    figures = {"pruned": judge(student)}
    print("pruned:", notes, figures, sep="\n", flush=True)
    if options.prune:
        content = {**figures, "sentences": {"pruned on": options.sentences}, "notes": notes.splitlines()}
        print(write_result("distillation_minilm_pruned", options.threads, content, set()))
        return
    began = time.monotonic()
    with Console(stderr=True).status("training") as status:
        rows = training_rows(known, ROWS * options.steps)
        step = distillation(teacher, rows, options.steps, options.lr, folder / "training.checkpoint")
        outcome = step(student, PassContext(threads=options.threads, progress=status.update))
    measured = folder / STEP_SECONDS
    minutes = (time.monotonic() - began) / 60
    if measured.exists():
        minutes = options.steps * float(measured.read_text()) / 60
    save(student, folder / "distilled.onnx")
    figures["distilled"] = judge(student)
    title = f"MiniLM, pruned for 1.5 x the speed, {options.steps} steps, {minutes:.1f} minutes"
    table = Table("", "judged on", *figures["pruned"]["the same stories"], title=title)
    for name, found in figures.items():
        for which, row in found.items():
            table.add_row(name, which, *(f"{value:.4f}" for value in row.values()))
    Console().print(table, *outcome.notes)
    content = {
        **figures,
        "steps": options.steps,
        "minutes": minutes,
        "minutes are": "steps x seconds of a step on an idle machine" if measured.exists() else "as they passed",
        "sentences": {"pruned on": options.sentences, "trained on": len(known)},
        "notes": [*notes.splitlines(), *outcome.notes],
    }
    print(write_result("distillation_minilm", options.threads, content, set()))


if __name__ == "__main__":
    main()
