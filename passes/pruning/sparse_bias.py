"""Biases that take in what zeros do to a layer's mean output."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...compiler.graph import Array, Names, add_initializer, attribute, constant, is_op, make_node, replace
from ..linear_layers import LinearLayer, bias_of
from .sparse_layers import Prunable


def give_bias(weight: Prunable, names: Names, *, add: bool, by: str) -> bool:
    """Sees to it that the layer of ``weight`` has a bias of its own, ``weight.bias``, with the content it has now.

    A Gemm or Conv without one gets zeros; a MatMul only if ``add``, as an Add behind it. Weights of several layers, and
    those whose bias is no constant with one number per output, get none.

    Returns:
        Whether an initializer was made.
    """
    layer = weight.layers[0]
    node, graph = layer.node, layer.node.graph
    if (
        weight.bias is not None
        or len(weight.layers) > 1
        or not isinstance(graph, ir.Graph)
        or weight.value.dtype is None
    ):
        return False
    if is_op(node, "Gemm") and (attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0):
        return False
    outputs = weight.shape[layer.out_axis]
    found = bias_of(layer)
    if found is None:
        if is_op(node, "MatMul") and not add:
            return False
        zeros = np.zeros(outputs, weight.value.dtype.numpy())
        weight.bias = add_initializer(graph, names, f"{node.name}_bias", zeros)
        if is_op(node, "MatMul"):
            _add_behind(weight, weight.bias, names, by)
        else:
            node.resize_inputs(3)
            node.replace_input_with(2, weight.bias)
        return True
    reader, index = found
    value = reader.inputs[index]
    array = constant(value)
    if value is None or array is None or array.shape != (outputs,):
        return False
    if len(value.uses()) == 1 and value.graph is graph and not value.is_graph_output():
        weight.bias = value
        return False
    weight.bias = add_initializer(graph, names, f"{node.name}_bias", array)
    reader.replace_input_with(index, weight.bias)
    return True


def shifted(bias: ir.Value, shift: Array) -> ir.TensorProtocol:
    """The tensor of ``bias + shift``."""
    array = constant(bias)
    if array is None:
        raise ValueError(f"{bias.name} has no data")
    return ir.Tensor((array + shift).astype(array.dtype), name=bias.name)


def _add_behind(weight: Prunable, bias: ir.Value, names: Names, by: str) -> None:
    """Writes MatMul + Add in place of the MatMul."""
    node = weight.layers[0].node
    result, name = node.outputs[0], node.name or "MatMul"
    middle = names.fresh(f"{result.name}_product")
    product = make_node("MatMul", node.inputs, name=names.fresh(f"{name}/product"), output=middle, like=result)
    output = names.fresh(f"{result.name}_biased")  # a draft: `replace` gives it the old value's name
    add = make_node("Add", [product.outputs[0], bias], name=names.fresh(f"{name}/bias"), output=output, like=result)
    replace(node, [product, add], by=by)
    weight.layers = [LinearLayer(product)]
