"""Which nodes a target cannot run: the table against onnxruntime itself and against a browser, and what is said."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import onnxlathe as lathe
from onnxlathe import cli
from onnxlathe.compiler.base import Outcome, Pass, PassContext
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.runtime.artifact import save
from onnxlathe.runtime.errors import ModelError, RuntimeUnavailable
from onnxlathe.runtime.inference import session_options
from onnxlathe.runtime.targets import check_target, device_of, facts, node_obstacles, obstacles, read_target
from rewriting import from_text

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
HEAD = '<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> g '
# In the CPU provider here, and not in onnxruntime-web 1.30.
SMALL_WHERE = HEAD.format(opset=20) + "(bool[n] c, int8[n] x, int8[n] z) => (int8[n] y) { y = Where(c, x, z) }"
SILU = HEAD.format(opset=20) + "(float[n] x) => (float[n] y) { y = com.microsoft.ScaledSiLU(x) }"


def opens(content: bytes) -> bool:
    """Whether onnxruntime opens a model here, with its optimizations off."""
    try:
        ort.InferenceSession(content, session_options(optimize=False), providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


def test_the_table_is_what_onnxruntime_does() -> None:
    """Node tests of onnx: what the table refuses does not open; what does not open, it refuses, but for attributes."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)[::5]
    counts = {(refused, opened): 0 for refused in (True, False) for opened in (True, False)}
    wrong: list[str] = []
    for case in cases:
        model = ir.from_proto(case.model)
        infer_shapes(model)
        newest = model.opset_imports.get("", 0) > 26
        refused, opened = newest or any(node_obstacles(model, "cpu")), opens(case.model.SerializeToString())
        counts[refused, opened] += 1
        if refused and opened:
            wrong.append(case.name)
    assert not wrong, "refused, and yet it opens"
    assert counts[False, True] > 200 and counts[True, False] > 40
    assert counts[False, False] <= 0.02 * len(cases), "kernels that are there, and refuse an attribute"


@pytest.mark.parametrize("text", [SMALL_WHERE, SILU])
def test_what_the_browser_lacks(text: str) -> None:
    model = from_text(text)
    infer_shapes(model)
    assert not obstacles(model, "cpu") and not obstacles(model, "mobile")
    found = obstacles(model, "web")
    assert len(found) == 1 and found[0].what.split()[0].split(".")[-1] in ("Where", "ScaledSiLU")


def test_the_message_names_ten_operators_and_counts() -> None:
    nodes = " ".join(f"a{i} = Made{i % 12}(x) b{i} = Made{i % 12}(x)" for i in range(12))
    model = from_text(HEAD.format(opset=20) + f"(float[n] x) => (float[n] y) {{ {nodes} y = Relu(x) }}")
    for number, node in enumerate(model.graph):
        node.name = f"node{number}"
    with pytest.raises(ModelError) as raised:
        check_target(model, "web")
    said = str(raised.value)
    assert (
        "cannot run on web (onnxruntime-web 1.30.0): ai.onnx.Made0 20 x 2: it has no such operator (first: node0)"
        in said
    )
    assert said.count("no such operator") == 10 and "; and 2 more" in said and "Change the opset" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD.format(opset=20) + "(int64[n] x) => (int64[n] y) { y = Sigmoid(x) }", "no kernel for int64 as input 0"),
        (HEAD.format(opset=24) + "(float[n] x) => (float[n] y) { y = Swish(x) }", ""),  # a function: expanded
        (HEAD.format(opset=20) + "(float16[n,n] x) => (float16[n,n] y) { y = MatMul(x, x) }", ""),  # cast around it
        (HEAD.format(opset=6) + "(float[n] x) => (float[n] y) { y = Relu(x) }", ""),
        (HEAD.format(opset=5) + "(float[n] x) => (float[n] y) { y = Relu(x) }", "no kernel of version 1, only of"),
    ],
)
def test_types_and_versions(text: str, said: str) -> None:
    model = ir.from_proto(onnx.parser.parse_model(text))
    reasons = [item.reason for item in node_obstacles(model, "mobile")]
    assert (said in reasons[0]) if said else not reasons
    assert bool(reasons) != opens(ir.to_proto(model).SerializeToString()), "as onnxruntime has it"


def test_subgraphs_and_functions() -> None:
    text = (
        HEAD.format(opset=20)
        + """(bool c, float[n] x) => (float[n] y) {
        y = If(c) <then_branch = t () => (float[n] a) { a = Nothing(x) },
                   else_branch = e () => (float[n] b) { b = Abs(x) }>
    }"""
    )
    assert [item.what for item in node_obstacles(from_text(text), "web")] == ["ai.onnx.Nothing 20"]
    text = """<ir_version: 10, opset_import: ["" : 20, "mine" : 1]> g (float[n] x) => (float[n] y) { y = mine.twice(x) }
        <domain: "mine", opset_import: ["" : 20]> twice (a) => (b) { b = Add(a, a) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert not list(node_obstacles(model, "web")) and not obstacles(model, "cpu")


def test_limits_of_the_browser() -> None:
    model = from_text(HEAD.format(opset=20) + "(bfloat16[n] x) => (bfloat16[n] y) { y = Identity(x) }")
    assert [item.what for item in obstacles(model, "web")] == ["input x", "output y"]
    assert "JavaScript has no tensors of bfloat16" in obstacles(model, "web")[0].reason
    model = from_text(HEAD.format(opset=20) + "(float[n] x) => (float[n] y) { y = Relu(x) }")
    huge = ir.Value(name="w", shape=ir.Shape([2**30]), type=ir.TensorType(ir.DataType.FLOAT))
    huge.const_value = ir.ExternalTensor("w.bin", 0, 2**32, ir.DataType.FLOAT, shape=ir.Shape([2**30]), name="w")
    model.graph.register_initializer(huge)
    assert [item.what for item in obstacles(model, "web")] == [f"{2**32} bytes of weights"]


def test_too_new_for_everybody() -> None:
    model = from_text(HEAD.format(opset=20) + "(float[n] x) => (float[n] y) { y = Relu(x) }")
    model.opset_imports[""] = 99
    model.ir_version = 99
    assert {item.what for item in obstacles(model, "cpu")} == {"opset 99", "IR version 99"}


def test_what_only_the_session_knows() -> None:
    """A kernel that is there and takes no such attribute: the table cannot say it, opening the model does."""
    text = HEAD.format(opset=20) + '(float[n] x) => (float[n] y) { y = com.microsoft.QuickGelu<alpha="no">(x) }'
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert not list(node_obstacles(model, "web"))
    assert obstacles(model, "web")[0].what == "the model"


def test_facts(small_model: ir.Model) -> None:
    assert facts(small_model, "web") == [
        "WebGPU has kernels for 3 of 4 nodes; wasm, with copies between for the rest: Identity x 1"
    ]
    assert [fact.split()[0] for fact in facts(small_model, "mobile")] == ["NNAPI", "CoreML"]
    assert facts(small_model, "cuda") == ["CUDA has kernels for 4 of 4 nodes"] and facts(small_model, "cpu") == []


@dataclasses.dataclass(frozen=True)
class ToInt8(Pass):
    """Chooses in 8 bits, which the browser cannot."""

    name: ClassVar[str] = "to-int8"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        node = next(node for node in model.graph if node.op_type == "Where")
        if node.inputs[1].producer() is not None:  # type: ignore[union-attr]
            return outcome
        casts: list[ir.Node] = []
        for index in (1, 2):
            cast = ir.node("Cast", [node.inputs[index]], attributes={"to": ir.DataType.INT8}, name=f"cast{index}")
            cast.outputs[0].name, cast.outputs[0].shape = f"small{index}", node.outputs[0].shape
            cast.outputs[0].type = ir.TensorType(ir.DataType.INT8)
            casts.append(cast)
        small = ir.node("Where", [node.inputs[0], *(cast.outputs[0] for cast in casts)], name="small")
        small.outputs[0].name, small.outputs[0].shape = "small", node.outputs[0].shape
        small.outputs[0].type = ir.TensorType(ir.DataType.INT8)
        back = ir.node("Cast", small.outputs, attributes={"to": ir.DataType.INT32}, name="back")
        model.graph.insert_before(node, [*casts, small, back])
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [back], node.outputs, back.outputs)
        outcome.counts["Where in 8 bits"] += 1
        return outcome


def test_compile_leaves_out_what_the_target_cannot_run() -> None:
    model = from_text(
        HEAD.format(opset=20) + "(bool[n] c, int32[n] x, int32[n] z) => (int32[n] y) { y = Where(c, x, z) }"
    )
    feeds = [{"c": np.array([True, False]), "x": np.array([1, 2], np.int32), "z": np.array([3, 4], np.int32)}]
    kept = lathe.compile(model, [ToInt8()], calibration=feeds, target="mobile", progress=False)
    assert kept.report.passes[0].status == "applied" and "checked for mobile" in kept.report.notes
    out = lathe.compile(model, [ToInt8()], calibration=feeds, target="web", progress=False)
    assert out.report.passes[0].status == "dropped" and out.report.ops_after == {"Where": 1}
    assert "web cannot run what it makes: ai.onnx.Where 20 (no kernel for" in out.report.passes[0].notes[0]
    with pytest.raises(ModelError, match="cannot run on web"):
        lathe.compile(from_text(SMALL_WHERE), "basic", target="web", progress=False)


def test_names() -> None:
    assert device_of("web") == device_of("mobile") == device_of("cpu") == "cpu" and read_target("web") == "web"
    for read in (read_target, device_of):
        with pytest.raises(RuntimeUnavailable, match="Unknown"):
            read("toaster")


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def check(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["onnxlathe", "check", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), (captured.out + captured.err).replace("\n", " ")

    path = save(from_text(SMALL_WHERE), tmp_path / "m.onnx")
    assert check(path)[0] == 0 and "runs on cpu" in check(path)[1]
    code, said = check(path, "--target", "web")
    assert code == 2 and "ai.onnx.Where 20 x 1: no kernel for int8 as input 1" in said
    assert "NNAPI has kernels for" in check(path, "--target", "mobile")[1]
    assert check(path, "--target", "toaster")[0] == 2


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A page of a headless browser that has onnxruntime-web; it sees the folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from web import browser_page, problem, served  # type: ignore[import-not-found]

    if reason := problem():
        pytest.skip(reason)
    (tmp_path / "index.html").write_text("<title>kernels</title>")
    with served(tmp_path) as address, browser_page() as opened:
        opened.goto(f"{address}/index.html")
        yield opened


def test_the_table_is_what_the_browser_does(page: Any, tmp_path: Path) -> None:
    texts = [
        SMALL_WHERE,
        SILU,
        HEAD.format(opset=20) + "(bool[n] c, float[n] x, float[n] z) => (float[n] y) { y = Where(c, x, z) }",
        HEAD.format(opset=23) + "(float[n,n] x) => (float[n,n] y) { y = RMSNormalization(x, x) }",
        HEAD.format(opset=20) + "(float16[n,n] x) => (float16[n,n] y) { y = MatMul(x, x) }",
        HEAD.format(opset=24) + "(float[n] x) => (float[n] y) { y = Swish(x) }",
        HEAD.format(opset=20) + "(int64[n] x) => (int64[n] y) { y = Sigmoid(x) }",
        HEAD.format(opset=20) + "(bfloat16[n] x) => (bfloat16[n] y) { y = Identity(x) }",
    ]
    code = """async name => {
        const ort = await import('/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs');
        ort.env.wasm.numThreads = 1;
        try {
            const session = await ort.InferenceSession.create(name, {logSeverityLevel: 4});
            const x = new ort.Tensor('float32', [1], [1]);
            return session.inputMetadata.map(item => new ort.Tensor(item.type, [], [0])).length > 0;
        } catch (error) { return false; }
    }"""
    for number, text in enumerate(texts):
        model = from_text(text)
        infer_shapes(model)
        save(model, tmp_path / f"{number}.onnx")
        assert page.evaluate(code, f"/{number}.onnx") is not bool(obstacles(model, "web")), text
