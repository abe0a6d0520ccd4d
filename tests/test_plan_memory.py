"""The pass: the order that ORT really runs, what is measured, what is stored, what is refused."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.memory_plan import read_plans
from onnxlathe.compiler.memory_verify import verify_plan
from onnxlathe.models import zoo
from onnxlathe.passes.memory.plan_memory import PlanMemory, named_graphs, plan_model
from onnxlathe.runtime.errors import PlanError
from onnxlathe.runtime.feeds import make_feeds
from onnxlathe.runtime.memory_stats import can_measure, measure_memory
from rewriting import from_text, rewrite

# The branch that is wide inside should run first, before the results of others wait beside it. ONNX Runtime's own order
# takes branches from the last to the first.
WIDE = """n1 = Sigmoid(x) n2 = Tanh(x) n3 = Exp(x) n4 = Sin(x) w = Expand(x, s) v = Relu(w)
    n5 = ReduceMax<axes=[0], keepdims=0>(v) n6 = Cos(x) n7 = Neg(x) n8 = Erf(x) n9 = Abs(x)
    y = Max(n1, n2, n3, n4, n5, n6, n7, n8, n9)"""
SIZE, TIMES = 1 << 18, 12
HEAD = f'<ir_version: 10, opset_import: ["" : 17]> g (float[{SIZE}] x, int64[2] s'


def wide() -> ir.Model:
    return from_text(f"{HEAD}) => (float[{SIZE}] y) {{ {WIDE} }}", s=np.array([TIMES, SIZE]))


@functools.cache
def branchy(name: str) -> ir.Model:
    entry = zoo.build(name)
    return lathe.export(entry.module, entry.args)


def test_reorders_and_stores_a_plan() -> None:
    step = PlanMemory(measure=False)
    after, outcome = rewrite(step, wide(), nested=False)
    assert outcome.counts == {"graphs reordered": 1, "plans": 1}
    assert outcome.ort_config == {"execution_order": "priority"}
    (plan,) = read_plans(after.metadata_props)
    verify_plan(plan, after.graph)
    before = wide()
    infer_shapes(before)
    assert plan.peak == plan.bound < 0.8 * plan_model(before, [{}])[0].bound


@pytest.mark.skipif(not can_measure(), reason="memory is measured on Linux only")
def test_onnxruntime_runs_the_planned_order_in_less_memory() -> None:
    out = lathe.compile(wide(), [PlanMemory()], progress=False)
    assert out.ort_config["execution_order"] == "priority"
    feeds = make_feeds(wide(), 0, 1)[0]
    before, after = measure_memory(wide(), feeds, {}), measure_memory(out.model, feeds, out.ort_config)
    assert after.order == tuple(node.name for node in out.model.graph)
    assert after.peak < 0.8 * before.peak
    (plan,) = read_plans(out.model.metadata_props)
    assert after.peak == pytest.approx(plan.bound, rel=0.05), "every buffer is freed after its last reader"
    assert any("measured peak" in note for note in out.report.passes[0].notes)


@pytest.mark.skipif(not can_measure(), reason="memory is measured on Linux only")
def test_what_a_session_holds_between_runs() -> None:
    """The arena keeps what the runs needed, if there is one."""
    feeds = make_feeds(wide(), 0, 1)[0]
    with_arena = measure_memory(wide(), feeds, {"memory_pattern": False})
    without = measure_memory(wide(), feeds, {"memory_pattern": False, "memory_arena": False})
    assert with_arena.held > 0.9 * with_arena.peak > 10 * without.held
    assert with_arena.peak == pytest.approx(without.peak, rel=0.05), "the peak is measured without the arena"


FREED = {"memory_pattern": False, "memory_reuse": False}
PRIORITY = {"execution_order": "priority"}
PLAIN = {"config_entries": {"optimization.disable_specified_optimizers": "NchwcTransformer"}}


@pytest.mark.skipif(not can_measure(), reason="memory is measured on Linux only")
@pytest.mark.parametrize(
    ("planned", "config"),
    [
        (False, {}),
        *[(planned, FREED | more) for planned in (False, True) for more in ({}, PRIORITY, PLAIN, PLAIN | PRIORITY)],
    ],
)
def test_what_needs_the_least_is_taken(planned: bool, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing at all where nothing needs less than the model as it was."""
    from onnxlathe.passes.memory import plan_memory
    from onnxlathe.runtime.memory_stats import MemoryUse

    model = wide()
    infer_shapes(model)
    given = [node.name for node in model.graph]

    def measure(graph: ir.Model, _: object, asked: dict[str, Any]) -> MemoryUse:
        best = asked == config and ([node.name for node in graph.graph] != given) == planned
        return MemoryUse(900 if best else 1000, (), 0)

    monkeypatch.setattr(plan_memory, "measure_memory", measure)
    outcome = PlanMemory(layout=False)(model, PassContext())
    assert ([node.name for node in model.graph] != given) == planned == bool(outcome.counts["graphs reordered"])
    assert outcome.ort_config == config
    assert any("stay as they were" in note for note in outcome.notes) == (not config)


def test_session_options_travel_in_the_artifact(tmp_path) -> None:  # type: ignore[no-untyped-def]
    out = lathe.compile(wide(), [PlanMemory(measure=False)], progress=False)
    session = lathe.Session(out.save(tmp_path / "m.onnx"))
    assert str(session.ort.get_session_options().execution_order).endswith("PRIORITY_BASED")
    assert read_plans(lathe.load(tmp_path / "m.onnx").metadata_props)


@pytest.mark.parametrize("name", ["inception", "densenet", "nas-cells", "unet", "mobilenet", "convnet", "mlp-784"])
def test_real_graphs_need_no_more_than_their_bound(name: str) -> None:
    model = branchy(name)
    out = lathe.compile(model, [PlanMemory(measure=False)], progress=False)
    given = ir.from_proto(ir.to_proto(model))
    infer_shapes(given)
    (plan,) = read_plans(out.model.metadata_props)
    assert plan.peak == plan.bound <= plan_model(given, [{}])[0].bound


def test_bodies_are_planned_and_reordered() -> None:
    text = f"{HEAD}, bool k) => (float[{SIZE}] y)"
    numbers = f"value_ints = [{TIMES}, {SIZE}]"  # where shape inference sees them
    wide_here = f"t = Constant<{numbers}>() w = Expand(x, t)"
    inner = WIDE.replace("y =", "z =").replace("w = Expand(x, s)", wide_here)
    body = f"y = If(k) <then_branch = t () => (float[{SIZE}] z) {{ {inner} }}, "
    body += f"else_branch = e () => (float[{SIZE}] o) {{ o = Neg(x) }}>"
    model = from_text(f"{text} {{ {body} }}", s=np.array([TIMES, SIZE]))
    after, outcome = rewrite(PlanMemory(measure=False), model, nested=False)
    assert outcome.counts == {"graphs reordered": 1, "plans": 3}
    assert [plan.graph for plan in read_plans(after.metadata_props)] == [name for name, _ in named_graphs(after)]


def test_a_budget_below_the_bound_says_what_makes_it() -> None:
    model = wide()
    infer_shapes(model)
    with pytest.raises(PlanError, match=r"at least \d+.*budget is 1000.*w [(]"):
        PlanMemory(peak_bytes=1000, measure=False)(model, PassContext())


def test_dims_are_asked_for_by_name() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 8] x) => (float[batch, 8] y) { y = Softmax(x) }'
    with pytest.raises(PlanError, match="batch"):
        lathe.compile(from_text(text), [PlanMemory(measure=False)], progress=False)
    step = PlanMemory(bindings=({"batch": 1}, {"batch": 8}), measure=False)
    plans = read_plans(lathe.compile(from_text(text), [step], progress=False).model.metadata_props)
    assert [plan.peak for plan in plans] == [64, 256]
