"""Stages: the cuts against brute force, the bound against all partitions, the parts against the whole."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.placement import STAGE_KEY, read_placement
from onnxlathe.passes.memory.lifetimes import Tensor
from onnxlathe.passes.partition.partition_stages import PartitionStages
from onnxlathe.passes.partition.stage_bound import stage_bound
from onnxlathe.passes.partition.stage_costs import StageProblem, cut_order
from onnxlathe.passes.partition.stage_program import solve_program
from onnxlathe.passes.partition.stage_search import find_stages
from onnxlathe.runtime.divided.parts import reads
from onnxlathe.runtime.errors import PlanError
from rewriting import from_text, rewrite


def random_problem(seed: int, balance: str = "time", largest: int = 14) -> StageProblem:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(4, largest + 1))
    before = [set(map(int, rng.choice(n, min(n, int(rng.integers(0, 3))), replace=False))) for n in range(count)]
    tensors = [Tensor([f"t{n}"], int(rng.integers(1, 50)), n) for n in range(count)]
    for node, others in enumerate(before):
        for other in others:
            tensors[other].consumers.add(node)
    names = [f"w{n}" for n in range(count)]  # drawn with repetition: some are shared
    sizes = {name: int(rng.integers(1, 100)) for name in names}
    weights = [{name: sizes[name] for name in rng.choice(names, int(rng.integers(0, 3)))} for _ in range(count)]
    cap = float(rng.choice([np.inf, sum(sizes.values()) * 0.8]))
    seconds = [float(s) for s in rng.integers(1, 20, count)]
    return StageProblem(seconds, before, tensors, weights, float(rng.choice([0.0, 0.2])), cap, balance)  # type: ignore[arg-type]


def cost(problem: StageProblem, order: tuple[int, ...], start: int, end: int) -> float:
    """A stage's cost by its definition, tensor by tensor."""
    step = {node: index for index, node in enumerate(order)}
    seconds = sum(problem.seconds[node] for node in order[start:end])
    for cut in (start, end):
        for tensor in problem.tensors:
            if step[tensor.producer] < cut <= max((step[n] for n in tensor.consumers), default=-1):
                seconds += tensor.size * problem.transfer
    held = {name: size for node in order[start:end] for name, size in problem.weights[node].items()}
    live = [
        sum(
            t.size
            for t in problem.tensors
            if step[t.producer] <= at <= max([step[n] for n in t.consumers] or [step[t.producer]])
        )
        for at in range(start, end)
    ]
    memory = sum(held.values()) + max(live)
    if memory > problem.cap:
        return np.inf
    return memory if problem.balance == "memory" else seconds


@pytest.mark.parametrize("balance", ["time", "memory"])
def test_cuts_equal_brute_force_on_random_graphs(balance: str) -> None:
    for seed in range(100):
        problem = random_problem(seed, balance)
        order = tuple(range(len(problem.seconds)))
        count = 2 + seed % 3
        found = cut_order(problem, order, count)
        all_cuts = [(0, *inner, len(order)) for inner in itertools.combinations(range(1, len(order)), count - 1)]
        best = min(max(cost(problem, order, a, b) for a, b in itertools.pairwise(cuts)) for cuts in all_cuts)
        assert found.bottleneck == pytest.approx(best), f"seed {seed}"
        if np.isfinite(best):
            mine = max(cost(problem, order, a, b) for a, b in itertools.pairwise(found.cuts))
            assert mine == pytest.approx(best)


def best_of_all(problem: StageProblem, count: int) -> float:
    """The least bottleneck over all labels that fall along no edge: every partition there is."""
    best = np.inf
    for labels in itertools.product(range(count), repeat=len(problem.seconds)):
        if len(set(labels)) == count and all(labels[o] <= labels[n] for n, b in enumerate(problem.before) for o in b):
            sums = [
                sum(s for s, at in zip(problem.seconds, labels, strict=True) if at == stage) for stage in range(count)
            ]
            best = min(best, max(sums))
    return best


def test_the_bound_holds_and_the_search_reaches_it() -> None:
    """Against all partitions, not only those of one order."""
    for seed in range(60):
        problem = random_problem(seed, largest=8)
        problem = StageProblem(problem.seconds, problem.before, problem.tensors, problem.weights)
        count = 2 + seed % 2
        truth = best_of_all(problem, count)
        assert stage_bound(problem, count) <= truth * (1 + 1e-9), "the quick bound is wrong"
        assert solve_program(problem, count)[0] == pytest.approx(truth, rel=1e-4)
        found, bound = find_stages(problem, count)
        assert found.bottleneck == pytest.approx(truth, rel=0.02) and bound <= truth * (1 + 1e-9)


MLP = """<ir_version: 10, opset_import: ["" : 20]> mlp (float[batch, 32] x, float[32, 32] a, float[32, 32] b,
    float[32, 32] c, float[32, 32] d) => (float[batch, 32] y, float[batch, 32] early) {
  p = MatMul(x, a)  q = Relu(p)  early = MatMul(q, b)  s = Relu(early)  t = MatMul(s, c)  u = Add(t, q)
  y = MatMul(u, d) }"""


def mlp() -> ir.Model:
    rng = np.random.default_rng(0)
    return from_text(MLP, **{name: rng.standard_normal((32, 32)).astype(np.float32) * 0.2 for name in "abcd"})


def labels(model: ir.Model) -> list[int]:
    return [int(node.metadata_props[STAGE_KEY]) for node in model.graph]


@pytest.mark.parametrize("cost_model", ["measured", "roofline"])
def test_nodes_are_labelled_and_no_stage_reads_a_later_one(cost_model: str) -> None:
    after, outcome = rewrite(PartitionStages(k=3, cost=cost_model), mlp(), nested=False)  # type: ignore[arg-type]
    assert outcome.counts == {"stages": 3} and sorted(set(labels(after))) == [0, 1, 2]
    assert labels(after) == sorted(labels(after))
    stage = dict(zip(after.graph, labels(after), strict=True))
    for node in after.graph:
        assert all(stage[v.producer()] <= stage[node] for v in reads(node) if v.producer() is not None)  # type: ignore[index]
    placement = read_placement(after)
    assert placement is not None and placement.figures["bottleneck"] >= placement.figures["bound"] * (1 - 1e-9)


def test_bodies_of_subgraphs_stay_with_their_node() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 8] x, bool take) => (float[batch, 8] y) {
      a = Relu(x)  b = Neg(a)
      c = If (take) <then_branch = yes () => (float[batch, 8] r) { r = Add(a, b) },
                     else_branch = no () => (float[batch, 8] r) { r = Sub(a, b) }>
      y = Neg(c) }"""
    after, _ = rewrite(PartitionStages(k=2, cost="roofline"), from_text(text), nested=False)
    stage = {node.name: label for node, label in zip(after.graph, labels(after), strict=True)}
    branch = next(node for node in after.graph if node.op_type == "If")
    assert all(stage[v.producer().name] <= stage[branch.name] for v in reads(branch) if v.producer() is not None)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (PartitionStages(k=9), "Take k from 1 to 7"),
        (PartitionStages(k=0), "Take k from 1 to 7"),
        (PartitionStages(k=2, memory_cap=1000), "smallest cap found to hold is"),
    ],
)
def test_what_cannot_be_divided(step: PartitionStages, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        step(mlp(), PassContext())


def test_the_smallest_cap_that_is_said_holds() -> None:
    with pytest.raises(PlanError) as caught:
        PartitionStages(k=2, memory_cap=1000)(mlp(), PassContext())
    cap = int(caught.value.remedy.split("hold is ")[1].split(";")[0])
    model = mlp()
    PartitionStages(k=2, memory_cap=cap)(model, PassContext())
    placement = read_placement(model)
    assert placement is not None and max(placement.figures["memory_bytes"]) <= cap
    with pytest.raises(PlanError):
        PartitionStages(k=2, memory_cap=cap - 1)(mlp(), PassContext())
