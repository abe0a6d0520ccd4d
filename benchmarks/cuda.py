"""An encoder of MiniLM's size (random weights) on an NVIDIA GPU: float16 against what a user could take instead.

    python benchmarks/cuda.py [--rounds 7]

Sides take turns in one process on one GPU, each with its arrays bound to the device, so that only the model is timed.
Ratios above 1 are faster than ONNX Runtime's default on the float32 export. Error: largest difference from PyTorch in
float32 on the CPU, over the largest output. Also checked: every node runs on CUDA, and nothing is NaN.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from harness import write_result
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertModel

import onnxlathe as lathe
from onnxlathe.runtime.inference import open_session, session_options

SHAPES = ((1, 128), (8, 128), (32, 128), (32, 512))
CONFIG = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


def sample(shape: tuple[int, int]) -> dict[str, np.ndarray[Any, Any]]:
    """Token ids with some padding."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(shape[1] // 2, shape[1] + 1, shape[0])
    mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
    return {"input_ids": rng.integers(1000, 30000, shape), "attention_mask": mask}


def of_session(session: ort.InferenceSession, feeds: dict[str, Any]) -> Callable[[], Any]:
    """A run with everything on the device; waits until it is done."""
    binding = session.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0) for name, array in feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output(session.get_outputs()[0].name, "cuda", 0)

    def run() -> Any:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding.get_outputs()[0]

    return run


def of_torch(module: torch.nn.Module, feeds: dict[str, Any]) -> Callable[[], Any]:
    """The same in PyTorch."""
    held = {name: torch.from_numpy(array).cuda() for name, array in feeds.items()}

    def run() -> Any:
        with torch.inference_mode():
            result = module(**held).last_hidden_state
        torch.cuda.synchronize()
        return result

    return run


def median(run: Callable[[], Any], seconds: float) -> float:
    """Median seconds of a run."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="per turn")
    options = parser.parse_args()
    torch.manual_seed(0)
    module = BertModel(BertConfig(**CONFIG), add_pooling_layer=False).eval()
    args = (torch.ones(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.long))
    dims = ("batch", "sequence")
    exported = lathe.export(module, args, dynamic_shapes={"input_ids": dims, "attention_mask": dims})
    feeds = [sample(shape) for shape in SHAPES]
    compiled = {
        preset: lathe.compile(exported, preset, target="cuda", calibration=feeds[:2], progress=False)
        for preset in ("cpu-fp32", "cuda-fp16")
    }
    for out in compiled.values():
        out.report.print()
    sessions = {
        "ORT default, float32": open_session(exported, session_options(), "cuda"),
        **{
            f"onnxlathe {preset}": open_session(out.model, session_options(ort_config=out.ort_config), "cuda")
            for preset, out in compiled.items()
        },
    }
    halves = {"PyTorch eager, float16": module.half().cuda()}
    rows: dict[str, dict[str, Any]] = {name: {} for name in (*sessions, *halves)}
    reference = BertModel(BertConfig(**CONFIG), add_pooling_layer=False).eval()
    reference.load_state_dict({key: value.float().cpu() for key, value in module.state_dict().items()})
    for shape, arrays in zip(SHAPES, feeds, strict=True):
        runs = {name: of_session(session, arrays) for name, session in sessions.items()}
        runs |= {name: of_torch(half, arrays) for name, half in halves.items()}
        with torch.inference_mode():
            wanted = reference(**{k: torch.from_numpy(v) for k, v in arrays.items()}).last_hidden_state.numpy()
        tokens = arrays["attention_mask"][..., None]
        for name, run in runs.items():
            got = run()
            got = got.float().cpu().numpy() if isinstance(got, torch.Tensor) else got.numpy()
            error = float(np.abs((got - wanted) * tokens).max() / np.abs(wanted * tokens).max())
            rows[name][str(shape)] = {"error": error, "ratios": []}
        for _ in range(options.rounds):
            times = {name: median(run, options.seconds) for name, run in runs.items()}
            for name, seconds in times.items():
                rows[name][str(shape)]["ratios"].append(times["ORT default, float32"] / seconds)
    table = Table(title=f"encoder of MiniLM's size on {torch.cuda.get_device_name()}: times ORT default in float32")
    for column in ("side", *map(str, SHAPES), "error"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for name, row in rows.items():
        for cell in row.values():
            cell["ratio"] = statistics.median(cell.pop("ratios"))
        errors = max(cell["error"] for cell in row.values())
        table.add_row(name, *(f"{row[str(shape)]['ratio']:.2f}" for shape in SHAPES), f"{errors:.1e}")
    Console(width=140).print(table)
    print("wrote", write_result("cuda", 0, {"gpu": torch.cuda.get_device_name(), "sides": rows}, set()))


if __name__ == "__main__":
    main()
