"""Recovery training on digits: half of a network's channels, weights of two to four values, with and without labels.

    python benchmarks/distillation.py             # half an hour on an idle core
    python benchmarks/distillation.py --quick     # one seed, few steps
    python benchmarks/distillation.py --judge validation   # to choose settings

shared/data/mnist has 10,000 digits (t10k), in a fixed order drawn with seed 0: the first 2,000 only judge, 6,000 are
trained on, shifted by up to two pixels and turned by up to ten degrees, and by the last 2,000 the settings below were
chosen. The network was trained by others, on MNIST's 60,000 training digits; its logits are divided by 256 first, which
changes no answer, so that cross entropy has a sane scale. For each student: accuracy before training, and after as many
steps with the teacher and the true labels, with the teacher alone (no labels), and with the labels alone (no teacher);
for three seeds.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from harness import write_result
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy import ndimage

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.graph import Names, add_initializer, is_op, make_node
from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.passes import Distill, PruneWidth
from onnxlathe.passes.low_bit.few_levels import Levels, few_levels
from onnxlathe.runtime.inference import open_session, run_session, session_options

Array = np.ndarray[Any, Any]
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
ROWS, COPIES = 64, 10
PARTS = {"held out": slice(0, 2000), "trained on": slice(2000, 8000), "validation": slice(8000, 10000)}
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


def half_the_channels(model: ir.Model, feeds: list[dict[str, Array]], threads: int) -> ir.Model:
    """The half of each convolution's channels that PruneWidth keeps, the layers behind them fitted."""
    model = model.clone()
    step = PruneWidth(ratio=0.5, what=("channels",), multiple=1)
    outcome = step(model, PassContext(feeds=feeds, threads=threads))
    print(*outcome.notes, sep="\n")
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
    trained, unseen = order[PARTS["trained on"]], order[PARTS[options.judge]]
    rng = np.random.default_rng(1)
    feeds: list[dict[str, Array]] = []
    for _ in range(2 if options.quick else COPIES):
        mixed = rng.permutation(trained)
        pixels = varied(images[mixed], rng)
        parts = range(0, len(mixed), ROWS)
        feeds += [{"pixels": pixels[at : at + ROWS], "labels": labels[mixed[at : at + ROWS]]} for at in parts]
    teacher = network()
    plain = [{"pixels": images[trained[at : at + ROWS]]} for at in range(0, len(trained), ROWS)]
    students = {CHANNELS: half_the_channels(teacher, plain, options.threads)}
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
        "images trained on": len(trained),
        "images judged on": len(unseen),
        "judged on": options.judge,
    }
    name = "distillation_mnist" if options.judge == "held out" else "distillation_mnist-validation"
    print(write_result(name, options.threads, content, set()))


def main() -> None:
    """Prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="updates; the default is said above")
    parser.add_argument("--lr", type=float, help="relative learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--judge", choices=("held out", "validation"), default="held out")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    mnist(options)


if __name__ == "__main__":
    main()
