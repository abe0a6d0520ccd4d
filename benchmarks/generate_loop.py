"""What the generation loop costs over its graph: python benchmarks/generate_loop.py [model.onnx] (default: a tiny one).

Decodes greedily after a prompt of 128 tokens, 2 threads; the calls of ONNX Runtime are timed inside the loop, so both
times are of the same steps. Medians of the rounds.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import onnxlathe as lathe

ROUNDS, PROMPT, TOKENS = 5, 128, 64
RESULT = Path(__file__).parent / "results" / "generate_loop.json"


def main() -> None:
    source: Any = sys.argv[1] if len(sys.argv) > 1 else _tiny()
    session = lathe.Session(source, threads=2)
    prompt = np.arange(PROMPT) % 200 + 3
    whole: list[float] = []
    graph: list[float] = []
    run = type(session.ort).run_with_iobinding
    spent: list[float] = []

    def timed(self: Any, *args: Any) -> None:
        start = time.perf_counter()
        run(self, *args)
        spent.append(time.perf_counter() - start)

    type(session.ort).run_with_iobinding = timed
    for _ in range(ROUNDS + 1):
        spent.clear()
        times: list[float] = []
        note = functools.partial(_note, times)
        session.generate(prompt, TOKENS + 1, eos=(), prefill_chunk=PROMPT, on_token=note)
        whole.append((times[-1] - times[0]) / TOKENS)
        graph.append(sum(spent[1:]) / TOKENS)
    ratios = [a / b for a, b in zip(whole[1:], graph[1:], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    result = {"loop / graph": middle, "noise": (high - low) / 2, "loop - graph, us a token": _gap(whole, graph)}
    print(json.dumps(result, indent=2))
    RESULT.write_text(json.dumps({"model": str(sys.argv[1:]), **result}, indent=2) + "\n")


def _note(times: list[float], row: int, token: int) -> None:
    times.append(time.perf_counter())


def _gap(whole: list[float], graph: list[float]) -> float:
    return statistics.median(a - b for a, b in zip(whole[1:], graph[1:], strict=True)) * 1e6


def _tiny() -> Any:
    from onnxlathe.models.decoder import decoder

    return lathe.export_causal_lm(decoder("tiny"), check=False)


if __name__ == "__main__":
    main()
