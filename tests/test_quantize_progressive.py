"""QuantizeProgressive: groups, the budget, ranges of the quantized prefix."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.budget import Budget
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.verify import run_reference
from onnxlathe.passes.quantization.quantize_progressive import QuantizeProgressive
from onnxlathe.passes.quantization.quantize_static import QuantizeStatic
from onnxlathe.runtime.errors import PassError
from rewriting import from_text, rewrite

_RNG = np.random.default_rng(0)


def chain(outlier: bool = False) -> ir.Model:
    """Four layers with Tanh between; with ``outlier`` the third reads one huge channel that its weights ignore."""
    weights = {f"w{n}": (_RNG.standard_normal((16, 16)) * 0.4).astype(np.float32) for n in range(4)}
    stretch = np.ones(16, np.float32)
    if outlier:
        stretch[3] = 3000.0
        weights["w2"][3] = 0.0
    names = "".join(f", float[16, 16] {name}" for name in weights)
    body = "a = MatMul(x, w0) b = Tanh(a) c = MatMul(b, w1) d = Tanh(c) e = Mul(d, k) f = MatMul(e, w2) h = Tanh(f)"
    header = '<ir_version: 10, opset_import: ["" : 21]>'
    text = f"{header} g (float[n, 16] x{names}, float[16] k) => (float[n, 16] y) {{ {body} y = MatMul(h, w3) }}"
    model = from_text(text, **weights, k=stretch)
    infer_shapes(model)
    return model


def feeds() -> list[dict[str, Any]]:
    return [{"x": _RNG.standard_normal((8, 16)).astype(np.float32)} for _ in range(8)]


def test_all_groups_within_a_wide_budget() -> None:
    samples = feeds()
    step = QuantizeProgressive(Budget(max_drop=0.2), groups=2)
    context = PassContext(feeds=samples)
    _, outcome = rewrite(step, chain(), feeds=samples, context=context, tolerance=0.2, nested=False)
    assert outcome.counts == {"MatMul on integers": 4}
    assert ["8 bits: error" in note for note in outcome.notes[:2]] == [True, True]


def test_the_budget_holds_and_the_bad_group_gets_more_bits() -> None:
    samples, model = feeds(), chain(outlier=True)
    static = model.clone()
    QuantizeStatic()(static, PassContext(feeds=samples))
    exact = run_reference(model, samples)
    budget = Budget(max_drop=0.1)
    assert budget.loss(samples, exact, run_reference(static, samples)) > 0.1
    step = QuantizeProgressive(Budget(max_drop=0.1, samples=samples), groups=4)
    after = model.clone()
    outcome = step(after, PassContext(feeds=samples))
    assert budget.loss(samples, exact, run_reference(after, samples)) <= 0.1
    assert sum("16 bits" in note for note in outcome.notes) == 1 and outcome.counts["MatMul on integers"] == 4


def test_an_impossible_budget_leaves_everything_float() -> None:
    samples = feeds()
    outcome = QuantizeProgressive(Budget(max_drop=1e-9), groups=2)(model := chain(), PassContext(feeds=samples))
    assert not outcome.changed and len(outcome.refusals) == 4
    assert all("budget" in item.reason for item in outcome.refusals)
    assert not [node for node in model.graph if node.op_type == "QuantizeLinear"]


def test_ranges_come_from_the_quantized_prefix() -> None:
    samples, model = feeds(), chain()
    context = PassContext(feeds=samples)
    direct = QuantizeStatic()(model.clone(), context)
    step = QuantizeProgressive(Budget(max_drop=0.5, samples=samples), groups=4)
    got = step(model.clone(), context)
    assert got.ranges["x"] == direct.ranges["x"]
    assert got.ranges["h"] != direct.ranges["h"]


def test_samples_and_groups_are_needed() -> None:
    with pytest.raises(PassError, match="no calibration samples"):
        QuantizeProgressive()(chain(), PassContext())
    with pytest.raises(ValueError, match="groups"):
        QuantizeProgressive(groups=0)
