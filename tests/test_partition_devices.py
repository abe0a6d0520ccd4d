"""Placement on devices: against brute force, against the table of CUDA kernels, and as ONNX Runtime reads it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.placement import read_placement
from onnxlathe.passes.partition.device_search import DeviceProblem, find_devices
from onnxlathe.passes.partition.partition_devices import PartitionDevices
from onnxlathe.runtime.artifact import save
from onnxlathe.runtime.assignment import LAYER_KEY
from onnxlathe.runtime.cuda_kernels import has_cuda_kernel
from onnxlathe.runtime.errors import PlanError
from rewriting import from_text, rewrite


def random_problem(seed: int, devices: int = 2, capped: bool = False) -> DeviceProblem:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 10 if devices == 2 else 7))
    seconds = [[float(s) for s in rng.integers(1, 30, devices)] for _ in range(count)]
    for group in rng.choice(count, count // 4, replace=False):  # has a kernel on one device only
        seconds[group][int(rng.integers(devices))] = math.inf
    weights = [{f"w{rng.integers(count)}": 0 for _ in range(int(rng.integers(0, 3)))} for _ in range(count)]
    sizes = {f"w{n}": int(rng.integers(1, 100)) for n in range(count)}
    weights = [{name: sizes[name] for name in held} for held in weights]
    tensors = [
        (n, frozenset(map(int, rng.integers(n + 1, count, int(rng.integers(0, 3))))), float(rng.integers(0, 20)))
        for n in range(count - 1)
    ]
    total = sum({name: size for held in weights for name, size in held.items()}.values())
    return DeviceProblem(seconds, weights, tensors, [max(1.0, total * 0.6) if capped else math.inf] * devices)


def best_of_all(problem: DeviceProblem) -> float:
    return min(problem.cost(a) for a in itertools.product(range(problem.devices), repeat=len(problem.seconds)))


def test_two_devices_equal_brute_force_on_random_graphs() -> None:
    for seed in range(200):
        problem = random_problem(seed)
        found = find_devices(problem)
        assert found is not None and problem.cost(found) == pytest.approx(best_of_all(problem)), f"seed {seed}"


def test_the_cost_is_that_of_its_definition() -> None:
    """A tensor with two readers on another device is moved there once; a shared weight is held once."""
    tensors = [(0, frozenset([1, 2, 3]), 5.0)]
    problem = DeviceProblem([[1.0, 9.0]] * 4, [{"w": 10}, {"w": 10}, {}, {"v": 1}], tensors, [math.inf] * 2)
    assert problem.cost([0, 1, 1, 0]) == 1 + 9 + 9 + 1 + 5
    assert problem.held([0, 0, 0, 1]) == [10, 1] and problem.held([0, 1, 0, 1]) == [10, 11]


@pytest.mark.parametrize(("devices", "capped"), [(2, True), (3, False), (3, True)])
def test_local_search_is_near_brute_force(devices: int, capped: bool) -> None:
    """Not always equal; never infeasible where something fits."""
    ratios: list[float] = []
    for seed in range(40):
        problem = random_problem(seed, devices, capped)
        best = best_of_all(problem)
        if math.isinf(best):
            continue
        found = find_devices(problem)
        assert found is not None, f"seed {seed}: something fits"
        ratios.append(problem.cost(found) / best)
    assert len(ratios) > 10 and np.mean(ratios) < 1.05


TEXT = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g (float[batch, 256] x, float[256, 512] a,
  float[512, 256] b, int64[1] minus) => (float[batch, 256] y) {
    p = MatMul(x, a) q = Relu(p) h = Hardmax(q) n = Shape<start=0, end=1>(h) shape = Concat<axis=0>(n, minus)
    r = Reshape(h, shape) y = MatMul(r, b) }"""
FAST = {"cuda": (1e14, 1e12, 1e-9)}


def model() -> ir.Model:
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in (("a", (256, 512)), ("b", (512, 256)))}
    return from_text(TEXT, **arrays, minus=np.array([-1], np.int64))


def devices(graph: ir.Model) -> dict[str, str]:
    return {node.op_type: node.metadata_props[LAYER_KEY] for node in graph.graph}


def test_a_fast_device_gets_what_it_has_kernels_for() -> None:
    """Hardmax has no CUDA kernel; shapes stay on the CPU."""
    step = PartitionDevices(machines=FAST, latency=1e-9, links=1e12)
    after, outcome = rewrite(step, model(), nested=False)
    placed = devices(after)
    assert placed["MatMul"] == placed["Relu"] == "onnxlathe_cuda"
    assert placed["Hardmax"] == placed["Shape"] == placed["Concat"] == "onnxlathe_cpu"
    assert outcome.ort_config["config_entries"]["session.layer_assignment_settings"] == (
        "cpu(onnxlathe_cpu);gpu(onnxlathe_cuda)"
    )


@pytest.mark.parametrize("step", [
    PartitionDevices(machines=FAST, latency=1.0),
    PartitionDevices(machines={"cuda": (1e3, 1e3, 1.0)}, latency=1e-9),
])  # fmt: skip
def test_what_does_not_pay_stays(step: PartitionDevices) -> None:
    """Transfers that take a second, or a device that is slow."""
    after, _ = rewrite(step, model(), nested=False)
    assert set(devices(after).values()) == {"onnxlathe_cpu"}


def test_two_cpus_of_different_speed() -> None:
    """The second one has half the time for everything: it gets all but shapes, as soon as transfers are free."""
    step = PartitionDevices(("cpu", "fast"), {"fast": (1e15, 1e15, 1e-12)}, links=1e15, latency=0.0, cost="roofline")
    _, outcome = rewrite(step, model(), nested=False)
    assert outcome.counts["nodes on fast"] == 5 and not outcome.ort_config, "ORT knows no such device"


def test_memory_is_kept() -> None:
    weights = 256 * 512 * 4
    step = PartitionDevices(machines=FAST, latency=1e-9, links=1e12, memory={"cuda": weights + 1000})
    after = model()
    step(after, PassContext())
    placement = read_placement(after)
    assert placement is not None and placement.figures["weight_bytes"]["cuda"] <= weights + 1000
    with pytest.raises(PlanError, match=f"{2 * weights + 8} bytes"):
        PartitionDevices(machines=FAST, memory={"cuda": 1000, "cpu": 1000})(model(), PassContext())


def test_the_session_says_what_landed_elsewhere(tmp_path: Path) -> None:
    out = lathe.compile(model(), [PartitionDevices(machines=FAST, latency=1e-9, links=1e12)], progress=False)
    session = lathe.Session(out.save(tmp_path / "placed.onnx"))
    wanted = {node.name for node in out.model.graph if node.metadata_props[LAYER_KEY] == "onnxlathe_cuda"}
    found = {item.node: (item.wanted, item.provider) for item in session.misplaced}
    assert found and set(found) <= wanted and set(found.values()) == {("cuda", "CPUExecutionProvider")}
    assert lathe.Session(model()).misplaced == []


def test_the_file_has_onnx_device_configurations(tmp_path: Path) -> None:
    after = model()
    PartitionDevices(machines=FAST, latency=1e-9, links=1e12)(after, PassContext())
    proto = onnx.load(save(after, tmp_path / "placed.onnx"))
    assert proto.ir_version >= 11 and list(proto.configuration[0].device) == ["cpu", "cuda"]
    for node in proto.graph.node:
        spec = node.device_configurations[0].sharding_spec[0]
        assert proto.configuration[0].device[spec.device[0]] == devices(after)[node.op_type].removeprefix("onnxlathe_")


def test_constants_must_be_known() -> None:
    with pytest.raises(PlanError, match="constants of \\['cuda'\\]"):
        PartitionDevices()(model(), PassContext())


def test_the_table_knows_types() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g (float[4] x,
      int64[4] i) => (float[4] y) {
      y = Relu(x) c = Hardmax(x) e = com.microsoft.Gelu(x) f = com.microsoft.DynamicQuantizeMatMul(x) d = ArgMax(i) }"""
    found = {node.op_type: has_cuda_kernel(node) for node in ir.from_onnx_text(text).graph}
    assert found == {"Relu": True, "Hardmax": False, "Gelu": True, "DynamicQuantizeMatMul": False, "ArgMax": False}


def test_operators_that_onnxruntime_replaces_by_their_bodies() -> None:
    """CastLike is a function: it is not in the profile, and its result stays in its part."""
    text = """<ir_version: 11, opset_import: ["" : 20]> g (float[4, 8] x, float16[1] h) => (float16[4, 8] y)
    { a = Exp(x) b = CastLike(a, h) y = Relu(b) }"""
    step = PartitionDevices(machines={"cuda": (1e12, 1e11, 5e-6)}, cost="roofline")
    _, outcome = rewrite(step, from_text(text), nested=False)
    assert outcome.changed
