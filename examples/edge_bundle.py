"""Compiles a small network to int8 for devices that are elsewhere, and writes a bundle that tests itself there.

python examples/edge_bundle.py
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch
from torch import nn

import onnxlathe as lathe
from onnxlathe.compiler.compiled import Compiled


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).eval()


def compile_for_web(module: nn.Module) -> Compiled:
    model = lathe.export(module, (torch.rand(4, 784),), dynamic_shapes={"input": {0: "batch"}})
    name = model.graph.inputs[0].name or ""
    rng = np.random.default_rng(0)
    samples = [{name: rng.random((16, 784), np.float32)} for _ in range(4)]  # take real data

    # Passes that make nodes which the browser has no kernel for are left out; what cannot run there is an error.
    return lathe.compile(model, "edge", calibration=samples, target="web")


def main() -> None:
    out = compile_for_web(build())
    print(out.report.summary())
    folder = out.save("digits.onnx", bundle=True)
    print(*sorted(path.name for path in folder.iterdir()))
    # On the device this needs onnxruntime and numpy only; web.html is the same test in a browser.
    subprocess.run([sys.executable, folder / "selftest.py"], check=True)


if __name__ == "__main__":
    main()
