"""Fixtures shared by the tests of the core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from cached_decoders import stories
from onnxlathe.runtime.artifact import save
from rewriting import from_text

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
small (float[batch, 8] x, float[8, 600] w, float[600] b) => (float[batch, 600] y) {
  i = Identity(x)  m = MatMul(i, w)  a = Add(m, b)  y = Relu(a)
}"""


@pytest.fixture
def small_model() -> ir.Model:
    """Identity, MatMul, Add, Relu with 19 kB of weights."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((8, 600)).astype(np.float32), "b": rng.standard_normal(600).astype(np.float32)}
    return from_text(TEXT, **arrays)


@pytest.fixture
def small_file(small_model: ir.Model, tmp_path: Path) -> Path:
    """The small model as a file."""
    return save(small_model, tmp_path / "small.onnx")


@pytest.fixture
def samples() -> Callable[[int], list[dict[str, np.ndarray]]]:
    """Samples for the small model."""

    def make(count: int) -> list[dict[str, np.ndarray]]:
        rng = np.random.default_rng(1)
        return [{"x": rng.standard_normal((batch + 1, 8)).astype(np.float32)} for batch in range(count)]

    return make


@pytest.fixture(scope="session")
def exported_stories() -> ir.Model:
    """stories260k as torch exports it; not to be changed."""
    return lathe.export_causal_lm(stories(), check=False)
