"""Recovery training of real networks: half the channels, weights of two to four values, an encoder made 1.5 x as fast.

    python benchmarks/distillation.py mnist              # digits: about half an hour
    python benchmarks/distillation.py minilm             # all-MiniLM-L6-v2: half an hour; --steps 200 takes minutes
    python benchmarks/distillation.py mnist --quick      # one seed, few steps

mnist: shared/data/mnist has 10,000 digits (t10k). 8,000 of them, drawn with seed 0, are trained on, shifted by up to
two pixels and turned by up to ten degrees; 2,000 only judge. The network was trained by others, on MNIST's
60,000 training digits; its logits are divided by 256 first, which changes no answer, so that cross entropy
has a sane scale. For each student: accuracy before training, and after the same number of steps with the teacher and
the true labels, with the teacher alone (no labels), and with the labels alone (no teacher); for three seeds.

minilm: pruned by PruneAdaptive on 2,000 sentences, then trained on more of them (TinyStories), without labels, by
matching outputs; judged on 256 others by the cosine of mean-pooled embeddings with the original's.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from encoder_int8 import batches, fidelity
from harness import write_result
from pruning_structured import minilm as fused
from pruning_structured import texts
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy import ndimage

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.graph import Names, add_initializer, is_op, make_node
from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.passes import Distill, PruneAdaptive
from onnxlathe.passes.low_bit.few_levels import Levels, few_levels
from onnxlathe.runtime.artifact import save
from onnxlathe.runtime.inference import open_session, run_session, session_options

Array = np.ndarray[Any, Any]
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
ROWS, COPIES, TRAINED = 64, 10, 8000
CALIBRATION_SENTENCES = 2000
LEVELS: tuple[Levels, ...] = ("midrise", "ternary", "binary")
SOFTEN = 256.0
GOALS: dict[str, dict[str, float]] = {
    "teacher and labels": {"soft": 1.0, "hard": 1.0, "temperature": 1.0},
    "teacher alone": {"soft": 1.0, "temperature": 4.0},
    "labels alone": {"hard": 1.0},
}
CHANNELS = "half the channels"


def digits() -> tuple[Array, Array]:
    """Images [10000, 1, 28, 28] in 0..255 as float32, and labels."""
    with gzip.open(SHARED / "mnist" / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 1, 28, 28).astype(np.float32)
    with gzip.open(SHARED / "mnist" / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read()[8:], np.uint8).astype(np.int64)
    return images, labels


def varied(images: Array, rng: np.random.Generator) -> Array:
    """Every image shifted and turned a little."""
    found = np.empty_like(images)
    for number, image in enumerate(images[:, 0]):
        turned = ndimage.rotate(image, rng.uniform(-10, 10), reshape=False, order=1)
        found[number, 0] = ndimage.shift(turned, rng.uniform(-2, 2, 2), order=1)
    return found


def network() -> ir.Model:
    """The digit network for any batch, constants folded, its logits divided by ``SOFTEN``."""
    model = load_model(SHARED / "mnist" / "mnist_conv.onnx")
    pixels = model.graph.inputs[0]
    pixels.name, pixels.shape = "pixels", ir.Shape(["batch", 1, 28, 28])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    model = lathe.compile(_any_batch(model), ["upgrade-opset", "fold-constants"], verify=False, progress=False).model
    matrix, bias = (node.inputs[1] for node in list(model.graph)[-2:])
    for value in (matrix, bias):
        _set(value, _get(value) / SOFTEN)
    return model


def _any_batch(model: ir.Model) -> ir.Model:
    last = next(node for node in model.graph if is_op(node, "Reshape") and node.inputs[0].producer() is not None)
    _set(last.inputs[1], np.array([-1, 256], np.int64))
    model.graph.outputs[0].shape = ir.Shape(["batch", 10])
    infer_shapes(model)
    return model


def _get(value: ir.Value | None) -> Array:
    if value is None or value.const_value is None:
        raise ValueError("not a constant")
    return value.const_value.numpy()


def _set(value: ir.Value | None, array: Array) -> None:
    if value is None:
        raise ValueError("not a constant")
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
    value.shape = ir.Shape(array.shape)


def half_the_channels(model: ir.Model) -> ir.Model:
    """The half of each convolution's channels with the largest filters; no compensation."""
    model = model.clone()
    convolutions = [node for node in model.graph if is_op(node, "Conv")]
    kept: Array = np.arange(1)
    for node in convolutions:
        weight, bias = node.inputs[1], next(iter(node.outputs[0].uses())).node.inputs[1]
        array = _get(weight)
        size = np.sort(np.argsort(-np.square(array).sum((1, 2, 3)))[: len(array) // 2])
        _set(weight, array[size][:, kept])
        _set(bias, _get(bias)[size])
        kept = size
    matrix = next(node for node in model.graph if is_op(node, "MatMul")).inputs[1]
    _set(matrix, _get(matrix).reshape(16, -1, 10)[kept].reshape(-1, 10))
    reshape = next(node for node in model.graph if is_op(node, "Reshape"))
    _set(reshape.inputs[1], np.array([-1, 128], np.int64))
    for node in model.graph:
        for value in node.outputs:
            value.shape = value.shape if value.is_graph_output() else None
    infer_shapes(model)
    return model


def with_few_levels(model: ir.Model, levels: Levels) -> ir.Model:
    """All three weights as int8 codes of a few levels behind DequantizeLinear, one scale an output."""
    model = model.clone()
    names = Names(model)
    for node in [node for node in model.graph if is_op(node, "Conv", "MatMul")]:
        weight = node.inputs[1]
        array = _get(weight)
        rows = array.reshape(len(array), -1) if is_op(node, "Conv") else array.T
        codes, grid = few_levels(np.ascontiguousarray(rows), levels, rows.shape[1])
        centred = (codes.astype(np.int16) - grid.zero_points[0, 0]).astype(np.int8)
        axis = 0 if is_op(node, "Conv") else 1
        base = f"{node.name}_{levels}"
        stored = centred.reshape(array.shape) if axis == 0 else np.ascontiguousarray(centred.T)
        values = [
            add_initializer(model.graph, names, f"{base}_codes", stored),
            add_initializer(model.graph, names, f"{base}_scales", grid.scales[:, 0]),
        ]
        made = make_node(
            "DequantizeLinear", values, name=base, output=f"{base}_weight", like=weight, attributes={"axis": axis}
        )
        model.graph.insert_before(node, made)
        node.replace_input_with(1, made.outputs[0])
    return model


def accuracy(model: ir.Model, images: Array, labels: Array) -> float:
    """Share of right answers in percent."""
    session = open_session(model, session_options(threads=1))
    found = next(iter(run_session(session, {"pixels": images}).values())).argmax(1)
    return 100 * float((found == labels).mean())


def mnist(options: argparse.Namespace) -> None:
    """Channels and few levels on digits."""
    images, labels = digits()
    order = np.random.default_rng(0).permutation(len(images))
    trained, unseen = order[:TRAINED], order[TRAINED:]
    rng = np.random.default_rng(1)
    feeds: list[dict[str, Array]] = []
    for _ in range(2 if options.quick else COPIES):
        mixed = rng.permutation(trained)
        pixels = varied(images[mixed], rng)
        parts = range(0, len(mixed), ROWS)
        feeds += [{"pixels": pixels[at : at + ROWS], "labels": labels[mixed[at : at + ROWS]]} for at in parts]
    teacher = network()
    students = {CHANNELS: half_the_channels(teacher)}
    students |= {f"{levels} weights": with_few_levels(teacher, levels) for levels in LEVELS}
    full = accuracy(teacher, images[unseen], labels[unseen])
    seeds = range(1 if options.quick else 3)
    columns = [column for goal in GOALS for column in (goal, "drop")]
    table = Table("student", "untrained", *columns, title=f"teacher {full:.2f} %")
    rows: dict[str, Any] = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("training", total=len(students) * len(seeds) * len(GOALS))
        for name, student in students.items():
            steps = options.steps or (300 if options.quick else 4000 if name == CHANNELS else 2000)
            rate = options.lr or (0.02 if name == CHANNELS else 0.005)
            row: dict[str, Any] = {"untrained": accuracy(student, images[unseen], labels[unseen]), "steps": steps}
            for kind, goal in GOALS.items():
                row[kind] = []
                for seed in seeds:
                    progress.update(task, advance=1, description=f"{name}, {kind}, seed {seed}")
                    after = student.clone()
                    step = Distill(teacher=teacher, data=feeds, steps=steps, lr=rate, **goal)
                    step(after, PassContext(seed=seed, threads=options.threads))
                    row[kind].append(accuracy(after, images[unseen], labels[unseen]))
            rows[name] = row
            cells = [f"{row['untrained']:.2f}"]
            for kind in GOALS:
                cells += [" ".join(f"{value:.2f}" for value in row[kind]), f"{full - statistics.mean(row[kind]):.2f}"]
            table.add_row(name, *cells)
    Console().print(table)
    content = {
        "teacher": full,
        "students": rows,
        "batch": ROWS,
        "images trained on": TRAINED,
        "images judged on": len(unseen),
    }
    print(write_result("distillation_mnist", options.threads, content, set()))


def minilm(options: argparse.Namespace) -> None:
    """MiniLM pruned for 1.5 x its speed, then trained by matching outputs."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        teacher = fused(folder)
        steps, rows = options.steps or (40 if options.quick else 900), 32
        known, unseen = texts(CALIBRATION_SENTENCES + steps * rows)
        judged = batches(unseen, 32)

        def results(model: ir.Model) -> list[Array]:
            session = open_session(model, session_options(threads=options.threads))
            return [next(iter(run_session(session, sample).values())) for sample in judged]

        reference = results(teacher)
        context = PassContext(feeds=batches(known[:CALIBRATION_SENTENCES], 16), threads=options.threads)
        path, notes = folder / "pruned.onnx", folder / "pruned.txt"
        if not path.exists():
            student = teacher.clone()
            outcome = PruneAdaptive(speedup=1.5, sizes={"batch": 1, "sequence": 128})(student, context)
            save(student, path)
            notes.write_text("\n".join(outcome.notes))
        student = load_model(path)
        infer_shapes(student)
        before = fidelity(reference, results(student), judged)
        print("pruned:", notes.read_text(), before, sep="\n", flush=True)
        picked = sorted(known[: steps * rows], key=len)  # little padding in a batch; the order of batches is drawn
        began = time.monotonic()
        with Console(stderr=True).status("training") as status:
            step = Distill(
                teacher=teacher, data=batches(picked, rows), steps=steps, lr=options.lr or 0.01, held_out=0.03
            )
            outcome = step(student, PassContext(threads=options.threads, progress=status.update))
        minutes = (time.monotonic() - began) / 60
        save(student, folder / "distilled.onnx")
        told = notes.read_text().splitlines()
    after = fidelity(reference, results(student), judged)
    table = Table("", *before, title=f"MiniLM, pruned for 1.5 x the speed, {steps} steps, {minutes:.1f} minutes")
    table.add_row("pruned", *(f"{value:.4f}" for value in before.values()))
    table.add_row("distilled", *(f"{value:.4f}" for value in after.values()))
    Console().print(table, *outcome.notes)
    content = {
        "pruned": before,
        "distilled": after,
        "steps": steps,
        "minutes": minutes,
        "sentences": len(picked),
        "notes": [*told, *outcome.notes],
    }
    print(write_result("distillation_minilm", options.threads, content, set()))


def main() -> None:
    """Prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("mnist", "minilm"))
    parser.add_argument("--steps", type=int, help="updates; the default is said above")
    parser.add_argument("--lr", type=float, help="relative learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="minilm: keep the models here; a pruned one that is there is used")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    mnist(options) if options.what == "mnist" else minilm(options)


if __name__ == "__main__":
    main()
