"""Session: what goes in is checked, what comes out is right, and the device is the one asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from onnxlathe.runtime import providers
from onnxlathe.runtime.inference import open_session, session_options

X = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)


def expected(model: ir.Model, x: np.ndarray) -> np.ndarray:
    w, b = (model.graph.initializers[name].const_value.numpy() for name in "wb")  # type: ignore[union-attr]
    return np.maximum(x @ w + b, 0)


def test_run_from_file_and_model(small_model: ir.Model, small_file: Path) -> None:
    for source in (small_file, small_model):
        session = lathe.Session(source, threads=1)
        assert np.allclose(session.run({"x": X})["y"], expected(small_model, X), atol=1e-5)
        assert session.device == "cpu" and session.outputs == ["y"]


def test_run_bound_fills_the_given_array(small_model: ir.Model) -> None:
    session = lathe.Session(small_model)
    result = np.full((3, 600), np.nan, np.float32)
    session.run_bound({"x": X}, {"y": result})
    assert np.allclose(result, expected(small_model, X), atol=1e-5)
    with pytest.raises(lathe.ModelError, match="C-contiguous"):
        session.run_bound({"x": X}, {"y": np.empty((600, 3), np.float32).T})
    with pytest.raises(lathe.ModelError, match="shapes"):
        session.run_bound({"x": X}, {"y": np.empty((2, 600), np.float32)})


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, r"missing \['x'\]"),
        ({"x": X, "z": X}, r"unknown \['z'\]"),
        ({"x": X.astype(np.float64)}, "dtype float64, the model takes float32"),
        ({"x": X[:, :5]}, r"shape \[3, 5\], the model takes \[batch, 8\]"),
        ({"x": X[0]}, r"shape \[8\]"),
        ({"x": np.full((1, 8), np.nan, np.float32)}, "NaN or infinity"),
    ],
)
def test_wrong_inputs_are_named(small_model: ir.Model, inputs: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(lathe.ModelError, match=words):
        lathe.Session(small_model).run(inputs)


def test_unknown_output(small_model: ir.Model) -> None:
    with pytest.raises(lathe.ModelError, match=r"no output \['q'\].*y"):
        lathe.Session(small_model).run({"x": X}, ["q"])


def test_profile_names_operators(small_file: Path) -> None:
    session = lathe.Session(small_file, profile=True)
    session.run({"x": X})
    times = session.profile()
    assert set(times) & {"MatMul", "Gemm", "FusedGemm"} and list(times.values()) == sorted(times.values(), reverse=True)
    with pytest.raises(lathe.ModelError, match="profile=True"):
        lathe.Session(small_file).profile()


def test_benchmark(small_model: ir.Model) -> None:
    timing = lathe.Session(small_model).benchmark({"x": X}, seconds=0.05)
    assert timing.median > 0 and timing.noise >= 0


def test_threads_and_level_reach_onnxruntime(small_model: ir.Model) -> None:
    options = lathe.Session(small_model, threads=1).ort.get_session_options()
    assert options.intra_op_num_threads == 1


def test_cuda_that_is_not_there_is_an_error(small_model: ir.Model, capfd: pytest.CaptureFixture[str]) -> None:
    problem = providers.cuda_problem()
    if problem is None:
        pytest.skip("this machine has CUDA")
    with pytest.raises(lathe.RuntimeUnavailable, match=r"device='cuda' was asked for.*Install onnxruntime-gpu"):
        lathe.Session(small_model, device="cuda")
    assert lathe.Session(small_model, device="auto").device == "cpu"
    assert "onnxruntime" not in capfd.readouterr().err, "the C++ log does not leak"


def test_cuda_runs_where_it_is(small_model: ir.Model) -> None:
    if (problem := providers.cuda_problem()) is not None:
        pytest.skip(f"no CUDA here: {problem}")
    session = lathe.Session(small_model, device="cuda")
    assert session.device == "cuda" and np.allclose(session.run({"x": X})["y"], expected(small_model, X), atol=1e-3)


def test_unknown_device(small_model: ir.Model) -> None:
    with pytest.raises(lathe.RuntimeUnavailable, match="Unknown device 'tpu'"):
        lathe.Session(small_model, device="tpu")


def test_operator_without_kernel(small_model: ir.Model) -> None:
    next(iter(small_model.graph)).op_type = "NoSuchOperator"
    with pytest.raises(lathe.ModelError, match="NoSuchOperator"):
        open_session(small_model, session_options())
