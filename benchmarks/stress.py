"""Threads on one session: no wrong answer, no memory that stays.

    python benchmarks/stress.py [--threads 8] [--calls 10000]

``run``, ``run_bound`` and ``run_pooled`` on a small network; ``generate`` on a small decoder, with and without the
prefix cache (a fiftieth of the calls, eight tokens each). Every answer is compared with the one that a single thread
got. Memory is the resident set after each tenth of the calls; what counts is how much the second half adds.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from harness import write_result

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from grouped_decoders import Spec, decoder

from onnxlathe import Session
from onnxlathe.compiler.base import PassContext
from onnxlathe.passes import FuseGroupQueryAttention
from rewriting import from_text

Array = np.ndarray[Any, Any]
_PARTS = 10


def hammer(check: Callable[[int], bool], threads: int, calls: int) -> dict[str, Any]:
    """Calls ``check(number)`` from several threads, ``calls`` times each; counts False and exceptions, and memory."""
    wrong, errors, resident = 0, list[str](), list[int]()
    lock, process = threading.Lock(), psutil.Process()

    def work(start: int) -> None:
        nonlocal wrong
        for number in range(start, start + calls // _PARTS):
            try:
                right = check(number)
            except Exception as error:
                with lock:
                    errors.append(f"{type(error).__name__}: {error}"[:200])
                continue
            if not right:
                with lock:
                    wrong += 1

    for part in range(_PARTS):
        workers = [threading.Thread(target=work, args=(part * calls + k * 7919,)) for k in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        resident.append(process.memory_info().rss)
    growth = resident[-1] - resident[_PARTS // 2 - 1]
    made = threads * (calls // _PARTS) * _PARTS
    return {"calls": made, "wrong": wrong, "errors": len(errors), "first": errors[:3], "growth_bytes": growth}


def checks() -> dict[str, Callable[[int], bool]]:
    """What each thread asks, by name; inputs differ by call, so that answers of others would be seen."""
    rng = np.random.default_rng(0)
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[n, 16] x, float[16, 16] w) => (float[n, 16] y)
    { a = MatMul(x, w) b = Gelu(a) y = Softmax(b) }"""
    network = Session(from_text(text, w=rng.standard_normal((16, 16)).astype(np.float32)), threads=1)
    inputs = [rng.standard_normal((1 + k % 5, 16)).astype(np.float32) for k in range(64)]
    answers = [network.run({"x": x})["y"] for x in inputs]

    def run(number: int) -> bool:
        return np.array_equal(network.run({"x": inputs[number % 64]})["y"], answers[number % 64])

    def bound(number: int) -> bool:
        out = np.empty_like(answers[number % 64])
        network.run_bound({"x": inputs[number % 64]}, {"y": out})
        return np.array_equal(out, answers[number % 64])

    def pooled(number: int) -> bool:
        return np.array_equal(network.run_pooled({"x": inputs[number % 64]})["y"], answers[number % 64])

    model = decoder(Spec(rotary=(None, None), learned=True))
    FuseGroupQueryAttention()(model, PassContext())
    plain, cached = Session(model, threads=1), Session(model, threads=1, prefix_cache=1 << 16)
    shared = rng.integers(0, 40, 12)
    prompts = [np.concatenate([shared[: k % 12 + 1], rng.integers(0, 40, 1 + k % 4)]) for k in range(64)]
    texts = [plain.generate(prompt, 8, eos=()) for prompt in prompts]

    def generate(number: int) -> bool:
        return np.array_equal(plain.generate(prompts[number % 64], 8, eos=()), texts[number % 64])

    def prefix(number: int) -> bool:
        return np.array_equal(cached.generate(prompts[number % 64], 8, eos=()), texts[number % 64])

    return {"run": run, "run_bound": bound, "run_pooled": pooled, "generate": generate, "prefix_cache": prefix}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=10_000, help="of each thread; a fiftieth for generate")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for name, check in checks().items():
        calls = args.calls if name.startswith("run") else max(_PARTS, args.calls // 50)
        found[name] = row = hammer(check, args.threads, calls)
        print(
            f"{name:14} {row['calls']:8} calls {row['wrong']:4} wrong {row['errors']:4} errors "
            f"{row['growth_bytes'] / 1024:8.0f} KiB more in the second half {row['first']}",
            flush=True,
        )
    write_result("stress", 1, {"threads": args.threads, "stress": found}, set())
    sys.exit(any(row["wrong"] or row["errors"] for row in found.values()))


if __name__ == "__main__":
    main()
