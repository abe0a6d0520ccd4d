"""UpgradeOpset: old models come up with the same meaning; new ones are left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.graph import all_nodes
from onnxlathe.passes import UpgradeOpset
from rewriting import from_text, refused, rewrite, with_external_data


def build(opset: int, body: str) -> ir.Model:
    return from_text(f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[n, 4] x) => (y) {{ {body} }}')


OLD = {
    11: "u = Unsqueeze<axes=[0]>(x) s = Squeeze<axes=[0]>(u) m = ReduceMean<axes=[1], keepdims=0>(s) y = Relu(m)",
    13: "m = ReduceMean<axes=[1], keepdims=1>(x) y = Sub(x, m)",
    17: "m = ReduceMax<axes=[1], keepdims=1>(x) d = Sub(x, m) y = Sigmoid(d)",
    18: "y = Relu(x)",
    20: "y = Gelu(x)",
}


@pytest.mark.parametrize("opset", OLD)
def test_meaning_kept(opset: int) -> None:
    after, outcome = rewrite(UpgradeOpset(), build(opset, OLD[opset]), nested=False)
    assert outcome.counts == {f"opset {opset} -> 23": 1}
    assert after.opset_imports[""] == 23
    assert after.ir_version >= 10


def test_new_enough_is_left_alone() -> None:
    refused(UpgradeOpset(), build(23, "y = Relu(x)"), nested=False)
    refused(UpgradeOpset(to=17), build(20, "y = Relu(x)"), nested=False)


def test_operator_whose_new_version_has_no_kernel() -> None:
    model = build(20, "r = RandomNormalLike<seed=1.0>(x) y = Sub(x, r)")
    after = model.clone()
    outcome = UpgradeOpset()(after, PassContext())
    assert not outcome.changed and after.opset_imports[""] == 20
    assert "RandomNormalLike" in outcome.refusals[0].reason


def test_a_converter_that_changes_inputs_is_not_followed() -> None:
    """Scan of opset 8 has a batch dim that later ones do not; the converter drops it from the model's inputs."""
    text = """<ir_version: 8, opset_import: ["" : 8]>
    g (float[1, 2] initial, float[1, 3, 2] x) => (float[1, 2] y, float[1, 3, 2] z) {
      y, z = Scan<num_scan_inputs = 1,
        body = b (float[2] sum_in, float[2] next) => (float[2] sum_out, float[2] scan_out)
        { sum_out = Add(sum_in, next) scan_out = Identity(sum_out) }>(, initial, x) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    outcome = UpgradeOpset()(model, PassContext())
    assert not outcome.changed and "inputs changed" in outcome.refusals[0].reason


def test_external_data(tmp_path: Path) -> None:
    model = from_text(
        '<ir_version: 8, opset_import: ["" : 13]> g (float[n, 40] x, float[40] w) => (y) { y = Mul(x, w) }',
        w=np.ones(40, np.float32),
    )
    after, _ = rewrite(UpgradeOpset(), with_external_data(model, tmp_path), nested=False)
    assert after.opset_imports[""] == 23


def test_kernels_that_round_differently_are_within_its_promise() -> None:
    """ONNX Runtime has another AveragePool from opset 19 on."""
    text = """<ir_version: 7, opset_import: ["" : 13]> g (float[n, 4, 8, 8] x) => (float[n, 4, 4, 4] y)
    { y = AveragePool<kernel_shape=[2, 2], strides=[2, 2]>(x) }"""
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((8, 4, 8, 8)).astype(np.float32)}]
    _, outcome = rewrite(UpgradeOpset(), from_text(text), feeds=feeds, nested=False)
    assert outcome.changed


def test_old_bodies_read_nothing_any_more() -> None:
    """The converter leaves the bodies that it replaced behind, as readers of the graph around them."""
    model = ir.from_proto(
        onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 13]>
        g (bool c, float[n, 4] x) => (float[n, 4] z) {
          z = If (c) <then_branch = t () => (float[n, 4] y) { y = Relu(x) },
                      else_branch = e () => (float[n, 4] y) { y = Neg(x) }> }""")
    )
    assert UpgradeOpset()(model, PassContext()).changed
    inside = set(all_nodes(model))
    readers = [use.node for value in model.graph.inputs for use in value.uses()]
    assert len(readers) == 3 and inside.issuperset(readers)
