"""The calculator: by hand on round numbers, and its limits."""

from __future__ import annotations

import dataclasses

import pytest

from onnxlathe.planner import Decoder, Hardware, plan
from onnxlathe.runtime.errors import PlanError

MODEL = Decoder(1e9, 10, 1000, 4, 50, weight_bits=16, cache_bits=16)
HARDWARE = Hardware(1, 10e9, 100e9, 10e9, 1e12, latency=0.0)


def test_one_device_reads_everything_once() -> None:
    """2 GB of weights, 2 * 10 * 4 * 50 * 1000 * 2 bytes of cache."""
    (split,) = plan(MODEL, HARDWARE, batch=1, context=1000)
    assert MODEL.cache_bytes(1000) == 8e6
    assert split.device_bytes == 2e9 + 8e6
    assert split.step_seconds == pytest.approx((2e9 + 8e6) / 100e9)
    assert split.exchange_share == 0 and split.tokens_per_second == pytest.approx(1 / split.step_seconds)


def test_a_large_batch_is_bound_by_arithmetic() -> None:
    (split,) = plan(MODEL, HARDWARE, batch=100, context=1)
    assert split.step_seconds == pytest.approx(2 * 1e9 * 100 / 1e12)


def test_ranks_divide_a_step_and_pay_for_exchanges() -> None:
    found = {(s.stages, s.ranks): s for s in plan(MODEL, dataclasses.replace(HARDWARE, devices=2), 1, 1000)}
    ranks = found[1, 2]
    exchange = 2 * 10 * 1000 * 2 / 10e9  # twice a layer, half the ring's two ways
    assert ranks.step_seconds == pytest.approx((2e9 + 8e6) / 2 / 100e9 + exchange)
    assert found[1, 1].copies == 2
    stages = found[2, 1]
    assert stages.step_seconds == pytest.approx((2e9 + 8e6) / 100e9 + 2 * 2000 / 10e9), "a text gets no faster"
    assert stages.tokens_per_second == pytest.approx(2 / stages.step_seconds)


def test_heads_limit_ranks() -> None:
    found = plan(MODEL, dataclasses.replace(HARDWARE, devices=8), 1, 1000)
    assert {split.ranks for split in found} == {1, 2, 4}


def test_what_does_not_fit() -> None:
    small = dataclasses.replace(HARDWARE, memory=1e9, devices=2)
    with pytest.raises(PlanError, match=r"needs 1\.0 GB a device"):
        plan(MODEL, small, 1, 1000)
    assert plan(dataclasses.replace(MODEL, weight_bits=4), small, 1, 1000)
