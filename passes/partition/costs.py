"""What nodes cost: seconds of each, bytes of what they hand on, bytes of the weights they read."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from ...compiler.base import PassContext
from ...compiler.graph import Array
from ...runtime.divided.parts import reads
from ...runtime.feeds import make_feeds
from ...runtime.node_profile import NodeProfile, Shape, profile_nodes, set_types
from ..memory.lifetimes import Flow, Sizes, flow_of

CostModel = Literal["measured", "roofline"]


@dataclasses.dataclass(frozen=True)
class Machine:
    """The constants of a roofline (Williams et al., 2009).

    Attributes:
        flops: floating-point operations per second of a large matrix product.
        bandwidth: bytes per second of memory.
        launch: seconds that every node costs at least.
    """

    flops: float
    bandwidth: float
    launch: float = 1e-6

    def seconds(self, flops: float, nbytes: float) -> float:
        """The time of a kernel with that much arithmetic and traffic."""
        return max(flops / self.flops, nbytes / self.bandwidth) + self.launch


@functools.cache
def this_machine() -> Machine:
    """Constants of this machine's CPU, measured once in a process (a tenth of a second)."""
    side = np.ones((512, 512), np.float32)
    block = np.ones(4_000_000, np.float32)
    target = np.empty_like(block)
    product = min(_time(lambda: side @ side) for _ in range(5))
    copy = min(_time(lambda: np.copyto(target, block)) for _ in range(5))
    return Machine(2 * 512**3 / product, 2 * block.nbytes / copy)


def _time(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class GraphCosts:
    """The main graph of a model as the partitioning algorithms look at it; nodes by their position.

    Attributes:
        seconds: of each node.
        flow: what needs what, and the tensors between nodes with their bytes.
        weights: for each node the initializers that it and its bodies read: {name: bytes}.
        nodes: the nodes.
        profiles: how each ran.
        input_bytes: of the inputs of the model, by name.
    """

    seconds: tuple[float, ...]
    flow: Flow
    weights: tuple[Mapping[str, int], ...]
    nodes: tuple[ir.Node, ...]
    profiles: tuple[NodeProfile, ...]
    input_bytes: Mapping[str, int]


class _SeenSizes(Sizes):
    """Bytes of values as a run had them; what did not run, as a branch, counts nothing."""

    def __init__(self, profiles: Mapping[str, NodeProfile]) -> None:
        self.missing, self.unknown = {}, {}
        self._profiles = profiles

    def bytes_of(self, value: ir.Value) -> int:
        node = value.producer()
        seen = self._profiles.get(node.name or "") if node is not None else None
        if node is None or seen is None:
            return 0
        made = [output for output in node.outputs if output.name]
        if len(made) != len(seen.output_bytes) or not isinstance(value.type, (ir.TensorType, type(None))):
            return NOT_TO_CUT
        return seen.output_bytes[made.index(value)]


NOT_TO_CUT = 1 << 60
"""Bytes of a value that cannot leave its part: a sequence or an optional."""


def graph_costs(model: ir.Model, how: CostModel, context: PassContext, machine: Machine | None = None) -> GraphCosts:
    """Costs of the nodes of the main graph, from a run on a sample (the first given one, else a made one).

    Values whose types are not known get them.

    Args:
        model: the model.
        how: ``"measured"``: seconds of each node in ONNX Runtime; ``"roofline"``: from its arithmetic and traffic.
        context: samples, device, threads.
        machine: constants of the roofline; None: this machine's.

    Raises:
        ModelError: no sample can be made, or the model does not run.
    """
    given: Mapping[str, Array] | None = next(iter(context.feeds), None)
    feeds = given or make_feeds(model, context.seed, 1)[0]
    found = profile_nodes(model, feeds, threads=context.threads, runs=5 if how == "measured" else 1)
    set_types(model, found)
    roof = machine or (this_machine() if how == "roofline" else None)
    nodes = tuple(model.graph)
    weights = tuple(
        {v.name or "": v.const_value.nbytes for v in reads(node) if v.const_value is not None} for node in nodes
    )
    # ONNX Runtime replaces operators that are functions (CastLike, Mish) by their bodies: they count nothing, uncut.
    profiles = [found.get(node.name or "") or NodeProfile(0.0, (), (), ()) for node in nodes]
    seconds = [seen.seconds for seen in profiles]
    if roof is not None:
        rows = zip(nodes, profiles, weights, strict=True)
        seconds = [roof.seconds(flops(node, seen), traffic(seen, held)) for node, seen, held in rows]
    flow = flow_of(model.graph, _SeenSizes(found))
    sizes = {name: array.nbytes for name, array in feeds.items()}
    return GraphCosts(tuple(seconds), flow, weights, nodes, tuple(profiles), sizes)


def traffic(seen: NodeProfile, weights: Mapping[str, int]) -> float:
    """Bytes read and written, four each element of what is not a weight."""
    return sum(weights.values()) + sum(seen.output_bytes) + 4 * sum(math.prod(shape) for shape in seen.inputs[:1])


def flops(node: ir.Node, seen: NodeProfile) -> float:
    """Floating-point operations of a run of ``node``: products exactly, anything else one an element."""
    inputs, outputs = seen.inputs, seen.outputs
    size = sum(math.prod(shape) for shape in outputs)
    if node.op_type in ("MatMul", "FusedMatMul", "MatMulInteger") and inputs[0]:
        return 2.0 * math.prod(outputs[0]) * inputs[0][-1]
    if node.op_type in ("Gemm", "FusedGemm"):
        inner = inputs[0][0 if "transA" in node.attributes and node.attributes["transA"].as_int() else 1]
        return 2.0 * math.prod(outputs[0]) * inner
    if node.op_type in ("Conv", "FusedConv", "ConvInteger"):
        return 2.0 * math.prod(outputs[0]) * math.prod(inputs[1][1:])
    if node.op_type in ("Attention", "MultiHeadAttention", "GroupQueryAttention"):
        return 4.0 * math.prod(outputs[0]) * _keys(node, inputs)
    return float(size)


def _keys(node: ir.Node, inputs: tuple[Shape, ...]) -> int:
    """Keys that each query meets, past ones included."""
    new = inputs[0][-2]
    past = [shape[2] for shape in inputs[1:] if len(shape) == 4]
    return new + max(past, default=0) if node.op_type == "GroupQueryAttention" else max(new, *past, 1)
