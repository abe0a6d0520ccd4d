"""The loop: what passes, what is refused, what is dropped, and what the report says of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from onnxlathe.compiler import pipeline
from onnxlathe.compiler.base import Claim, Outcome, Pass, PassContext
from onnxlathe.compiler.report import Report, Speed
from onnxlathe.runtime.artifact import REPORT_KEY


@dataclasses.dataclass(frozen=True)
class Change(Pass):
    """Does one thing, right or wrong, to the small model."""

    name: ClassVar[str] = "change"
    kind: str = "right"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        nodes = {node.op_type: node for node in model.graph}
        if self.kind == "right":
            nodes["Identity"].outputs[0].replace_all_uses_with(model.graph.inputs[0])
            model.graph.remove(nodes["Identity"], safe=True)
        elif self.kind == "wrong":
            nodes["MatMul"].replace_input_with(0, model.graph.inputs[0])
            nodes["Add"].op_type = "Sub"
        elif self.kind == "dangling":
            other = ir.Value(name="nowhere")
            nodes["Relu"].replace_input_with(0, other)
        elif self.kind == "rename":
            model.graph.outputs[0].name = "z"
        elif self.kind == "raise":
            raise ZeroDivisionError("oops")
        elif self.kind == "nan":
            nodes["Relu"].op_type = "Sqrt"
        if self.kind != "nothing":
            outcome.counts[self.kind] += 1
        return outcome


class Approximate(Change):
    """The same, but only claims to be close."""

    claims: ClassVar[Claim] = Claim.APPROXIMATE


def compile(model: ir.Model, *passes: Pass, **options: object) -> lathe.Compiled:
    return lathe.compile(model, list(passes), progress=False, **options)  # type: ignore[arg-type]


def test_right_pass_is_kept_and_recorded(small_model: ir.Model) -> None:
    before = ir.to_proto(small_model)
    out = compile(small_model, Change())
    record = out.report.passes[0]
    assert (record.status, record.nodes, record.counts, record.error) == ("applied", (4, 3), {"right": 1}, 0.0)
    assert out.report.ops_before["Identity"] == 1 and "Identity" not in out.report.ops_after
    assert ir.to_proto(small_model) == before, "the input model is never changed"


def test_wrong_numbers_name_pass_node_and_error(small_model: ir.Model) -> None:
    with pytest.raises(lathe.VerifyError, match=r"change changed the output 'y' by .*starts at .*\(Sub\), value a"):
        compile(small_model, Change("wrong"))


def test_nan_is_a_difference(small_model: ir.Model) -> None:
    with pytest.raises(lathe.VerifyError, match="by inf"):
        compile(small_model, Change("nan"))


def test_tolerance_can_be_raised_and_lowered(small_model: ir.Model) -> None:
    out = compile(small_model, Change("wrong"), tolerance=10.0)
    assert out.report.passes[0].status == "applied" and (out.report.error or 0) > 1e-3


def test_approximate_passes_are_measured_not_judged(small_model: ir.Model) -> None:
    out = compile(small_model, Approximate("wrong"))
    assert out.report.passes[0].status == "applied" and (out.report.passes[0].error or 0) > 1e-3


@pytest.mark.parametrize(
    ("kind", "words"),
    [("dangling", "before anything makes it"), ("rename", "outputs changed"), ("raise", "ZeroDivisionError: oops")],
)
def test_broken_passes_are_named(small_model: ir.Model, kind: str, words: str) -> None:
    with pytest.raises(lathe.PassError, match=f"(?s)change.*{words}"):
        compile(small_model, Change(kind))


@pytest.mark.parametrize("kind", ["wrong", "dangling", "rename", "raise", "nan"])
def test_skip_leaves_the_pass_out_and_says_so(small_model: ir.Model, kind: str) -> None:
    out = compile(small_model, Change(kind), Change("right"), on_error="skip")
    first, second = out.report.passes
    assert first.status == "failed" and "left out" in first.notes[0]
    assert second.status == "applied" and second.nodes == (4, 3), "the next pass starts from the graph before"
    assert out.report.error == 0.0


@pytest.mark.parametrize(("ratio", "status"), [(0.8, "dropped"), (0.97, "applied"), (1.3, "applied")])
def test_speed_gate(small_model: ir.Model, monkeypatch: pytest.MonkeyPatch, ratio: float, status: str) -> None:
    """Slower beyond the noise of 5 % is dropped; the figures are in the report."""
    monkeypatch.setattr(pipeline, "measure_speed", lambda *a, **k: Speed(ratio, 0.05, {"(1,8)": ratio}))
    out = compile(small_model, Change(), speed_gate=True)
    record = out.report.passes[0]
    assert record.status == status and record.speed is not None and record.speed.ratio == ratio
    assert len(list(out.model.graph)) == (4 if status == "dropped" else 3)
    if status == "dropped":
        assert "0.80 x at (1,8)" in record.notes[0]


def test_passes_that_must_gain_are_dropped_when_they_do_not(
    small_model: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "measure_speed", lambda *a, **k: Speed(0.99, 0.05, {}))
    monkeypatch.setattr(Change, "gate", "faster")
    assert compile(small_model, Change(), speed_gate=True).report.passes[0].status == "dropped"


def test_the_gate_measures_sizes_that_the_model_can_run() -> None:
    """This one knows 40 positions; 128 is too long for it."""
    from rewriting import from_text

    text = """<ir_version: 10, opset_import: ["" : 20]> g (int64[batch, n] ids, float[40, 8] table) => (y) {
      shape = Shape(ids)  i = Constant<value_int = 1>()  n = Gather(shape, i)  zero = Constant<value_int = 0>()
      one = Constant<value_int = 1>()  positions = Range(zero, n, one)  p = Gather(table, positions)  y = Relu(p)
    }"""
    model = from_text(text, table=np.ones((40, 8), np.float32))
    out = lathe.compile(model, ["cleanup"], speed_gate=True, progress=False)
    assert out.report.speed is not None and list(out.report.speed.samples) == ["(1,16)"]


def test_unverified_compile_says_nothing_about_numbers(small_model: ir.Model) -> None:
    out = compile(small_model, Change("wrong"), verify=False)
    assert out.report.error is None and out.report.passes[0].error is None


def test_session_options_of_passes_are_united() -> None:
    key = "optimization.disable_specified_optimizers"
    merged = pipeline._merge({"config_entries": {key: "A;B", "x": "1"}}, {"config_entries": {key: "B;C"}})
    assert merged == {"config_entries": {key: "A;B;C", "x": "1"}}


def test_report_round_trip(small_model: ir.Model, tmp_path: Path) -> None:
    out = compile(small_model, Change(), "fuse-linear", speed_gate=True)  # type: ignore[arg-type]
    out.report.save_json(tmp_path / "report.json")
    again = Report.from_dict(json.loads((tmp_path / "report.json").read_text()))
    assert again == out.report
    path = out.save(tmp_path / "m.onnx")
    stored = json.loads(lathe.load(path).metadata_props[REPORT_KEY])
    assert Report.from_dict(stored) == out.report
    again.print(refusals=True)


def test_accepts_every_kind_of_source(small_model: ir.Model, small_file: Path) -> None:
    sources = [small_model, ir.to_proto(small_model), small_file, str(small_file)]
    results = [compile(source, Change()).session().run({"x": np.ones((1, 8), np.float32)})["y"] for source in sources]  # type: ignore[arg-type]
    assert all(np.array_equal(results[0], result) for result in results)


def test_torch_module_is_exported() -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(4, 3)
    out = lathe.compile(module, "basic", args=(torch.ones(2, 4),), progress=False)
    result = next(iter(out.session().run({"input": np.ones((2, 4), np.float32)}).values()))
    assert np.allclose(result, module(torch.ones(2, 4)).detach().numpy(), atol=1e-6)
    with pytest.raises(lathe.ModelError, match="args"):
        lathe.compile(module, "basic")


@pytest.mark.parametrize(
    ("passes", "words"),
    [("nothing", "no pass 'nothing'"), (["fuse-gelu", 3], "3 is not a pass")],
)
def test_unknown_passes(small_model: ir.Model, passes: object, words: str) -> None:
    with pytest.raises(lathe.PassError, match=words):
        lathe.compile(small_model, passes)  # type: ignore[arg-type]


def test_same_seed_same_result(small_model: ir.Model) -> None:
    first, second = (ir.to_proto(compile(small_model, Change(), seed=3).model) for _ in range(2))
    assert first == second


def test_made_samples_that_do_not_fit_ask_for_real_ones() -> None:
    from rewriting import from_text

    model = from_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[a, b] x, float[c, d] z) => (y) { y = MatMul(x, z) }'
    )
    feeds = [{"x": np.ones((2, 3), np.float32), "z": np.ones((3, 4), np.float32)}]
    with pytest.raises(lathe.ModelError, match="calibration"):
        compile(model, "cleanup", seed=1)  # type: ignore[arg-type]
    assert compile(model, "cleanup", calibration=feeds).report.error == 0.0  # type: ignore[arg-type]


def test_half_precision_is_judged_by_its_own_units() -> None:
    """Folded, c * d is rounded to float16 once more than in the chain that the CPU provider runs in float32."""
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float16[2, 8] x) => (float16[2, 8] y)
    { f = Constant<value_float = 1.1>() c = Cast<to=10>(f) r = Sqrt(c) s = Mul(r, r) y = Mul(x, s) }"""
    out = lathe.compile(ir.from_onnx_text(text), ["fold-constants"], progress=False)
    assert [node.op_type for node in out.model.graph] == ["Mul"]
    assert out.report.error is not None and out.report.error < 4e-3
