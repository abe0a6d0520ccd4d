"""Makes the graph of one rank from a graph and the edits that ``PartitionTensor`` left in its metadata."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..runtime.divided.collectives import ALL_GATHER
from ..runtime.divided.parts import Part
from ..runtime.errors import PlanError
from .graph import MICROSOFT, Array, Names, add_initializer, constant, dims, make_node, opset, require_domain
from .placement import PLACEMENT_KEY, fingerprint
from .save_parts import placement_of, write_parts

Edit = Mapping[str, Any]


def save_ranks(
    model: ir.Model,
    folder: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    ort_config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the ranks that ``PartitionTensor`` planned: ``rank0.onnx``, ... and ``manifest.json``.

    Arguments and errors are those of ``save_stages``; any change of the graph after the pass is an error here.
    """
    placement = placement_of(model, "ranks")
    if placement.nodes != fingerprint(model):
        raise PlanError("The graph was changed after it was divided over ranks.", "Run partition-tensor last.")
    parts: list[Part] = []
    for rank in range(placement.count):
        piece = rank_model(model, placement.edits, rank)
        parts.append(Part(piece, (), tuple(value.name or "" for value in piece.graph.outputs)))
    divided = {name: edit["axis"] for name, edit in placement.edits["values"].items()}
    ends = [value.name or "" for value in (*model.graph.inputs, *model.graph.outputs)]
    gathered = {edit["value"] for edit in placement.edits["collectives"]}
    axes = {name: divided[name] for name in ends if name in divided and name not in gathered}
    return write_parts(model, placement, "rank", parts, Path(folder), metadata or {}, ort_config or {}, axes)


def rank_model(model: ir.Model, edits: Mapping[str, Any], rank: int) -> ir.Model:
    """The graph of ``rank``: weights cut, numbers of heads and target shapes its own, exchanges as nodes."""
    copy = model.clone()
    del copy.metadata_props[PLACEMENT_KEY]
    names = Names(copy)
    nodes = {node.name: node for node in copy.graph}
    _slice_weights(copy, nodes, edits["slices"], names, rank)
    for edit in edits["attributes"]:
        nodes[edit["node"]].attributes[edit["name"]] = ir.AttrInt64(edit["name"], edit["sizes"][rank])
    for edit in edits["shapes"]:
        _set_dim(copy.graph, nodes[edit["node"]], edit, _size(edit["ranges"][rank]), names)
    for edit in edits["splits"]:
        _set_sizes(copy, nodes[edit["node"]], edit["sizes"][rank], names)
    for edit in edits["lookups"]:
        _look_up(copy, nodes[edit["node"]], edit["ranges"][rank][0], names)
    for edit in edits["first_rank"] if rank else ():
        nodes[edit["node"]].replace_input_with(edit["input"], None)
    values = {value.name: value for node in copy.graph for value in node.outputs}
    values.update({value.name: value for value in copy.graph.inputs})
    for name, edit in {**edits["values"], **edits["gathered"]}.items():
        size = _size(edit["ranges"][rank]) if edit["outer"] == 1 else None
        _set_shape(values[name], edit["axis"], size)
    values.update({value.name: value for node in copy.graph for value in node.outputs})  # lookups make others
    for edit in edits["collectives"]:
        _exchange(copy, values[edit["value"]], edit, names)
    for name, value in list(copy.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del copy.graph.initializers[name]
    require_domain(copy, MICROSOFT)
    return copy


def _size(ranges: Sequence[Sequence[int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def _slice_weights(
    model: ir.Model, nodes: Mapping[str | None, ir.Node], edits: Sequence[Edit], names: Names, rank: int
) -> None:
    made: dict[str, ir.Value] = {}
    for edit in edits:
        node = nodes[edit["node"]]
        value = node.inputs[edit["input"]]
        assert value is not None and value.const_value is not None
        key = f"{value.name}|{edit['axis']}|{edit['ranges'][rank]}|{edit.get('rows')}|{edit.get('bits')}"
        if key not in made:
            part = _cut(value.const_value.numpy(), edit, rank)
            made[key] = add_initializer(model.graph, names, f"{value.name}_part", part)
        node.replace_input_with(edit["input"], made[key])


def _cut(array: Array, edit: Edit, rank: int) -> Array:
    """A rank's part of a weight; of packed elements by their bits, of a flat one by its rows."""
    axis, bits = edit["axis"], edit.get("bits")
    if edit.get("rows"):
        return _cut(array.reshape(edit["rows"], -1), {**edit, "rows": None}, rank).reshape(-1)
    if bits is not None:
        array = np.unpackbits(array, axis=axis, bitorder="little")
    pieces = [
        array[(slice(None),) * axis + (slice(a * (bits or 1), b * (bits or 1)),)] for a, b in edit["ranges"][rank]
    ]
    part = np.concatenate(pieces, axis=axis)
    return np.packbits(part, axis=axis, bitorder="little") if bits is not None else part


def _set_dim(graph: ir.Graph, node: ir.Node, edit: Edit, size: int, names: Names) -> None:
    """Puts ``size`` into the target shape of a Reshape or Expand; where the division repeats, scales what is there."""
    target, position = node.inputs[1], edit["position"]
    assert target is not None
    known = constant(target, limit=64)
    repeats = edit["outer"] != 1
    if known is not None:
        changed = known.copy()
        if not repeats:
            changed[position] = size
        elif known[position] > 0:
            changed[position] = known[position] // edit["total"] * size
        node.replace_input_with(1, add_initializer(graph, names, f"{target.name}_part", changed))
        return
    length = target.shape[0] if target.shape is not None else None
    count = length if isinstance(length, int) else len(node.outputs[0].shape or ())
    here: Array = np.arange(count) == position
    base = names.fresh(f"{node.name}/part_shape")

    def add(op: str, inputs: list[ir.Value], suffix: str) -> ir.Value:
        made = make_node(
            op, inputs, name=names.fresh(base + suffix), output=names.fresh(f"{base}{suffix}_out"), like=target
        )
        graph.insert_before(node, made)
        return made.outputs[0]

    if repeats:  # the batch times the heads: no number, unless it is -1
        share = np.where(here, [size], [1]).astype(np.int64)
        whole = np.where(here, [edit["total"]], [1]).astype(np.int64)
        ones = add("Div", [target, add_initializer(graph, names, f"{base}_whole", whole)], "/outer")
        number = add("Mul", [ones, add_initializer(graph, names, f"{base}_share", share)], "/scaled")
        number = add("Where", [_negative(graph, node, target, base, names), target, number], "/kept")
    else:
        number = add_initializer(graph, names, f"{base}_size", np.array([size], np.int64))
    mask = add_initializer(graph, names, f"{base}_here", here)
    node.replace_input_with(1, add("Where", [mask, number, target], ""))


def _negative(graph: ir.Graph, node: ir.Node, target: ir.Value, base: str, names: Names) -> ir.Value:
    zero = add_initializer(graph, names, f"{base}_zero", np.array([0], np.int64))
    name = names.fresh(f"{base}/negative")
    less = make_node("Less", [target, zero], name=name, output=f"{name}_out", like=target, dtype=ir.DataType.BOOL)
    graph.insert_before(node, less)
    return less.outputs[0]


def _look_up(model: ir.Model, node: ir.Node, rows: Sequence[int], names: Names) -> None:
    """Lets a Gather of the rows [start, stop) of a table give zeros for other indices; those are not negative."""
    indices, result = node.inputs[1], node.outputs[0]
    graph = model.graph
    assert indices is not None and indices.dtype is not None and result.dtype is not None
    kind = indices.dtype.numpy()
    start, count, zero = (
        add_initializer(graph, names, f"{node.name}_{name}", np.array(number, kind))
        for name, number in (("start", rows[0]), ("rows", rows[1] - rows[0]), ("zero", 0))
    )
    last = add_initializer(graph, names, f"{node.name}_axis", np.array([-1], np.int64))

    def add(op: str, inputs: list[ir.Value], dtype: ir.DataType, **attributes: Any) -> ir.Value:
        name = names.fresh(f"{node.name}/{op.lower()}")
        made = make_node(op, inputs, name=name, output=f"{name}_out", like=indices, dtype=dtype, attributes=attributes)
        graph.insert_before(node, made)
        return made.outputs[0]

    own = add("Sub", [indices, start], indices.dtype)
    after = add("Less", [own, zero], ir.DataType.BOOL)
    inside = add(
        "And", [add("Not", [after], ir.DataType.BOOL), add("Less", [own, count], ir.DataType.BOOL)], ir.DataType.BOOL
    )
    node.replace_input_with(1, add("Where", [inside, own, zero], indices.dtype))
    factor = add("Cast", [inside], result.dtype, to=int(result.dtype))
    column = add("Unsqueeze", [factor, last], result.dtype)
    column.shape = ir.Shape([*indices.shape, 1]) if indices.shape is not None else None
    name = names.fresh(f"{node.name}/own_rows")
    masked = make_node("Mul", [result, column], name=name, output=f"{name}_out", like=result)
    result.replace_all_uses_with(masked.outputs[0], replace_graph_outputs=True)
    masked.replace_input_with(0, result)
    graph.insert_after(node, masked)
    result.name, masked.outputs[0].name = f"{name}_all", result.name


def _set_sizes(model: ir.Model, node: ir.Node, sizes: Sequence[int], names: Names) -> None:
    if opset(model) < 13:
        node.attributes["split"] = ir.AttrInt64s("split", list(sizes))
        return
    node.attributes.pop("num_outputs", None)
    value = add_initializer(model.graph, names, f"{node.name}_sizes", np.array(sizes, np.int64))
    if len(node.inputs) < 2:
        node.resize_inputs(2)
    node.replace_input_with(1, value)


def _set_shape(value: ir.Value, axis: int, size: int | None) -> None:
    if value.shape is not None:
        sizes: list[Any] = list(value.shape)
        sizes[axis] = size
        value.shape = ir.Shape(sizes)


def _exchange(model: ir.Model, value: ir.Value, edit: Edit, names: Names) -> None:
    """Puts an AllReduce or AllGather behind ``value``; an output of the graph is made by an Identity behind that."""
    graph, maker = model.graph, value.producer()
    assert maker is not None
    gathers = edit["kind"] == ALL_GATHER
    whole = dims(value)
    if gathers and whole is not None:
        whole[edit["axis"]] = edit["total"]
    name = names.fresh(f"{value.name}_{'gathered' if gathers else 'sum'}")
    node = make_node(
        edit["kind"],
        [value],
        name=name,
        output=f"{name}_out",
        dtype=value.dtype,
        shape=whole,
        attributes={"group_size": edit["ranks"], **({"axis": edit["axis"]} if gathers else {})},
        domain=MICROSOFT,
    )
    after = [node]
    result = node.outputs[0]
    if value.is_graph_output():
        own = value.name
        value.name = names.fresh(f"{own}_part")
        copied = make_node("Identity", [result], name=names.fresh(f"{own}_whole"), output=own or "", like=result)
        after.append(copied)
        graph.outputs[list(graph.outputs).index(value)] = copied.outputs[0]
    value.replace_all_uses_with(result, replace_graph_outputs=False)
    node.replace_input_with(0, value)
    graph.insert_after(maker, after)
