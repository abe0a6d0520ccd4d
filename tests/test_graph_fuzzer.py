"""A small sample of what ``benchmarks/fuzz.py`` does with ten thousand graphs; the judge sees what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from random import Random
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from graph_fuzzer.generate import Case, draw
from graph_fuzzer.judge import Judge, Verdict
from graph_fuzzer.reduce import reduce
from graph_fuzzer.repeated import draw_blocks
from graph_fuzzer.trials import BLOCK_TRIALS, TRIALS, Trial
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxlathe.compiler.base import Outcome, Pass, PassContext
from onnxlathe.compiler.graph import all_nodes, constant
from onnxlathe.compiler.verify import run_reference
from onnxlathe.passes import PASSES, PruneWidth
from rewriting import from_text

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

PRUNING = {"prune-width", "prune-depth", "prune-sparse", "prune-adaptive", "distill"}
QUICK = [trial for trial in TRIALS if trial.every == 1]
_DRAWS = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


def test_every_pass_has_a_trial() -> None:
    assert {trial.name for trial in TRIALS if trial.make is not None} == set(PASSES)


@_DRAWS
@given(st.integers(0, 10**6))
def test_random_graphs(seed: int) -> None:
    random = Random(f"ci/{seed}")
    judge = Judge(draw(random), random)
    found = {"load": judge.load()} | {trial.name: judge.trial(trial) for trial in QUICK}
    found["truthful"] = judge.truthful()
    wrong = {name: verdict.detail for name, verdict in found.items() if verdict.kind == "wrong"}
    assert not wrong


def test_random_blocks() -> None:
    """Repeated residual blocks, on which each pass that prunes or distills has something to do."""
    kinds: dict[str, set[str]] = {}
    for seed in range(6):
        random = Random(f"ci/{seed}")
        judge = Judge(draw_blocks(random), random)
        for trial in BLOCK_TRIALS:
            if trial.name in PRUNING and trial.every <= (5 if seed == 0 else 2):
                verdict = judge.trial(trial)
                assert verdict.kind != "wrong", (seed, trial.name, trial.after, verdict.detail)
                kinds.setdefault(trial.name, set()).add(verdict.kind)
        assert judge.truthful().kind == "same"
    assert set(kinds) == PRUNING and all("approximate" in found for found in kinds.values()), kinds


@dataclasses.dataclass(frozen=True)
class Skewed(PruneWidth):
    """Cuts right, and spoils something else, or a figure."""

    boast: bool = False

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = super().__call__(model, context)
        if self.boast:
            outcome.notes[-1] = "bytes of weights: 1% of before"
            return outcome
        bias = model.graph.initializers["b"]
        bias.const_value = ir.tensor(constant(bias) * np.float32(1.01), name="b")
        return outcome


@pytest.mark.parametrize(("boast", "words"), [(False, "the masked original's"), (True, "says that 1% of before")])
def test_the_judge_sees_what_pruning_spoils(boast: bool, words: str) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[2, 4] x, float[4, 8] w, float[8, 4] v, float[4] b)
        => (float[2, 4] y) { a = MatMul(x, w) c = Relu(a) d = MatMul(c, v) y = Add(d, b) }"""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape) for name, shape in {"w": (4, 8), "v": (8, 4), "b": (4,)}.items()}
    case = case_of(text, **{name: array.astype(np.float32) for name, array in arrays.items()})
    for step, kind in ((PruneWidth, "approximate"), (functools.partial(Skewed, boast=boast), "wrong")):
        trial = Trial("width", lambda random, step=step: step(method="magnitude", refit=False, multiple=1))
        verdict = Judge(case, Random(0)).trial(trial)
        assert verdict.kind == kind
    assert words in verdict.detail


@dataclasses.dataclass(frozen=True)
class Broken(Pass):
    """Turns one Add into a Sub; or says nothing of what it did; or never ends doing it."""

    name: ClassVar[str] = "broken"
    silent: bool = False
    again: bool = False

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        for node in all_nodes(model):
            if node.op_type == "Add" and not self.again:
                node.op_type = "Sub"
                outcome.counts.update({} if self.silent else {"Add": 1})
            elif self.again:
                node.metadata_props["seen"] = node.metadata_props.get("seen", "") + "x"
                outcome.counts["seen"] += 1
        return outcome


def case_of(text: str, **weights: np.ndarray) -> Case:
    """A case from ONNX text with one input x [2, 4]."""
    model = from_text(text, **weights)
    feeds = [{"x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)}]
    return Case(ir.to_proto(model), feeds, run_reference(model, feeds))


TEXT = """<ir_version: 10, opset_import: ["" : 20]> g (float[2, 4] x) => (float[2, 4] y)
{ a = Exp(x) b = Add(a, x) c = Tanh(b) y = Neg(c) }"""


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, "differs by"), ({"silent": True}, "did not say so"), ({"again": True}, "a second run changes it again")],
)
def test_the_judge_sees_broken_promises(options: dict[str, bool], words: str) -> None:
    judge = Judge(case_of(TEXT), Random(0))
    verdict = judge.trial(Trial("broken", lambda random: Broken(**options)))
    if verdict.kind != "wrong":
        verdict = judge.truthful()
    assert verdict.kind == "wrong" and words in verdict.detail


def test_a_failing_case_is_made_small() -> None:
    trial = Trial("broken", lambda random: Broken())

    def verdict(case: Case) -> Verdict:
        return Judge(case, Random(0)).trial(trial)

    small = reduce(case_of(TEXT), lambda case: verdict(case).kind == "wrong")
    assert [node.op_type for node in small.proto.graph.node] == ["Add"] and verdict(small).kind == "wrong"


def test_rounding_is_told_from_error() -> None:
    """1e6 + x - 1e6 loses all but a digit: another order of the sums is no error, another sign is."""
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[2, 4] x) => (float[2, 4] y)
    { m = Constant<value = float {1000000.0}>() a = Add(x, m) y = Sub(a, m) }"""
    judge = Judge(case_of(text), Random(0))
    assert judge.sensitivity(judge.live) > 1e-3
    plain = Judge(case_of(TEXT), Random(0))
    assert 0 < plain.sensitivity(plain.live) < 1e-5


def test_a_sample_of_the_backend_tests() -> None:
    """``benchmarks/backend_tests.py`` does all of them."""
    import onnx
    from backend_tests import judge

    names = ("simple/test_shape", "simple/test_expand_shape_model1", "simple/test_single_relu_model")
    data = Path(onnx.__file__).parent / "backend/test/data"
    for folder in [data / name for name in names] + sorted((data / "pytorch-operator").iterdir())[::6]:
        if (folder / "model.onnx").exists():
            found = judge(_OnDisk(folder.name, str(folder)))
            assert not any(verdict.startswith("WRONG") for verdict in found.values()), (folder.name, found)


@dataclasses.dataclass(frozen=True)
class _OnDisk:
    name: str
    model_dir: str
    model: None = None
    data_sets: None = None


def test_threads_on_one_session() -> None:
    """``benchmarks/stress.py`` does it ten thousand times from eight threads."""
    from stress import checks, hammer

    for name, check in checks().items():
        found = hammer(check, 4, 200 if name.startswith("run") else 20)
        assert not found["wrong"] and not found["errors"], (name, found)
        assert found["growth_bytes"] < 16 << 20, (name, found)
