"""Places nodes on devices: CPU and CUDA, or any others."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from ...compiler.base import Gate, Outcome, Pass, PassContext
from ...compiler.graph import FROM_KEY, PASS_KEY, is_op
from ...compiler.placement import Placement, fingerprint, is_placed
from ...runtime.assignment import LAYER_KEY, LAYERS_OPTION, layer_name
from ...runtime.cuda_kernels import has_cuda_kernel
from ...runtime.errors import PlanError
from ...runtime.node_profile import NodeProfile
from .costs import CostModel, GraphCosts, Machine, flops, graph_costs, traffic
from .device_search import DeviceProblem, find_devices

_ORT_DEVICES = {"cpu": "cpu", "cuda": "gpu"}
_TOGETHER = 65536  # bytes of a shared weight whose readers stay together
_SHAPE = 64  # elements of an integer vector that is about shapes


@dataclasses.dataclass(frozen=True)
class PartitionDevices(Pass):
    """Places every node of the main graph on a device, so that compute and transfers take the least time.

    1. Two devices: exact, as a minimum cut (Stone, 1977). More devices, or full memory: local search.
    2. What belongs together stays together: nodes that one rewrite made, DequantizeLinear and QuantizeLinear with what
       they surround, readers of one large weight, and the integer arithmetic of shapes, which stays on the first
       device. Inputs and outputs of the model are on the first device, too.
    3. The placement is written as ONNX Runtime reads it (``layer_ann`` and a session option) and as ONNX device
       configurations (IR version 11), which Netron shows. ``Session.misplaced`` says which nodes landed elsewhere.

    The first device is where the model was profiled. Others are rooflines: their constants must be given.

    Args:
        devices: names, the first one ``"cpu"``.
        machines: of each other device its constants: {name: (flops a second, bytes a second, seconds a kernel)}.
        links: bytes a second between the devices.
        latency: seconds that a transfer takes at least.
        memory: bytes of weights a device has room for, by name.
        cost: seconds on the first device, ``"measured"`` on the first sample, or ``"roofline"``.

    Raises:
        PlanError: constants are missing, or nothing fits into the memory; the bytes needed are said.

    Pays where a model does not fit on a GPU, or small parts of it are faster on the CPU.
    """

    name: ClassVar[str] = "partition-devices"
    gate: ClassVar[Gate] = "off"

    devices: tuple[str, ...] = ("cpu", "cuda")
    machines: Mapping[str, tuple[float, float, float]] | tuple[()] = ()
    links: float = 20e9
    latency: float = 10e-6
    memory: Mapping[str, int] | tuple[()] = ()
    cost: CostModel = "measured"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        machines, memory = dict(self.machines), dict(self.memory)
        asked = {**dataclasses.asdict(self), "devices": list(self.devices), "memory": memory}
        asked["machines"] = {name: list(numbers) for name, numbers in machines.items()}
        options = self._options()
        if is_placed(model, "devices", asked):
            return outcome
        missing = [name for name in self.devices[1:] if name not in machines]
        if missing or self.devices[:1] != ("cpu",) or len(set(self.devices)) < 2:
            raise PlanError(
                f"The devices {list(self.devices)} cannot be planned for: constants of {missing or 'cpu'} are missing.",
                "Name cpu first, and give machines={'cuda': (flops a second, bytes a second, seconds a kernel)}.",
            )
        costs = graph_costs(model, self.cost, context)
        groups = _groups(model, costs)
        problem = self._problem(model, costs, groups)
        assigned = find_devices(problem)
        if assigned is None:
            raise PlanError(
                f"The weights do not fit: {_needed(problem)} bytes, and there is room for {memory}.",
                "Give more memory, or quantize the weights first.",
            )
        self._write(model, groups, assigned, outcome)
        alone = problem.cost([0] * len(assigned))
        seconds = problem.cost(assigned)
        figures = {
            "seconds": seconds,
            "first_device_alone": alone if math.isfinite(alone) else None,
            "weight_bytes": dict(zip(self.devices, problem.held(assigned), strict=True)),
        }
        share = f"{seconds / alone:.3f} x the time of {self.devices[0]} alone" if alone else "no time"
        outcome.notes.append(f"predicted: {share}; bytes of weights: {figures['weight_bytes']}")
        Placement("devices", len(self.devices), asked, fingerprint(model), figures).store(model)
        outcome.ort_config = options
        return outcome

    def _options(self) -> dict[str, Any]:
        if not set(self.devices) <= set(_ORT_DEVICES):
            return {}
        text = ";".join(f"{_ORT_DEVICES[device]}({layer_name(device)})" for device in self.devices)
        return {"config_entries": {LAYERS_OPTION: text}}

    def _problem(self, model: ir.Model, costs: GraphCosts, groups: Sequence[int]) -> DeviceProblem:
        """Group 0 is the caller, who has the inputs and wants the outputs."""
        count = max(groups, default=0) + 1
        seconds = [[0.0] * len(self.devices) for _ in range(count)]
        weights: list[dict[str, int]] = [{} for _ in range(count)]
        seconds[0][1:] = [math.inf] * (len(self.devices) - 1)
        for index, (node, group) in enumerate(zip(model.graph, groups, strict=True)):
            weights[group].update(costs.weights[index])
            for device, name in enumerate(self.devices):
                seconds[group][device] += self._seconds(node, index, costs, name)
        tensors: list[tuple[int, frozenset[int], float]] = []
        position = {node: index for index, node in enumerate(model.graph)}
        for tensor in costs.flow.tensors:
            readers = {groups[n] for n in tensor.consumers if not is_op(costs.nodes[n], "Shape", "Size")}
            readers |= {0} if tensor.kept else set()
            move = self.latency + tensor.size / self.links
            tensors.append((groups[tensor.producer], frozenset(readers), move))
        for value in model.graph.inputs:
            readers = {groups[position[use.node]] for use in value.uses() if use.node in position}
            tensors.append(
                (0, frozenset(readers), self.latency + costs.input_bytes.get(value.name or "", 0) / self.links)
            )
        memory = dict(self.memory)
        caps = [float(memory.get(name, math.inf)) for name in self.devices]
        return DeviceProblem(seconds, weights, tensors, caps)

    def _seconds(self, node: ir.Node, index: int, costs: GraphCosts, device: str) -> float:
        if device == "cpu":
            return costs.seconds[index]
        if _is_about_shapes(costs, index) or (device == "cuda" and not has_cuda_kernel(node)):
            return math.inf
        seen: NodeProfile = costs.profiles[index]
        return Machine(*dict(self.machines)[device]).seconds(flops(node, seen), traffic(seen, costs.weights[index]))

    def _write(self, model: ir.Model, groups: Sequence[int], assigned: Sequence[int], outcome: Outcome) -> None:
        plan = ir.ModelConfiguration(self.name, len(self.devices), tuple(self.devices))
        model.device_configurations = (plan,)
        model.ir_version = max(model.ir_version, 11)
        for node, group in zip(model.graph, groups, strict=True):
            device = assigned[group]
            node.metadata_props[LAYER_KEY] = layer_name(self.devices[device])
            specs = tuple(ir.ShardingSpec(value, (device,)) for value in node.outputs if value.name)
            node.device_configurations = (ir.NodeDeviceConfiguration(plan, specs),)
            outcome.counts[f"nodes on {self.devices[device]}"] += 1


def _is_about_shapes(costs: GraphCosts, index: int) -> bool:
    """Small integer vectors: ONNX Runtime's kernels read them in the memory of the CPU."""
    seen = costs.profiles[index]
    return bool(seen.outputs) and all(
        kind == "int64" and len(shape) <= 1 and math.prod(shape) <= _SHAPE
        for kind, shape in zip(seen.output_types, seen.outputs, strict=True)
    )


def _groups(model: ir.Model, costs: GraphCosts) -> list[int]:
    """The group of each node, from 1 on."""
    nodes = list(model.graph)
    leader = list(range(len(nodes)))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    together: defaultdict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(nodes):
        if origin := node.metadata_props.get(FROM_KEY):
            together[f"made by {node.metadata_props.get(PASS_KEY)} of {origin}"].append(index)
        for name, size in costs.weights[index].items():
            if size >= _TOGETHER:
                together[f"weight {name}"].append(index)
        for before in costs.flow.before[index]:
            if is_op(nodes[before], "DequantizeLinear") or is_op(node, "QuantizeLinear"):
                together[f"quantized {index} {before}"] += [index, before]
            if _is_about_shapes(costs, index) and _is_about_shapes(costs, before):
                together[f"shapes {index} {before}"] += [index, before]
    for members in together.values():
        for member in members[1:]:
            leader[find(member)] = find(members[0])
    numbers: dict[int, int] = {}
    return [numbers.setdefault(find(index), len(numbers) + 1) for index in range(len(nodes))]


def _needed(problem: DeviceProblem) -> int:
    return sum({name: size for weights in problem.weights for name, size in weights.items()}.values())
