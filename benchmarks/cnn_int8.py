"""A real MNIST classifier in int8 on the CPU: top-1 and speed against ORT's and NNCF's quantization.

    python benchmarks/peers.py && python benchmarks/cnn_int8.py [--data ../shared/data/mnist]

Calibrated on the first 1000 test digits, judged on the other 9000. Speed is against the float model in ONNX Runtime
with its default optimizations; the model takes one image at a time.
"""

from __future__ import annotations

import argparse
import gzip
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness import Side, compare, quantize, run_once, write_result
from peers import python_of
from rich.console import Console
from rich.table import Table

CALIBRATION = 1000
SIDES = {
    "onnxlathe": ("onnxlathe static", "ours", "lathe", "ours"),
    "ORT static": ("ORT static", "ours", "ort", "ours"),
    "onnxsim static": ("onnxsim static", "onnxsim", "ort", "ours"),
    "NNCF in ORT": ("NNCF", "nncf", "ort", "ours"),
    "NNCF in OpenVINO": ("NNCF", "nncf", "openvino", "nncf"),
}


def digits(folder: Path) -> tuple[Any, Any]:
    """Images [10000, 1, 28, 28] in 0..255 as float32, and labels."""
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 1, 28, 28).astype(np.float32)
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read()[8:], np.uint8)
    return images, labels


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent.parent.parent / "shared" / "data" / "mnist")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="per turn")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import onnxlathe as lathe
    from onnxlathe.passes.simplify.upgrade_opset import UpgradeOpset

    images, labels = digits(options.data)
    original = options.data / "mnist_conv.onnx"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = folder / "opset17.onnx"  # opset 8 as published, which NNCF and ORT's quantizer do not take
        lathe.compile(original, [UpgradeOpset(to=17)], progress=False).save(source)
        calibration = folder / "calibration"
        calibration.mkdir()
        for number in range(CALIBRATION):
            np.savez(calibration / f"{number:04}.npz", Input3=images[number : number + 1])
        held = folder / "held.npz"  # all of them: the worker runs them one by one
        np.savez(held, Input3=images[CALIBRATION:])
        sample = folder / "one.npz"
        np.savez(sample, Input3=images[:1])
        sides = [Side("ORT fp32", "ort", str(original))]
        for name, (tool, python, kind, runner) in SIDES.items():
            target = folder / f"{tool}.onnx".replace(" ", "-")
            side = Side(name, kind, str(target), python=runner)
            side.failure = "" if target.exists() else quantize(tool, source, target, calibration, python)
            sides.append(side)
        accuracy: dict[str, float] = {}
        for side in sides:
            if not side.failure:
                scores = run_once(side, [held], options.threads, by_row=True)[0]
                accuracy[side.name] = float((scores.reshape(-1, 10).argmax(1) == labels[CALIBRATION:]).mean())
        results = compare(
            sides, {"one image": sample}, threads=options.threads, rounds=options.rounds, seconds=options.seconds,
            reference={},
        )  # fmt: skip
    table = Table(title=f"MNIST int8, CPU, {options.threads} threads: top-1 on 9000 digits, speed times ORT fp32")
    for column in ("side", "top-1", "change", "speed"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for side in sides:
        if side.failure or not results[side.name]:
            table.add_row(side.name, side.failure)
            continue
        row = results[side.name]["one image"]
        change = f"{100 * (accuracy[side.name] - accuracy['ORT fp32']):+.2f} points"
        table.add_row(
            side.name, f"{100 * accuracy[side.name]:.2f} %", change, f"{row['ratio']:.2f} ±{row['spread']:.2f}"
        )
    Console(width=120).print(table)
    notes = {
        side.name: {"failure": side.failure, "top-1": accuracy.get(side.name), "speed": results[side.name]}
        for side in sides
    }
    installed = {name for name in ("nncf", "onnxsim") if python_of(name).exists()}
    print("wrote", write_result("cnn_int8", options.threads, {"sides": notes}, {"ours", *installed}))


if __name__ == "__main__":
    main()
