"""Weights handed over in memory: where ONNX Runtime does not optimize they are read where they are, not copied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.runtime.artifact import load, save
from onnxlathe.runtime.inference import open_session, owning, run_session, session_options, weights_outside
from rewriting import from_text

X = np.ones((2, 32), np.float32)
TWO = """<ir_version: 10, opset_import: ["" : 20]>
g (float[n, 32] x, float[32,32] v, float[32,32] w) => (float[n, 32] y) { a = MatMul(x, v)  y = MatMul(a, w) }"""


def model(folder: Path | None) -> tuple[ir.Model, np.ndarray]:
    """y = x v w with w in memory; v too, or in a file."""
    rng = np.random.default_rng(0)
    v, w = (rng.standard_normal((32, 32)).astype(np.float32) for _ in range(2))
    made = from_text(TWO, v=v, w=w)
    if folder is not None:
        made = load(save(made, folder / "m.onnx", external_data=True))
    own = w.copy()
    made.graph.initializers["w"].const_value = ir.Tensor(own, name="w")
    return made, own


@pytest.mark.parametrize("in_a_file", [False, True])
@pytest.mark.parametrize("optimize", [False, True])
def test_shared_or_copied(in_a_file: bool, optimize: bool, tmp_path: Path) -> None:
    made, own = model(tmp_path if in_a_file else None)
    v = made.graph.initializers["v"].const_value
    assert v is not None and isinstance(v, ir.ExternalTensor) is in_a_file
    session = open_session(made, session_options(optimize=optimize, repack=False))
    expected = X @ v.numpy() @ own
    assert np.allclose(run_session(session, {"x": X})["y"], expected, rtol=1e-4, atol=1e-4)
    own *= 2
    factor = 1 if optimize else 2  # a copy knows nothing of it
    assert np.allclose(run_session(session, {"x": X})["y"], factor * expected, rtol=1e-4, atol=1e-4)
    assert made.graph.initializers["w"].const_value is not None  # put back


def test_weights_that_nobody_reads_are_left_out_meanwhile(tmp_path: Path) -> None:
    """Passes leave what they replaced to the next cleanup; ONNX Runtime would load it into memory."""
    made = load(save(model(None)[0], tmp_path / "m.onnx", external_data=True))
    for use in list(made.graph.initializers["v"].uses()):
        use.node.replace_input_with(use.idx, made.graph.initializers["w"])
    before = list(made.graph.initializers.items())
    with weights_outside(made) as (_, _, folder):
        assert folder == str(tmp_path)
        assert [tensor.name for tensor in ir.to_proto(made).graph.initializer] == ["w"]
    assert list(made.graph.initializers.items()) == before
    assert made.graph.initializers["v"].graph is made.graph
    w = before[1][1].const_value
    assert w is not None
    got = run_session(open_session(made, session_options(optimize=False)), {"x": X})["y"]
    assert np.allclose(got, X @ w.numpy() @ w.numpy(), rtol=1e-4, atol=1e-4)


def test_owned_values_outlive_what_they_were_made_of() -> None:
    array = np.arange(1 << 20, dtype=np.float32)
    view = owning(array).numpy()
    array[:] = np.nan
    del array
    assert view[-1] == (1 << 20) - 1 and not np.isnan(view).any()
    assert owning(np.zeros((0, 3), np.int64)).numpy().shape == (0, 3)
