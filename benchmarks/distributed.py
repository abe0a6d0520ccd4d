"""What many workers, stages and ranks give on this machine.

    python benchmarks/distributed.py [--only workers ray stages ranks plan]

* workers: batches through one session with one thread, one default session, 2 workers with a thread each, in turns;
  one batch at a time, its rows divided, or a stream of batches (workers are threads that share a session). ``bound``
  is what any setting can gain over a default session if cores add up: cores over its own speed-up;
* ray: the throughput of 2 Ray actors over that of 2 threads, a thread each, on the same streams of batches;
* stages: bottleneck over its proven bound for k = 2..8 on the models of ``models/``, and a pipeline's bubble;
* ranks: the part of a run that exchanges take;
* plan: a decoder's measured step over the bound that ``onnxlathe plan`` gives for this machine's bandwidth.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import exported, write_result

SMALL = ("mlp-784", "convnet", "inception", "densenet", "nas-cells", "unet", "mobilenet", "encoder", "stories260k")
ROUNDS = 5


def cleaned(name: str) -> Any:
    """A model of the zoo, cleaned up."""
    import onnxlathe as lathe

    return lathe.compile(exported(name), "basic", verify=False, progress=False).model


def workers(folder: Path, seconds: float) -> dict[str, Any]:
    """Throughput over that of one session with one thread, by model."""
    batches = _batches()
    return {
        f"{name}, {size}": _workers(name, batch, folder, seconds / len(batches))
        for (name, size), batch in batches.items()
    }


def _batches() -> dict[tuple[str, str], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        ("mlp-784", "1000 rows"): {"pixels": rng.standard_normal((1000, 784)).astype(np.float32)},
        ("encoder", "64 x 128"): _tokens(rng, 100, (64, 128)),
        ("minilm", "32 sentences of 16"): _tokens(rng, 30_000, (32, 16)),
        ("minilm", "2 sentences of 16"): _tokens(rng, 30_000, (2, 16)),
        ("llama-135m", "a token for 8 rows after 128"): _step(rng, 8, 128),
    }


def ray_engine(folder: Path, seconds: float) -> dict[str, float]:
    """Throughput of 2 Ray actors over that of 2 threads, on streams of batches, in turns."""
    from onnxlathe.runtime.distributed import DataParallel

    found: dict[str, float] = {}
    batches = list(_batches().items())[:4]
    for (name, size), batch in batches:
        path = _file(folder, name)
        with DataParallel(path, 2, engine="threads") as threads, DataParallel(path, 2, engine="ray") as ray:
            share = seconds / len(batches) / ROUNDS / 2
            turns = [(_median(threads, batch, share, True), _median(ray, batch, share, True)) for _ in range(ROUNDS)]
        found[f"{name}, {size}"] = statistics.median(one / other for one, other in turns)
    return found


def _file(folder: Path, name: str) -> Path:
    from onnxlathe.runtime.artifact import save

    path = folder / f"{name}.onnx"
    return path if path.exists() else save(cleaned(name), path)


def _tokens(rng: np.random.Generator, most: int, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    ids = rng.integers(1, most, shape)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _step(rng: np.random.Generator, rows: int, past: int) -> dict[str, np.ndarray]:
    """One decoding step of the 135M Llama."""
    caches = {
        f"past_key_values.{layer}.{kind}": rng.standard_normal((rows, 3, past, 64)).astype(np.float32)
        for layer in range(30)
        for kind in ("key", "value")
    }
    ids = rng.integers(3, 40_000, (rows, 1))
    mask, positions = np.ones((rows, past + 1), np.int64), np.full((rows, 1), past)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **caches}


def _workers(name: str, batch: dict[str, np.ndarray], folder: Path, seconds: float) -> dict[str, Any]:
    """Every side is opened for its turn and closed after it: idle sessions' threads would take its cores."""
    import onnxlathe as lathe
    from onnxlathe.runtime.distributed import DataParallel, best_setting

    path = _file(folder, name)
    two = "2 workers, threads"
    sides: dict[str, Callable[[], Any]] = {
        "1 session, 1 thread": lambda: lathe.Session(path, threads=1),
        "1 session, default threads": lambda: lathe.Session(path),
        f"{two}, a batch": lambda: DataParallel(path, 2, engine="threads"),
        f"{two}, a stream": lambda: DataParallel(path, 2, engine="threads"),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side, make in sides.items():
            model = make()
            times[side].append(_median(model, batch, seconds / ROUNDS / len(sides), side.endswith("stream")))
            if isinstance(model, DataParallel):
                model.close()
    base = times["1 session, 1 thread"]
    ratios = {
        side: statistics.median(one / other for one, other in zip(base, found, strict=True))
        for side, found in times.items()
    }
    default = times["1 session, default threads"]
    found: dict[str, Any] = dict(ratios)
    setting = best_setting(path, batch, seconds / 8)
    best = times[f"{two}, a stream"] if setting == (2, 1) else default
    gain = statistics.median(one / other for one, other in zip(default, best, strict=True))
    bound = len(os.sched_getaffinity(0)) / ratios["1 session, default threads"]
    return {**found, "best setting (workers, threads)": setting, "best over default": gain, "bound": bound}


def _median(model: Any, batch: dict[str, np.ndarray], seconds: float, stream: bool) -> float:
    """Seconds a batch."""
    batches = 8 if stream else 1

    def run() -> None:
        if stream:
            list(model.map([batch] * batches))
        else:
            model.run(batch)

    for _ in range(3):
        run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) / batches)
    return statistics.median(times)


def stages(folder: Path) -> dict[str, Any]:
    """Bottleneck over bound, by model and k; and a pipeline of two stages."""
    import onnxlathe as lathe
    from onnxlathe.compiler.base import PassContext
    from onnxlathe.compiler.placement import read_placement
    from onnxlathe.passes.partition.partition_stages import PartitionStages
    from onnxlathe.runtime.feeds import make_feeds

    found: dict[str, Any] = {}
    for name in SMALL:
        model = cleaned(name)
        ratios: dict[str, float] = {}
        for k in range(2, min(8, len(list(model.graph))) + 1):
            divided = model.clone()
            PartitionStages(k)(divided, PassContext(threads=1))
            placement = read_placement(divided)
            assert placement is not None
            ratios[str(k)] = placement.figures["bottleneck"] / placement.figures["bound"]
            if name == "unet" and k == 2:
                session = lathe.StagedSession(lathe.save_stages(divided, folder / "stages"), threads=1)
                feeds = make_feeds(model, 0, 1)[0]
                session.run_many([feeds] * 50)
                report = session.report
                assert report is not None
                figures = dataclasses.asdict(report)
                expected = {"expected_bubble": report.expected_bubble, "bubble": report.bubble}
                found["pipeline of unet"] = {**figures, **expected, "balance": report.balance}
        found[name] = ratios
        print(f"{name:14}", *(f"{ratio:.3f}" for ratio in ratios.values()))
    return found


def ranks(folder: Path) -> dict[str, float]:
    """The part of a run of two ranks that is not in their sessions."""
    import onnxlathe as lathe
    from onnxlathe.compiler.base import PassContext
    from onnxlathe.passes.partition.partition_tensor import PartitionTensor

    model = cleaned("encoder")
    PartitionTensor(2)(model, PassContext(threads=1))
    session = lathe.RankedSession(lathe.save_ranks(model, folder / "ranks"))
    ids = np.random.default_rng(0).integers(0, 100, (8, 128))
    feeds = {value.name or "": np.ones_like(ids) for value in session.inputs}
    feeds["input_ids"] = ids
    alone = lathe.RankedSession(folder / "ranks")
    start = time.perf_counter()
    for _ in range(20):
        session.run(feeds)
    whole = time.perf_counter() - start
    parted = alone._parted  # type: ignore[attr-defined]
    share = 1 - _time_in_sessions(parted, feeds) / (whole / 20)
    return {"share of exchanges and hand-overs": share}


def _time_in_sessions(parted: Any, feeds: dict[str, np.ndarray]) -> float:
    """Seconds of the slowest rank of each step, summed over the steps."""
    total = 0.0
    for _ in range(5):
        binding = parted.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name in parted.outputs:
            binding.bind_output(name, "cpu")
        for number in range(len(parted.steps)):
            slowest = 0.0
            for rank in range(len(parted.steps[number].sessions)):
                start = time.perf_counter()
                binding.run(number, rank)
                slowest = max(slowest, time.perf_counter() - start)
            total += slowest
            parted.run_step(number, binding)
    return total / 5


def plan_error() -> dict[str, float]:
    """A measured step of a 30M decoder over the bound from weight bytes and bandwidth, one thread."""
    import onnxlathe as lathe
    from onnxlathe.models.decoder import decoder
    from onnxlathe.passes.partition.costs import this_machine
    from onnxlathe.planner import Decoder, Hardware, plan

    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 8192}
    module = decoder("tiny", num_attention_heads=8, num_key_value_heads=4, **sizes)
    out = lathe.compile(lathe.export_causal_lm(module, check=False), "cpu-fp32", verify=False, progress=False)
    params = sum(weight.numel() for weight in module.parameters())
    machine = this_machine()
    hardware = Hardware(1, 1e12, machine.bandwidth, 1e9, machine.flops)
    (bound,) = plan(Decoder(params, 8, 512, 4, 64, weight_bits=32, cache_bits=32), hardware, 1, 64)
    session = out.session(threads=1)
    session.generate([1, 2, 3], 8)
    times: list[float] = []
    session.generate([1, 2, 3], 64, on_token=lambda row, token: times.append(time.perf_counter()))
    step = float(np.median(np.diff(times)))
    return {"measured step over bound": step / bound.step_seconds, "params": params}


def main() -> None:
    """Runs what is asked for and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["workers", "ray", "stages", "ranks", "plan"]
    parser.add_argument("--only", nargs="*", default=choices, choices=choices)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--folder", type=Path, help="where models are kept from run to run")
    options = parser.parse_args()
    content: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if "workers" in options.only:
            content["workers"] = workers(folder, options.seconds)
        if "ray" in options.only:
            content["ray"] = ray_engine(folder, options.seconds)
        if "stages" in options.only:
            content["stages"] = stages(folder)
        if "ranks" in options.only:
            content["ranks"] = ranks(folder)
        if "plan" in options.only:
            content["plan"] = plan_error()
    for name, figures in content.items():
        print(name, figures)
    name = "distributed" if options.only == choices else f"distributed_{'_'.join(options.only)}"
    print(write_result(name, 1, content, set()))


if __name__ == "__main__":
    main()
