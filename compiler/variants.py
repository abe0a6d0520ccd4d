"""Variants of a quantized graph that show where its error comes from.

Two graphs are compared by the names of their values: a layer's output keeps its name when the layer is quantized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx_ir as ir

from .graph import Names, add_initializer, constant, is_op, make_node, producer, remove_dead

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)
_PAIR = ("QuantizeLinear", "DequantizeLinear")
_INTEGER_OPS = {
    *("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "MatMulNBits", "QGemm", "QAttention", "QLinearMatMul"),
    *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "GatherBlockQuantized", "MatMulBnb4"),
}
_SUFFIXES = ("_quantized", "_quant", "_q")


@dataclasses.dataclass(frozen=True)
class Segment:
    """The part of a quantized graph between values it has in common with the float graph.

    Attributes:
        value: name of the value it makes.
        nodes: its nodes.
        inputs: names of the common values it starts from.
    """

    value: str
    nodes: tuple[ir.Node, ...]
    inputs: tuple[str, ...]

    @property
    def quantized(self) -> bool:
        """Whether anything in it is quantized."""
        return any(is_quantization(node) for node in self.nodes)

    @property
    def only_pairs(self) -> bool:
        """Whether all of its quantization is QuantizeLinear and DequantizeLinear, so that it can be switched off."""
        return all(node.op_type in _PAIR for node in self.nodes if is_quantization(node))


def is_quantization(node: ir.Node) -> bool:
    """Whether ``node`` makes, reads or computes with quantized tensors."""
    return node.op_type in _PAIR or node.op_type in _INTEGER_OPS or node.op_type.startswith("QLinear")


def is_quantized(model: ir.Model) -> bool:
    """Whether any node of ``model`` works with quantized tensors."""
    return any(is_quantization(node) for graph in model.graphs() for node in graph)


def segments(reference: ir.Model, quantized: ir.Model) -> list[Segment]:
    """The segments of ``quantized``, in its order, that end in a float value which ``reference`` makes too."""
    made = {value.name: value for node in reference.graph for value in node.outputs if value.name}
    common = {
        value
        for node in quantized.graph
        for value in node.outputs
        if value.name in made and _dtype(value, made[value.name]) in _FLOATS
    }
    return [_segment(value, common) for node in quantized.graph for value in node.outputs if value in common]


def cut(reference: ir.Model, quantized: ir.Model, parts: Sequence[Segment]) -> ir.Model:
    """``quantized`` with every segment by itself: it reads the float values it starts from as graph inputs.

    The inputs are called as ``cut_input`` says; the outputs are what the segments make. Run on the values of the float
    graph, each output has the error of its own segment and of nothing else.
    """
    made = {value.name: value for node in reference.graph for value in node.outputs}
    copy = quantized.clone()
    graph = copy.graph
    values = {value.name: value for node in graph for value in node.outputs}
    graph.outputs.clear()
    for name in dict.fromkeys(name for part in parts for name in part.inputs if name in values):
        source = ir.Value(
            name=cut_input(name), type=ir.TensorType(_dtype(values[name], made[name])), shape=_shape(made[name])
        )
        graph.inputs.append(source)
        values[name].replace_all_uses_with(source)
    for part in parts:
        output = values[part.value]
        output.type = output.type or ir.TensorType(_dtype(output, made[part.value]))
        graph.outputs.append(output)
    remove_dead(copy)
    return copy


def cut_input(name: str) -> str:
    """The graph input of a cut model that stands for the float value ``name``."""
    return f"{name}@float"


def absorbed(name: str | None, reference: ir.Model, have: Collection[str | None]) -> ir.Node | None:
    """The Relu or Clip of ``reference`` behind the value ``name`` that the quantized graph leaves to saturation.

    Args:
        name: a value that is quantized.
        reference: the float graph.
        have: names of the values of the quantized graph.
    """
    for node in reference.graph:
        bounds = is_op(node, "Relu", "Clip") and node.inputs[0] is not None and node.inputs[0].name == name
        if bounds and node.outputs[0].name not in have:
            return node
    return None


def without_activations(model: ir.Model, reference: ir.Model) -> ir.Model:
    """A copy in which only weights are quantized: Q/DQ pairs around values computed at run time are bypassed.

    Where the saturation of a pair stands for a Relu or Clip of ``reference``, that comes back.
    """
    copy = model.clone()
    have = {value.name for node in copy.graph for value in node.outputs}
    names = Names(copy)
    for node in list(copy.graph):
        quantize = producer(node.inputs[0], "QuantizeLinear") if is_op(node, "DequantizeLinear") else None
        if quantize is None or quantize.inputs[0] is None or quantize.inputs[0].is_initializer():
            continue
        source = quantize.inputs[0]
        limits = absorbed(source.name, reference, have)
        if limits is not None:
            source = _again(limits, source, copy.graph, node, names)
        if node.outputs[0].is_graph_output():
            _as_output(copy, node, source)
        else:
            node.outputs[0].replace_all_uses_with(source)
    remove_dead(copy)
    return copy


def without_weights(model: ir.Model, reference: ir.Model) -> ir.Model:
    """A copy in which only activations are quantized: quantized constants are the float ones of ``reference`` again.

    Constants that ``reference`` does not have in the same shape stay quantized.
    """
    copy = model.clone()
    makers = {node.outputs[0].name: node for node in reference.graph if node.outputs}
    names = Names(copy)
    for node in list(copy.graph):
        stored = node.inputs[0] if is_op(node, "DequantizeLinear") else None
        quantize = producer(stored, "QuantizeLinear")
        stored = quantize.inputs[0] if quantize is not None else stored
        if stored is None or not stored.is_initializer():
            continue
        tensor = float_constant(node, stored, reference, makers)
        if tensor is None:
            continue
        name = names.fresh(f"{stored.name}_float")
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        copy.graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(value)
    remove_dead(copy)
    return copy


def float_constant(
    dequantize: ir.Node, stored: ir.Value, reference: ir.Model, makers: Mapping[str | None, ir.Node]
) -> ir.TensorProtocol | None:
    """The constant of ``reference`` that a DequantizeLinear stands for.

    Found by its name without the suffix of the quantized tensor, or as the same input of the node that makes the same
    value; the shapes must agree.
    """
    candidates = [reference.graph.initializers.get((stored.name or "").removesuffix(suffix)) for suffix in _SUFFIXES]
    for use in dequantize.outputs[0].uses():
        other = makers.get(use.node.outputs[0].name)
        if other is not None and other.op_type == use.node.op_type and use.idx < len(other.inputs):
            candidates.append(other.inputs[use.idx])
    for value in candidates:
        tensor = value.const_value if value is not None else None
        if tensor is None or tensor.dtype not in _FLOATS or stored.shape is None:
            continue
        if list(tensor.shape.numpy()) == list(stored.shape.numpy()):
            return tensor
    return None


def with_injection(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy that adds to each value in ``names`` a graph input of its own, called as ``injected`` says."""
    copy = model.clone()
    fresh = Names(copy)
    values = {value.name: value for node in copy.graph for value in node.outputs}
    for name in names:
        value = values[name]
        node = value.producer()
        if node is None:
            continue
        extra = ir.Value(name=injected(name), type=value.type or ir.TensorType(ir.DataType.FLOAT))
        copy.graph.inputs.append(extra)
        add = make_node("Add", [value, extra], name=fresh.fresh(f"{name}/inject"), output=f"{name}+", like=value)
        users = [(use.node, use.idx) for use in value.uses()]
        copy.graph.insert_after(node, add)
        for user, index in users:
            if user is not add:
                user.replace_input_with(index, add.outputs[0])
        if value.is_graph_output():
            value.name, add.outputs[0].name = fresh.fresh(f"{name}_before"), name
            outputs = copy.graph.outputs
            for index, output in enumerate(list(outputs)):
                if output is value:
                    outputs[index] = add.outputs[0]
    return copy


def injected(name: str) -> str:
    """The graph input whose content is added to the value ``name``."""
    return f"{name}@error"


def _segment(value: ir.Value, common: set[ir.Value]) -> Segment:
    nodes: list[ir.Node] = []
    inputs: dict[str, None] = {}
    first = value.producer()
    todo = [first] if first is not None else []
    seen = set(todo)
    while todo:
        node = todo.pop()
        nodes.append(node)
        for source in node.inputs:
            maker = source.producer() if source is not None else None
            if source is None or maker is None:
                continue
            if source in common:
                inputs[source.name or ""] = None
            elif maker not in seen:
                seen.add(maker)
                todo.append(maker)
    return Segment(value.name or "", tuple(nodes), tuple(inputs))


def _dtype(value: ir.Value, other: ir.Value) -> ir.DataType:
    return value.dtype or other.dtype or ir.DataType.FLOAT


def _shape(value: ir.Value) -> ir.Shape | None:
    return value.shape.copy() if value.shape is not None else None


def _again(limits: ir.Node, source: ir.Value, graph: ir.Graph, before: ir.Node, names: Names) -> ir.Value:
    """A node like ``limits``, which belongs to another graph, over ``source``."""
    bounds: list[ir.Value | None] = []
    for value in limits.inputs[1:]:
        array = constant(value)
        bounds.append(None if array is None else add_initializer(graph, names, f"{limits.name}_bound", array))
    attributes = {key: item.value for key, item in limits.attributes.items()}
    name, output = names.fresh(f"{limits.name}/again"), names.fresh(f"{source.name}_limited")
    node = make_node(limits.op_type, [source, *bounds], name=name, output=output, like=source, attributes=attributes)
    graph.insert_before(before, node)
    return node.outputs[0]


def _as_output(model: ir.Model, dequantize: ir.Node, value: ir.Value) -> None:
    """Makes ``value`` the graph output that ``dequantize`` made, under its name."""
    output = dequantize.outputs[0]
    identity = make_node("Identity", [value], name=f"{dequantize.name}/bypassed", output=f"{output.name}@", like=output)
    ir.convenience.replace_nodes_and_values(
        model.graph, dequantize, [dequantize], [identity], [output], [identity.outputs[0]]
    )
