"""Kernel costs: every form runs and equivalent forms agree; the table is cached and survives damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from onnxlathe.runtime import capabilities
from onnxlathe.runtime.capabilities import ROWS, WIDTH, KernelCosts, form_model, measure
from onnxlathe.runtime.errors import LatheError

EQUIVALENT = [
    ("Add+LayerNormalization", "Sum+LayerNormalization", "SkipLayerNormalization"),
    ("Add+SimplifiedLayerNormalization", "Add+RMSNormalization", "SkipSimplifiedLayerNormalization"),
    ("Gelu", "com.microsoft.Gelu"),
    ("Add+Gelu", "BiasGelu"),
    ("Gelu(tanh)", "FastGelu"),
    ("Sigmoid+Mul", "QuickGelu"),
    ("MatMul+Add", "Gemm"),
    ("Attention", "MultiHeadAttention", "MatMul+Softmax+MatMul"),
]


def run(form: str) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(form_model(form).SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    shapes = {value.name: [5 if dim == "n" else dim for dim in value.shape] for value in session.get_inputs()}
    return session.run(None, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})[0]


@pytest.mark.parametrize("forms", EQUIVALENT, ids=lambda forms: forms[0])
def test_forms_that_are_compared_compute_the_same(forms: tuple[str, ...]) -> None:
    """Otherwise their costs say nothing about each other."""
    reference = run(forms[0])
    for other in forms[1:]:
        assert np.abs(run(other) - reference).max() <= 1e-5 * np.abs(reference).max(), other


def test_every_measured_form_is_compared_with_something() -> None:
    measured = {*capabilities._ROW_FORMS, *capabilities._ATTENTION_FORMS}
    assert measured == {form for forms in EQUIVALENT for form in forms}


def test_measure_knows_the_slow_kernel() -> None:
    """The figure of the reference: SkipLayerNormalization takes several times Add + LayerNormalization on the CPU."""
    table = measure("cpu", 1, budget=0.01)
    assert len(table) == len(ROWS) * sum(map(len, EQUIVALENT))
    ratio = KernelCosts(table).ratio("SkipLayerNormalization", "Add+LayerNormalization", rows=1000)
    assert ratio is not None and ratio > 1.5


def test_questions() -> None:
    costs = KernelCosts({"a|16": 1.0, "b|16": 2.0, "a|1024": 3.0, "b|1024": 2.0})
    assert costs.faster("a", "b", rows=16) is True
    assert costs.faster("a", "b", rows=4096) is False
    assert costs.faster("a", "b", rows=128) is None, "not measured"
    assert KernelCosts().faster("a", "b") is None
    with pytest.raises(LatheError, match="no kernel form"):
        form_model("nothing")


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def fake(device: str, threads: int) -> dict[str, float]:
        calls.append(device)
        return {f"x|{WIDTH}": 1.0}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(capabilities, "measure", fake)
    capabilities._cache_file.cache_clear()
    try:
        first = KernelCosts.of_machine("cpu", 7)
        assert KernelCosts.of_machine("cpu", 7) == first and calls == ["cpu"], "read from the cache"
        next(tmp_path.rglob("kernel-costs-*.json")).write_text("{ damaged")
        assert KernelCosts.of_machine("cpu", 7) == first and len(calls) == 2, "measured again"
    finally:
        capabilities._cache_file.cache_clear()
