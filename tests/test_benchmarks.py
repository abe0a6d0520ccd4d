"""The parts of the benchmarks that need no peer: workers answer, tools run in processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.verify import check_model, check_structure
from onnxlathe.runtime.artifact import save

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmarks are scripts beside each other, not a package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in ("decoder_models", "decoder_worker", "harness", "peers", "synthetic", "worker"):
        sys.modules.pop(name, None)


def test_synthetic_graphs_are_valid_and_repeatable() -> None:
    from synthetic import synthetic  # type: ignore[import-not-found]

    model = synthetic(500)
    check_structure(model)
    check_model(model)
    assert 480 <= len(list(model.graph)) <= 520
    assert ir.to_proto(model) == ir.to_proto(synthetic(500)) != ir.to_proto(synthetic(500, seed=1))


def test_sides_alternate_and_are_compared(small_file: Path, tmp_path: Path) -> None:
    from harness import Side, compare  # type: ignore[import-not-found]

    x = np.ones((4, 8), np.float32)
    np.savez(tmp_path / "in.npz", x=x)
    sides = [
        Side("plain", "ort", str(small_file)),
        Side("ours", "lathe", str(small_file)),
        Side("broken", "ort", "no.onnx"),
    ]
    reference = {"(4,8)": np.zeros((4, 600), np.float32) + 1}
    results = compare(sides, {"(4,8)": tmp_path / "in.npz"}, threads=1, rounds=3, seconds=0.01, reference=reference)
    assert results["plain"]["(4,8)"]["ratio"] == 1.0
    assert results["ours"]["(4,8)"]["error"] == results["plain"]["(4,8)"]["error"] > 0
    assert results["broken"] == {} and sides[2].failure


def test_tools_run_in_a_process_of_their_own(tmp_path: Path) -> None:
    from harness import prepare  # type: ignore[import-not-found]
    from synthetic import synthetic  # type: ignore[import-not-found]

    source = save(synthetic(300), tmp_path / "in.onnx")
    done = prepare("onnxlathe basic", source, tmp_path / "out.onnx", "ours")
    assert done["nodes"] < 300 and done["seconds"] > 0 and done["private_bytes"] > 0
    assert "KeyError" in prepare("no such tool", source, tmp_path / "out.onnx", "ours")["failure"]


@pytest.mark.parametrize("in_place", [True, False])
def test_decoder_sides_compute_what_torch_does(in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after DRIFT steps, when a side begins at the past again."""
    from decoder_models import describe  # type: ignore[import-not-found]
    from decoder_worker import DRIFT, LatheLoop, Ort, Torch, TorchLoop  # type: ignore[import-not-found]

    import onnxlathe as lathe
    from cached_decoders import grouped, tiny

    tiny().save_pretrained(tmp_path / "hf")
    model = grouped(tiny(), rotary=True) if in_place else lathe.export_causal_lm(tiny(), check=False)
    path = save(model, tmp_path / "model.onnx")
    assert ("cache in place" in describe(path)) is in_place
    ids = np.random.default_rng(0).integers(3, 512, (2, 12))
    graph, torch = Ort(str(path), 1), Torch(str(tmp_path / "hf"), 1)
    prefill = {"prompt": ids[:, :-1]}
    np.testing.assert_allclose(graph(prefill), torch(prefill), rtol=1e-3, atol=1e-3)
    decode = {**prefill, "token": ids[:, -1:]}
    expected = torch(decode)
    steps = [np.array(graph(decode)) for _ in range(DRIFT + 1)]
    again = steps[1:] if in_place else steps[-1:]
    for step in (steps[0], *again):
        np.testing.assert_allclose(step, expected, rtol=1e-3, atol=1e-3)
    case = {"prompt": ids, "new": np.array(6), "steps": np.array(1)}
    ours, theirs = LatheLoop(str(path), 1), TorchLoop(str(tmp_path / "hf"), 1)
    np.testing.assert_array_equal(ours(case), theirs(case))
    assert len(ours.timed(case, 20)) >= 20
