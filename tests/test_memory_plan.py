"""Lifetimes, order, plans: judged by an independent verifier, by brute force, and by running inside one arena."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.arena import run_in_arena
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.memory_plan import PLAN_KEY, MemoryPlan, PlannedBuffer, c_header, pack_plans, read_plans
from onnxlathe.compiler.memory_verify import verify_plan
from onnxlathe.compiler.verify import run_reference
from onnxlathe.look_memory import parse_bindings, print_memory
from onnxlathe.passes.memory.lifetimes import Flow, Sizes, Tensor, evaluate, flow_of
from onnxlathe.passes.memory.memory_picture import plan_svg
from onnxlathe.passes.memory.order_bounds import least_bound, order_bound
from onnxlathe.passes.memory.order_search import best_order, proven_best
from onnxlathe.passes.memory.plan_memory import plan_model
from onnxlathe.runtime.artifact import save
from onnxlathe.runtime.errors import PlanError
from onnxlathe.runtime.feeds import make_feeds
from rewriting import from_text

HEAD = '<ir_version: 10, opset_import: ["" : 20]> g (float[4, 64] x) => '


def build(body: str, outputs: str = "float[4, 64] y", head: str = HEAD) -> ir.Model:
    model = from_text(f"{head}({outputs}) {{ {body} }}")
    infer_shapes(model)
    return model


def plan(model: ir.Model) -> MemoryPlan:
    return plan_model(model, [{}])[0]


def sizes_alive(model: ir.Model) -> list[int]:
    return [count // 1024 for count in plan(model).live_bytes]


def test_what_is_made_and_read_in_a_step_is_alive_together() -> None:
    model = build("a = Softmax(x) b = Softmax(a) y = Softmax(b)")
    assert sizes_alive(model) == [1, 2, 2]  # the input has memory of its own


def test_in_place_only_over_what_nobody_reads_afterwards() -> None:
    assert sizes_alive(build("a = Softmax(x) b = Relu(a) y = Relu(b)")) == [1, 1, 1]
    assert sizes_alive(build("a = Softmax(x) b = Relu(a) y = Add(a, b)")) == [1, 2, 2]
    assert sizes_alive(build("b = Relu(x) y = Relu(b)")) == [1, 1]  # never over the caller's input
    assert sizes_alive(build("b = Softmax(x) y = Relu(b)", "float[4, 64] y, float[4, 64] b")) == [1, 2]


def test_views_share_memory() -> None:
    body = "s = Constant<value_ints = [64, 4]>() t = Constant<value_ints = [4, 64]>() a = Softmax(x) "
    model = build(body + "b = Reshape(a, s) c = Reshape(b, t) y = Softmax(c)")
    assert sizes_alive(model) == [1, 1, 1, 2]
    assert any(set(buffer.names) == {"a", "b", "c"} for buffer in plan(model).buffers)
    alone = build("s = Constant<value_ints = [64, 4]>() y = Reshape(x, s)", "float[64, 4] y")
    assert [buffer.names for buffer in plan(alone).buffers] == [("y",)]  # an output cannot be the caller's input


IF = """a = Softmax(x) c = ReduceMax<keepdims=0>(a) k = Cast<to=9>(c)
    b = If(k) <then_branch = t () => (float[4, 64] u) { p = Softmax(a) q = Softmax(p) u = Add(p, q) },
               else_branch = e () => (float[4, 64] v) { v = Neg(a) }> y = Softmax(b)"""


def test_bodies_keep_what_they_read_alive_and_are_arenas_of_their_own() -> None:
    model = build(IF)
    main, then, otherwise = plan_model(model, [{}])
    alive = {name for buffer in main.alive_at(3) for name in buffer.names}
    assert {"a", "b"} <= alive and main.graph == ""
    assert then.peak == 2 * 1024 and otherwise.peak == 1024 and then.graph.endswith("/0")


def test_a_body_that_hands_on_an_outer_value() -> None:
    """A view of something in another arena has no place in this one."""
    body = """a = Softmax(x) c = ReduceMax<keepdims=0>(a) k = Cast<to=9>(c)
    y = If(k) <then_branch = t () => (float[4, 64] u) { i = Identity(a) u = Softmax(i) },
               else_branch = e () => (float[4, 64] v) { v = Neg(a) }>"""
    main, then, _ = plan_model(build(body), [{}])
    assert main.peak and [buffer.names for buffer in then.buffers] == [("u",)]


@pytest.mark.parametrize(
    "body",
    [
        "a = Softmax(x) b = Relu(a) c = Neg(a) d = Add(b, c) y = Mul(d, a)",
        "a = Softmax(x) b = Softmax(a) c = Softmax(b) d = Add(a, c) e = Relu(d) f = Add(e, b) y = Sub(f, c)",
        "t = Transpose(x) a = Softmax(t) b = Transpose(a) c = Add(b, x) y = Exp(c)",
        IF,
    ],
)
def test_runs_inside_one_arena(body: str) -> None:
    model = build(body)
    feeds = make_feeds(model, 1, 1)
    found = run_in_arena(model, plan(model), feeds[0])
    expected = run_reference(model, feeds)[0]
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)


def test_the_arena_shows_a_plan_that_frees_too_early() -> None:
    model = build("a = Softmax(x) b = Softmax(a) c = Softmax(b) y = Add(a, c)")
    good = plan(model)
    shorter = [dataclasses.replace(b, end=2) if b.names[0] == "a" else b for b in good.buffers]
    bad = dataclasses.replace(good, buffers=tuple(shorter))
    assert np.isnan(run_in_arena(model, bad, make_feeds(model, 1, 1)[0])["y"]).all()
    with pytest.raises(PlanError, match="'a' is needed from step 0 to 3"):
        verify_plan(bad, model.graph)


def test_the_verifier_sees_every_kind_of_mistake() -> None:
    model = build("a = Softmax(x) b = Softmax(a) y = Softmax(b)")
    good = plan(model)
    verify_plan(good, model.graph)
    flat = tuple(dataclasses.replace(buffer, offset=0) for buffer in good.buffers)
    for bad, reason in [
        (dataclasses.replace(good, buffers=flat), "overlap at byte"),
        (dataclasses.replace(good, buffers=good.buffers[1:]), "no place for"),
        (dataclasses.replace(good, order=good.order[::-1]), "runs before"),
        (dataclasses.replace(good, order=good.order[1:]), "every node"),
    ]:
        with pytest.raises(PlanError, match=reason):
            verify_plan(bad, model.graph)


def random_flow(rng: np.random.Generator, count: int) -> Flow:
    flow = Flow([set() for _ in range(count)], [], [[] for _ in range(count)])
    for node in range(count):
        flow.tensors.append(Tensor([str(node)], int(rng.integers(1, 20)), node))
        for other in range(node):
            if rng.random() < 0.35:
                flow.before[node].add(other)
                flow.tensors[other].consumers.add(node)
        if flow.before[node] and rng.random() < 0.5:
            over = max(flow.before[node])
            flow.in_place[node] = [over] if flow.tensors[over].size == flow.tensors[node].size else []
    return flow


@pytest.mark.parametrize("seed", range(25))
def test_the_order_is_the_best_there_is(seed: int) -> None:
    flow = random_flow(np.random.default_rng(seed), 7)
    valid = [
        order
        for order in itertools.permutations(range(7))
        if all(order.index(other) < order.index(node) for node in range(7) for other in flow.before[node])
    ]
    best = min(order_bound(flow, order) for order in valid)
    found = best_order(flow)
    assert tuple(found) in valid
    assert order_bound(flow, found) <= order_bound(flow, range(7))
    assert order_bound(flow, found) == best >= least_bound(flow)
    assert proven_best(flow, found)
    worst = max(valid, key=lambda order: order_bound(flow, order))
    assert order_bound(flow, worst) == best or not proven_best(flow, worst)


def test_an_output_waits_where_another_branch_is_wide() -> None:
    tensors = [Tensor(["a"], 10, 0, {1, 2}), Tensor(["output"], 5, 1, kept=True), Tensor(["wide"], 100, 2, {3})]
    flow = Flow([set(), {0}, {0}, {2}], [*tensors, Tensor(["other"], 1, 3, kept=True)], [[], [], [], []])
    assert order_bound(flow, range(4)) == 115 and order_bound(flow, best_order(flow)) == 111


def test_sizes_of_dims_are_asked_for_by_name() -> None:
    head = '<ir_version: 10, opset_import: ["" : 20]> g (float[batch, length] x) => '
    model = build("a = Softmax(x) y = Softmax(a)", "float[batch, length] y", head)
    with pytest.raises(PlanError, match=r"batch, length.*bindings=\{'batch': 1, 'length': 1\}"):
        plan_model(model, [{}])
    small, large = plan_model(model, [{"batch": 1, "length": 16}, {"batch": 8, "length": 16}])
    assert large.peak == 8 * small.peak == 2 * 8 * 64
    assert evaluate("past + 2*new", {"past": 3, "new": 4}) == 11 and evaluate("past + x", {"past": 3}) is None


def test_dims_that_are_expressions() -> None:
    """As exporters write them: a table of 512 positions that is cut to the length of the text."""
    head = '<ir_version: 10, opset_import: ["" : 20]> g (float[512] table, int64[1] end, float[batch, length] x) => '
    body = "zero = Constant<value_ints = [0]>() a = Slice(table, zero, end) b = Neg(a) y = Softmax(x)"
    model = build(body, "float[batch, length] y", head)
    for node in list(model.graph)[-3:-1]:
        node.outputs[0].shape = ir.Shape(["Min(512, length)"])
    with pytest.raises(PlanError, match=r"no size was given for length, batch\."):
        plan_model(model, [{}])
    with pytest.raises(PlanError, match=r"no size was given for length\."):
        plan_model(model, [{"batch": 1}])
    short, long = plan_model(model, [{"batch": 1, "length": 16}, {"batch": 1, "length": 1024}])
    assert [buffer.size for buffer in short.buffers] == [64, 64]
    assert [buffer.size for buffer in long.buffers] == [2048, 4096]
    sizes = {"s": 7, "encoder seq": 3}
    for text, size in {"(s - 1)//2 + 1": 4, "Max(1, s - 9)": 1, "s**2 + Mod(s, 2)": 50, "encoder seq": 3}.items():
        assert evaluate(text, sizes) == size
    assert evaluate("s/2", sizes) is evaluate("x@0", sizes) is evaluate("ceil(s)", sizes) is None


def test_sizes_that_depend_on_the_data_are_refused() -> None:
    model = build("a = NonZero(x) b = Cast<to=1>(a) y = Softmax(b)", "float[2, n] y")
    with pytest.raises(PlanError):
        flow_of(model.graph, Sizes(model, {}))


def test_plans_travel_as_text() -> None:
    model = build("a = Softmax(x) y = Softmax(a)")
    made = plan(model)
    assert read_plans({PLAN_KEY: pack_plans([made])}) == [made]
    assert read_plans({}) == []
    header = c_header(made)
    assert "#define MODEL_ARENA_BYTES 2048u" in header and "#define MODEL_A_OFFSET" in header
    picture = plan_svg(made)
    assert picture.count("<title>") == len(made.buffers) == 2 and "2048 bytes, at least 2048" in picture


def test_names_that_look_alike_in_c() -> None:
    buffers = (PlannedBuffer(("a.b", "a_b"), 64, 0, 1, 0),)
    header = c_header(MemoryPlan("", {}, ("n",), buffers, ""))
    assert "MODEL_A_B_OFFSET" in header and "MODEL_A_B_2_OFFSET" in header


def test_inspect_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = '<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 256] x) => '
    path = save(build("a = Softmax(x) y = Softmax(a)", "float[batch, 256] y", head), tmp_path / "m.onnx")
    print_memory(path, parse_bindings("batch=4"), tmp_path / "plan.svg")
    print_memory(path, parse_bindings("batch=4"), tmp_path / "plan.json")
    plans = [MemoryPlan.from_dict(item) for item in json.loads((tmp_path / "plan.json").read_text())]
    print_memory(path, parse_bindings("batch=4"), tmp_path / "plan.h")
    assert f"MODEL_ARENA_BYTES {plans[0].peak}u" in (tmp_path / "plan.h").read_text()
    with pytest.raises(PlanError, match="cannot be written"):
        print_memory(path, parse_bindings("batch=4"), tmp_path / "plan.txt")
    text = " ".join(capsys.readouterr().out.split())
    assert "at batch=4: arena 8.2 kB" in text and "alive at the fullest moment, step 1" in text
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")
    with pytest.raises(PlanError, match="batch"):
        print_memory(path, {}, None)
    with pytest.raises(PlanError, match="Cannot read the sizes"):
        parse_bindings("batch=four")
