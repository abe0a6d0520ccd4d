"""Timing: a faster graph is seen as faster, equal ones as equal, and the arithmetic is right."""

from __future__ import annotations

import time

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.gate import measure_speed, shape_of
from onnxlathe.runtime.benchmark import Timing, interleaved, paired_ratio
from rewriting import from_text


def chain(length: int) -> ir.Model:
    body = " ".join(f"v{i + 1} = Tanh(v{i})" for i in range(length))
    return from_text(
        f'<ir_version: 10, opset_import: ["" : 20]> g (float[n, 400] v0) => (y) {{ {body} y = Neg(v{length}) }}'
    )


def test_real_difference_is_measured() -> None:
    feeds = [{"v0": np.ones((64, 400), np.float32)}]
    options = dict(device="cpu", threads=1, config_before={}, config_after={}, budget=0.3)
    faster = measure_speed(chain(24), chain(6), feeds, **options)  # type: ignore[arg-type]
    assert faster.ratio > 1.5 and list(faster.samples) == ["(64,400)"]
    slower = measure_speed(chain(6), chain(24), feeds, **options)  # type: ignore[arg-type]
    assert slower.ratio < 0.67


def test_runs_take_turns() -> None:
    order: list[str] = []
    timings = interleaved([lambda: order.append("a"), lambda: order.append("b")], budget=0.001, rounds=4, least=4)
    assert {len(timing.rounds) for timing in timings} == {4}
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert len(turns) >= 6, "the two alternate instead of running one after the other"


def test_paired_ratio_ignores_a_slow_phase_of_the_machine() -> None:
    steady = [1.0] * 5 + [3.0] * 5  # the machine slows down in the middle
    ratio, noise = paired_ratio(Timing(tuple(2 * t for t in steady)), Timing(tuple(steady)))
    assert ratio == pytest.approx(2.0) and noise == 0.0
    assert Timing(tuple(steady)).noise > 0.3


def test_budget_is_kept() -> None:
    start = time.perf_counter()
    interleaved([lambda: time.sleep(0.01)], budget=0.1)
    assert time.perf_counter() - start < 1.0


def test_labels() -> None:
    assert shape_of({"x": np.ones((2, 3))}) == "(2,3)" and shape_of({}) == "()"
