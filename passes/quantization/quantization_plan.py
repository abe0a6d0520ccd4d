"""What is quantized and how: decided on the graph alone, before any number is known."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.base import Outcome
from ...compiler.graph import constant, is_op, only_consumer, producer, rank, subgraphs
from ...runtime.providers import Device
from ...runtime.quantization import QuantSpec
from ...runtime.quantization_support import predict, product_problem
from .integer_data import data_inputs, integer_ends, keeps_zero

Filter = str | Callable[[ir.Node], bool]
RULE = "float -> int8"
ANCHORS = ("MatMul", "Gemm", "Conv")
# Operators that run on 8-bit data where their neighbours do. Softmax is not among them: 8 bits lose its small values.
_JOINING = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Where")


@dataclasses.dataclass
class QuantPlan:
    """The decision; names are those of values and nodes, so a plan can be applied to any clone of its graph.

    Attributes:
        activations: values that get QuantizeLinear and DequantizeLinear -> how.
        same_as: of these, the ones that share the scale of another (data movement between the two).
        weights: (node, input index) of constants stored as integers -> how.
        replaced: of the activations, those whose float form is not read any more.
        absorbed: Relu and Clip nodes whose bounds become those of the quantized range.
        nodes: the nodes that run on integers.
    """

    activations: dict[str, QuantSpec] = dataclasses.field(default_factory=lambda: dict[str, QuantSpec]())
    same_as: dict[str, str] = dataclasses.field(default_factory=lambda: dict[str, str]())
    weights: dict[tuple[str, int], QuantSpec] = dataclasses.field(
        default_factory=lambda: dict[tuple[str, int], QuantSpec]()
    )
    replaced: set[str] = dataclasses.field(default_factory=lambda: set[str]())
    absorbed: set[str] = dataclasses.field(default_factory=lambda: set[str]())
    nodes: set[str] = dataclasses.field(default_factory=lambda: set[str]())

    def source(self, name: str) -> str:
        """The value whose range decides the scale of ``name``."""
        while name in self.same_as:
            name = self.same_as[name]
        return name


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What a plan follows.

    Attributes:
        activation: form of activations.
        weight: form of weights, without its axis.
        per_channel: one scale per output channel of a weight.
        products: also quantize products of two activations (attention written out).
        include: only nodes that match one of these; empty: all.
        exclude: no node that matches one of these.
        device: execution provider.
    """

    activation: QuantSpec
    weight: QuantSpec
    per_channel: bool = True
    products: bool = False
    include: Sequence[Filter] = ()
    exclude: Sequence[Filter] = ()
    device: Device = "cpu"


def matches(node: ir.Node, filters: Iterable[Filter]) -> bool:
    """Whether an operator type, a glob over the node's name, or a callable among ``filters`` picks ``node``."""
    for item in filters:
        if callable(item):
            if item(node):
                return True
        elif item == node.op_type or fnmatch.fnmatchcase(node.name or "", item):
            return True
    return False


def selected(node: ir.Node, include: Sequence[Filter], exclude: Sequence[Filter]) -> bool:
    """Whether the user's filters let ``node`` be quantized."""
    return (not include or matches(node, include)) and not matches(node, exclude)


def make_plan(model: ir.Model, options: PlanOptions, outcome: Outcome) -> QuantPlan:
    """Decides for the nodes of the main graph; refusals go into ``outcome``.

    1. MatMul, Gemm and Conv with constant weights (and with ``products`` MatMul of two activations) are quantized.
    2. Add, Mul, Concat, pooling, Sigmoid, LeakyRelu and Where join where all their inputs are quantized anyway and
       something quantized reads them; so does Relu or Clip between a quantized node and its QuantizeLinear.
    3. Data movement (Reshape, Transpose, MaxPool ...) between two of them shares one scale.
    4. Everything else stays float: there ONNX Runtime would only add conversions.
    """
    return _Planner(model, options, outcome).plan()


class _Planner:
    def __init__(self, model: ir.Model, options: PlanOptions, outcome: Outcome) -> None:
        self.graph = model.graph
        self.options = options
        self.outcome = outcome
        self.result = QuantPlan()

    def plan(self) -> QuantPlan:
        self._refuse_bodies()
        anchors = {node for node in self.graph if self._is_anchor(node)}
        joined = self._joined(anchors)
        running = anchors | joined
        for node in self.graph:
            if node in running:
                self._add(node)
        for node in running:  # a second look, now that all readers are known
            if self._needs_output(node):
                self._replace_output(node)
        self.result.nodes = {node.name or "" for node in running}
        for node in self.graph:
            self._share_scale(node)
        for node in self.graph:
            self._absorb(node)
        return self.result

    def _refuse_bodies(self) -> None:
        """Says of products in the bodies of If, Loop and Scan, and of recurrent layers, why they stay float."""
        for outer in self.graph:
            if is_op(outer, "LSTM", "GRU", "RNN"):
                dynamic = "quantize-dynamic has one for it" if outer.op_type == "LSTM" else "ONNX Runtime has none"
                self.outcome.refuse(outer, RULE, f"no integer kernel with fixed scales: {dynamic}")
            for body in subgraphs(outer):
                for node in body.all_nodes():
                    if not node.domain and node.op_type in ANCHORS:
                        self.outcome.refuse(node, RULE, f"it lies in a body of {outer.op_type}: not calibrated there")

    def _is_anchor(self, node: ir.Node) -> bool:
        if node.domain or node.op_type not in ANCHORS:
            return False
        if not selected(node, self.options.include, self.options.exclude):
            self.outcome.refuse(node, RULE, "left float by include or exclude")
            return False
        reason = self._problem(node)
        if reason:
            self.outcome.refuse(node, RULE, reason)
        return not reason

    def _problem(self, node: ir.Node) -> str:
        support = predict(node.op_type, node.domain, "uint8", self.options.device)
        if support.execution != "integer":
            return support.reason
        weight = node.inputs[1]
        if any(value is None or value.dtype != ir.DataType.FLOAT for value in node.inputs[:2]):
            return "its operands are not float32"
        if any(producer(value, "DequantizeLinear") for value in node.inputs[:2]):
            return "it is quantized already"
        if any(value is not None and value.graph is not self.graph for value in node.inputs):
            return "an operand belongs to another graph"
        if any(_overridable(value) for value in node.inputs):
            return "an operand is a constant that callers may override"
        problem = product_problem(node)
        computed = weight is not None and (not weight.is_initializer() or weight.is_graph_input())
        if not problem and computed and (node.op_type != "MatMul" or not self.options.products):
            return "a product of two activations: see products=True"
        return problem or self._constant_problem(node)

    def _constant_problem(self, node: ir.Node) -> str:
        """What is wrong with the weight or the bias."""
        for value in node.inputs[1:]:
            array = constant(value)
            if array is not None and not np.isfinite(array).all():
                return f"{value.name if value else ''} holds NaN or infinity"
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and constant(bias) is None:
            return "its bias is computed at run time"
        return ""

    def _joined(self, anchors: set[ir.Node]) -> set[ir.Node]:
        """The largest set of joining nodes that all have quantized inputs and a quantized reader."""
        joined = {
            node
            for node in self.graph
            if not node.domain
            and node.op_type in _JOINING
            and selected(node, self.options.include, self.options.exclude)
            and all(value is None or value.graph is self.graph for value in node.inputs)
            and not any(_overridable(value) for value in node.inputs)
        }
        while True:
            running = anchors | joined
            kept = {node for node in joined if self._inputs_there(node, running) and self._is_read(node, running)}
            if kept == joined:
                return joined
            joined = kept

    def _inputs_there(self, node: ir.Node, running: set[ir.Node]) -> bool:
        data = [value for value in data_inputs(node) if not value.is_initializer()]
        return bool(data) and all(self._is_quantized(value, running) for value in data)

    def _is_quantized(self, value: ir.Value, running: set[ir.Node]) -> bool:
        """Whether ``value`` has an integer form anyway: a kernel makes it, or one reads it."""
        if value.dtype != ir.DataType.FLOAT:
            return False
        maker = value.producer()
        if maker is not None and keeps_zero(maker) and only_consumer(before := data_inputs(maker)[0]) is maker:
            inner = before.producer()
            return inner is not None and inner in running and predict(inner.op_type).needs_output
        if maker is not None and maker in running and predict(maker.op_type).needs_output:
            return True
        if maker is not None and not maker.domain and predict(maker.op_type).execution == "folded":
            source = maker.inputs[0]
            return source is not None and self._is_quantized(source, running)
        return any(use.node in running and use.node.op_type in ANCHORS and use.idx < 2 for use in value.uses())

    def _is_read(self, node: ir.Node, running: set[ir.Node]) -> bool:
        return any(use.node in running for value in integer_ends(node.outputs[0]) for use in value.uses())

    def _needs_output(self, node: ir.Node) -> bool:
        return predict(node.op_type).needs_output

    def _add(self, node: ir.Node) -> None:
        name = node.name or ""
        for index, value in enumerate(node.inputs):
            if value is None or value not in data_inputs(node):
                continue
            if not value.is_initializer():
                self.result.activations.setdefault(value.name or "", self.options.activation)
            elif node.op_type in ANCHORS:
                self.result.weights[name, index] = self._weight_spec(node, index)
            else:
                self.result.weights[name, index] = dataclasses.replace(self.options.activation, symmetric=False)

    def _weight_spec(self, node: ir.Node, index: int) -> QuantSpec:
        spec, value = self.options.weight, node.inputs[index]
        dims = rank(value)
        if not self.options.per_channel or dims is None:
            return spec
        if node.op_type == "Conv":
            return dataclasses.replace(spec, axis=0)
        if node.op_type == "Gemm":
            transposed = "transB" in node.attributes and node.attributes["transB"].as_int()
            return dataclasses.replace(spec, axis=0 if transposed else 1)
        return dataclasses.replace(spec, axis=dims - 1) if dims == 2 else spec

    def _replace_output(self, node: ir.Node) -> None:
        """The value behind ``node`` (behind its Relu or Clip) only exists as integers."""
        value = node.outputs[0]
        after = only_consumer(value)
        if after is not None and after.graph is self.graph and keeps_zero(after):
            value = after.outputs[0]
        self.result.activations.setdefault(value.name or "", self.options.activation)
        self.result.replaced.add(value.name or "")

    def _share_scale(self, node: ir.Node) -> None:
        """Data movement whose input and output both are integers."""
        if node.domain or predict(node.op_type).execution != "folded":
            return
        plan, source = self.result, node.inputs[0]
        if source is None or source.name not in plan.replaced:
            return
        for output in node.outputs:
            if any(value.name in plan.activations for value in integer_ends(output)):
                plan.activations.setdefault(output.name or "", self.options.activation)
                plan.same_as[output.name or ""] = source.name
                plan.replaced.add(output.name or "")

    def _absorb(self, node: ir.Node) -> None:
        """Relu or Clip whose result is only read as integers: QuantizeLinear clips anyway, with zero at the bottom."""
        name = node.outputs[0].name or ""
        spec = self.result.activations.get(name)
        if (
            spec is None
            or not keeps_zero(node)
            or (node.outputs[0].is_graph_output() and name not in self.result.replaced)
        ):
            return
        if name in self.result.replaced or all(self._reads(use.node, use.idx) for use in node.outputs[0].uses()):
            self.result.activations[name] = dataclasses.replace(spec, symmetric=False)
            self.result.absorbed.add(node.name or "")

    def _reads(self, node: ir.Node, index: int) -> bool:
        return (node.name or "") in self.result.nodes and node.inputs[index] in data_inputs(node)


def _overridable(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.is_graph_input()
