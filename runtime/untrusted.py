"""What a model file claims, checked before anything believes it: sizes, paths, names, and what inlining would grow to.

All checks are linear in the size of the file and read no weights of other files.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from .errors import ModelError

_Function = tuple[str, str, str]
_MOST_NODES = 2_000_000
_REMEDY = "The file is damaged or hostile; export or download it again."
_OUTSIDE = re.compile(r"file|path|folder|dir|librar|context|format", re.IGNORECASE)  # in names of session options
_PARTS = {ir.DataType.COMPLEX64: 2, ir.DataType.COMPLEX128: 2}  # numbers stored for one element


def check_proto(proto: onnx.ModelProto, where: str, root: Path | None) -> None:
    """Checks what later steps rely on.

    1. Every tensor's dims are not negative and fit the data that is there.
    2. External data lies in a regular file inside ``root``, links followed, with the bytes it says.
    3. Nothing is made twice in a graph, and names are text (protobuf's are bytes where they are no UTF-8).
    4. Functions do not call themselves, and the model stays below two million nodes with all of them inlined.

    Args:
        proto: the model.
        where: what to call it in messages.
        root: the folder that external data may lie in; None: there must be none.

    Raises:
        ModelError: names the tensor, value or function.
    """
    root = root.resolve() if root is not None else None
    for graph in _graphs(proto.graph):
        _check_names(graph, where)
        for sparse in graph.sparse_initializer:
            _check_tensor(sparse.values, where, root)
            _check_tensor(sparse.indices, where, root)
        for tensor in graph.initializer:
            _check_tensor(tensor, where, root)
        for node in graph.node:
            _check_attributes(node, where, root)
    for function in proto.functions:
        for node in _nodes(function.node):
            _check_attributes(node, where, None)
    _check_functions(proto, where)


def check_config(config: Any) -> dict[str, Any]:
    """The session options that a file asks for, refused where they name files or would not be understood.

    Raises:
        ModelError: names the option.
    """
    entries = config.get("config_entries", {}) if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(entries, dict):
        raise ModelError("The session options stored in the model are no table of names and values.", _REMEDY)
    for key, value in entries.items():
        if not isinstance(value, str):
            raise ModelError(f"The session option {key!r} stored in the model is no text.", _REMEDY)
        if _OUTSIDE.search(key):
            raise ModelError(
                f"The model asks for the session option {key!r}, which reaches for other files.",
                "Refused for safety; give it as ort_config= if you trust it.",
            )
    level = config.get("graph_optimization_level", "all")
    if level not in ("disable", "basic", "extended", "all"):
        raise ModelError(f"The model asks for the graph optimization level {level!r}.", _REMEDY)
    return config


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for body in _bodies(node):
            yield from _graphs(body)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for item in node.attribute:
        if item.HasField("g"):
            yield item.g
        yield from item.graphs


def _nodes(nodes: Any) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for body in _bodies(node):
            yield from _nodes(body.node)


def _check_names(graph: onnx.GraphProto, where: str) -> None:
    named: list[Any] = [*graph.input, *graph.output, *graph.initializer, *graph.node]
    names: list[Any] = [item.name for item in named]
    names += [name for node in graph.node for name in (node.op_type, node.domain, *node.input, *node.output)]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ModelError(f"{where}: the name {wrong[0]!r} is no text.", _REMEDY)
    made = Counter(name for node in graph.node for name in node.output if name)
    made.update({value.name for value in graph.input} | {tensor.name for tensor in graph.initializer})
    twice = [name for name, count in made.items() if count > 1]
    if twice:
        raise ModelError(f"{where}: {twice[0]!r} is made more than once in the graph {graph.name!r}.", _REMEDY)


def _check_attributes(node: onnx.NodeProto, where: str, root: Path | None) -> None:
    for item in node.attribute:
        for tensor in (*([item.t] if item.HasField("t") else []), *item.tensors):
            _check_tensor(tensor, f"{where}: node {node.name or node.op_type!r}", root)


def _check_tensor(tensor: onnx.TensorProto, where: str, root: Path | None) -> None:
    name = f"{where}: the tensor {tensor.name!r}"
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"{name} has the dims {list(tensor.dims)}.", _REMEDY)
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        raise ModelError(f"{name} has the unknown element type {tensor.data_type}.", _REMEDY) from None
    elements = math.prod(tensor.dims)
    if dtype is ir.DataType.UNDEFINED:
        raise ModelError(f"{name} has no element type.", _REMEDY)
    if dtype is ir.DataType.STRING:
        _same(name, "strings", len(tensor.string_data), elements)
        return
    bits = dtype.bitwidth
    needed = -(-elements * bits // 8)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(tensor, name, needed, root)
    elif tensor.HasField("raw_data"):
        _same(name, "bytes", len(tensor.raw_data), needed)
    else:
        stored = max(len(getattr(tensor, f"{kind}_data")) for kind in ("float", "int32", "int64", "double", "uint64"))
        expected = needed if bits < 8 else elements * _PARTS.get(dtype, 1)
        _same(name, "values", stored, expected)


def _same(name: str, what: str, stored: int, needed: int) -> None:
    if stored != needed:
        raise ModelError(f"{name} has {stored} {what}, its dims need {needed}.", _REMEDY)


def _check_external(tensor: onnx.TensorProto, name: str, needed: int, root: Path | None) -> None:
    if root is None:
        raise ModelError(f"{name} lies in another file.", "Only graphs of a plain .onnx file have data beside it.")
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = Path(entries.get("location", ""))
    data = _resolved(root / location, name)
    if location.is_absolute() or not data.is_relative_to(root):
        raise ModelError(
            f"{name} points outside the model's folder ({location}).",
            "Refused for safety; save the model with its data file beside it.",
        )
    if not data.is_file():
        raise ModelError(f"{name} lies in {location}, which is missing.", f"Put it into {root}.")
    offset = _number(entries, "offset", 0, name)
    length = _number(entries, "length", needed, name)
    if length != needed:
        raise ModelError(f"{name} has {length} bytes in {location}, its dims need {needed}.", _REMEDY)
    size = data.stat().st_size
    if size < offset + length:
        raise ModelError(
            f"{data} is truncated: {tensor.name!r} ends at byte {offset + length}, the file has {size}.",
            "Copy or download it again.",
        )


def _resolved(path: Path, name: str) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL, a name too long
        raise ModelError(f"{name}: its data file has no usable name ({error}).", _REMEDY) from error


def _number(entries: Mapping[str, str], key: str, default: int, name: str) -> int:
    text = entries.get(key, "")
    if text and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ModelError(f"{name} has the {key} {text[:40]!r} in its file.", _REMEDY)
    return int(text) if text else default


def _check_functions(proto: onnx.ModelProto, where: str) -> None:
    """Nodes after inlining, function by function, those that are called before those that call."""
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    if not functions:
        return
    sizes: dict[_Function, int] = {}
    open_: list[_Function] = []

    def size(nodes: Any) -> int:
        return sum(1 + sizes.get((node.domain, node.op_type, node.overload), 0) for node in _nodes(nodes))

    def visit(start: _Function) -> None:
        stack: list[tuple[_Function, Iterator[onnx.NodeProto]]] = [(start, _nodes(functions[start].node))]
        open_.append(start)
        while stack:
            key, rest = stack[-1]
            called = next(((n.domain, n.op_type, n.overload) for n in rest if _is_call(n, functions)), None)
            if called is None:
                sizes[key] = size(functions[key].node)
                stack.pop()
                open_.pop()
            elif called in open_:
                raise ModelError(f"{where}: the function {called[1]!r} calls itself.", _REMEDY)
            elif called not in sizes:
                stack.append((called, _nodes(functions[called].node)))
                open_.append(called)

    for key in functions:
        if key not in sizes:
            visit(key)
    total = size(proto.graph.node)
    if total > _MOST_NODES:
        raise ModelError(f"{where}: its functions inlined make {total} nodes.", "Inline and simplify it first.")


def _is_call(node: onnx.NodeProto, functions: Mapping[_Function, Any]) -> bool:
    return (node.domain, node.op_type, node.overload) in functions
