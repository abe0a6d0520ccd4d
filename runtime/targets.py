"""Where a model is to run, and which of its nodes cannot run there: said before shipping, with names.

Targets are ``cpu`` and ``cuda`` (this machine's onnxruntime), ``web`` (onnxruntime-web, wasm) and ``mobile`` (the full
onnxruntime-android and -objc packages). Kernels are data: ``kernels.json``, made by ``benchmarks/target_kernels.py``,
which asked both the CPU wheel and a browser, kernel by kernel. The mobile packages hold all kernels of the CPU provider
of their version (https://onnxruntime.ai/docs/install/#install-on-mobile); the reduced ``onnxruntime-mobile`` ended with
1.18. What accelerators would take is information only, as the CPU provider runs the rest.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import onnxruntime as ort

from .cuda_kernels import has_cuda_kernel
from .errors import ModelError, RuntimeUnavailable
from .inference import open_session, session_options
from .providers import Device, cuda_problem, resolve_device

Target = Literal["cpu", "cuda", "web", "mobile"]
TARGETS: tuple[Target, ...] = ("cpu", "cuda", "web", "mobile")
_SHOWN = 10
_WASM_BYTES = 2**32  # of linear memory, 65536 pages of 64 KiB: all that 32-bit addresses reach
# Element types of tensors in JavaScript (onnxruntime-common, Tensor.DataTypeMap).
_JAVASCRIPT = frozenset({
    "float", "uint8", "int8", "uint16", "int16", "int32", "int64", "string", "bool", "float16", "double", "uint32",
    "uint64", "int4", "uint4",
})  # fmt: skip
_NAMES = {ir.DataType.FLOAT8E4M3FN: "float8e4m3fn", ir.DataType.FLOAT8E4M3FNUZ: "float8e4m3fnuz"}


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """Why a model cannot run on a target.

    Attributes:
        node: name of the node; empty where it is not a node's fault.
        what: the operator with its opset, as ``ai.onnx.Relu 14``; or ``input x``, ``opset``, ``weights``.
        reason: what the target lacks.
    """

    node: str
    what: str
    reason: str


@dataclasses.dataclass(frozen=True)
class _Kernel:
    start: int
    end: int | None
    types: Mapping[str, frozenset[str]]
    missing: Mapping[str, frozenset[str]]

    def fits_version(self, since: int) -> bool:
        """ORT's rule (kernel_registry.cc): a kernel without an end is for the version it starts with only."""
        return since == self.start or (self.end is not None and self.start <= since <= self.end)


@dataclasses.dataclass(frozen=True)
class _Table:
    source: str
    versions: Mapping[str, str]
    newest: Mapping[str, Mapping[str, int]]
    webgpu: frozenset[str]
    kernels: Mapping[tuple[str, str], tuple[_Kernel, ...]]


def read_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        RuntimeUnavailable: there is no such target.
    """
    known: dict[str, Target] = {target: target for target in TARGETS}
    if name not in known:
        raise RuntimeUnavailable(f"Unknown target {name!r}.", f"Targets: {', '.join(TARGETS)}.")
    return known[name]


def device_of(target: str) -> Device:
    """The device that stands for ``target`` here: the CPU for ``web`` and ``mobile``.

    Raises:
        RuntimeUnavailable: CUDA that is not there, or an unknown name.
    """
    return "cpu" if target in ("web", "mobile") else resolve_device(target)


def check_target(model: ir.Model, target: Target) -> None:
    """Refuses a model that cannot run on ``target``.

    Raises:
        ModelError: names up to ten operators, how often each occurs, an example and what is missing.
    """
    found = obstacles(model, target)
    if not found:
        return
    groups: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for item in found:
        groups[item.what, item.reason].append(item.node)
    lines = [
        f"{what}{f' x {len(nodes)}' if nodes[0] else ''}: {reason}{f' (first: {nodes[0]})' if nodes[0] else ''}"
        for (what, reason), nodes in groups.items()
    ]
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    raise ModelError(
        f"The model cannot run on {target} ({describe(target)}): {'; '.join(lines[:_SHOWN])}{more}.",
        "Change the opset with the pass upgrade-opset, leave out the pass that made these nodes (their metadata names "
        "it), or choose another target.",
    )


def obstacles(model: ir.Model, target: Target) -> list[Obstacle]:
    """What keeps ``model`` from running on ``target``; empty: nothing known.

    The model is also opened here. On ``cpu`` and ``cuda`` that has the last word; elsewhere what does not open here,
    for what its attributes ask of a kernel, does not open either.
    """
    found = [*_limits(model, target), *node_obstacles(model, target)]
    if found and target in ("web", "mobile"):
        return found
    try:
        open_session(model, session_options(), "cuda" if target == "cuda" and cuda_problem() is None else "cpu")
    except ModelError as error:
        return found or [Obstacle("", "the model", error.what)]
    return []


def facts(model: ir.Model, target: Target) -> list[str]:
    """What is worth knowing of ``model`` on ``target`` besides: how much of it an accelerator takes, by its lists."""
    nodes = [node for node in _all_nodes(model) if node.op_type != "Constant"]
    if target == "cuda":
        return [_coverage("CUDA", nodes, {_key(node) for node in nodes if has_cuda_kernel(node)}, "copies to the CPU")]
    if target == "web":
        notes = [_coverage("WebGPU", nodes, _table().webgpu, "wasm, with copies between")]
        if "execution_order" in model.metadata_props.get("onnxlathe.ort_config", ""):
            notes.append("JavaScript cannot set the order of execution: the planned memory does not hold there")
        return notes
    if target == "mobile":
        return [_coverage(name, nodes, listed, "the CPU") for name, listed in _mobile_lists().items() if listed]
    return []


def _limits(model: ir.Model, target: Target) -> Iterator[Obstacle]:
    newest = _table().newest["web" if target == "web" else "cpu"]
    opset, version = model.opset_imports.get("", 0), model.ir_version
    if opset > newest["opset"]:
        yield Obstacle("", f"opset {opset}", f"the newest it loads is {newest['opset']}")
    if version > newest["ir_version"]:
        yield Obstacle("", f"IR version {version}", f"the newest it loads is {newest['ir_version']}")
    if target != "web":
        return
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            name = _type_name(value)
            if name is not None and name not in _JAVASCRIPT and not value.is_initializer():
                yield Obstacle("", f"{kind} {value.name}", f"JavaScript has no tensors of {name}")
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if size >= _WASM_BYTES:
        yield Obstacle("", f"{size} bytes of weights", f"wasm has {_WASM_BYTES} bytes of memory in all")


def node_obstacles(model: ir.Model, target: Target) -> Iterator[Obstacle]:
    """The nodes that ``target`` has no kernel for, by the table."""
    own = {identifier[:2] for identifier in model.functions}
    for node in _all_nodes(model):
        if (node.domain, node.op_type) in own or node.op_type == "Constant":  # inlined, or an initializer when loaded
            continue
        opset = model.opset_imports.get(node.domain, model.opset_imports.get("", 1) if node.domain == "" else 1)
        reason = _reason(node, opset, in_browser=target == "web")
        if reason:
            yield Obstacle(node.name or "unnamed", f"{node.domain or 'ai.onnx'}.{node.op_type} {opset}", reason)


def _reason(node: ir.Node, opset: int, *, in_browser: bool) -> str:
    """Why no kernel fits; empty if one does."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    kernels = _table().kernels.get((domain, node.op_type), ())
    if not kernels:
        return "it has no such operator"
    since = _since(domain, node.op_type, opset)
    versions = [k for k in kernels if (k.fits_version(since) if since else k.start <= opset <= (k.end or opset))]
    if not versions:
        spans = sorted({f"{k.start}" if k.end in (k.start, None) else f"{k.start}-{k.end}" for k in kernels})
        return f"no kernel of version {since or opset}, only of {', '.join(spans)}"
    wanted = {key: name for key, value in _arguments(node) if (name := _type_name(value)) is not None}
    if any(_fits(kernel, wanted, in_browser) for kernel in versions):
        return ""
    # Where nothing takes float16, ORT casts to float and back (insert_cast_transformer.cc).
    wider = {key: "float" if name == "float16" else name for key, name in wanted.items()}
    if wider != wanted and any(_fits(kernel, wider, in_browser) for kernel in versions):
        return ""
    asked = {key: name for key, name in wanted.items() if any(key in kernel.types for kernel in versions)}
    return f"no kernel for {', '.join(f'{name} as {_place(key)}' for key, name in asked.items())}"


def _fits(kernel: _Kernel, wanted: Mapping[str, str], in_browser: bool) -> bool:
    """Whether a kernel takes the element types; of sequences and optionals shape inference gives too little to say."""
    for key, allowed in kernel.types.items():
        have = allowed - kernel.missing.get(key, frozenset()) if in_browser else allowed
        known = wanted.get(key)
        if not have or (known is not None and known not in have and not all("(" in name for name in have)):
            return False
    return True


def _arguments(node: ir.Node) -> Iterator[tuple[str, ir.Value]]:
    for index, value in enumerate(node.inputs):
        if value is not None:
            yield str(index), value
    for index, value in enumerate(node.outputs):
        if value.name:
            yield f"o{index}", value


def _type_name(value: ir.Value) -> str | None:
    """``float``: the element type of a tensor, as kernels.json has it; None where nothing is known."""
    kind = value.type
    if not isinstance(kind, ir.TensorType) or kind.dtype == ir.DataType.UNDEFINED:
        return None
    return _element(kind.dtype)


def _element(dtype: ir.DataType) -> str:
    return _NAMES.get(dtype, dtype.name.lower())


@functools.cache
def _since(domain: str, op_type: str, opset: int) -> int | None:
    """The version of the operator that ``opset`` means; None for operators that onnx does not know."""
    if domain == "com.microsoft":
        return 1
    try:
        return onnx.defs.get_schema(op_type, opset, domain).since_version
    except onnx.defs.SchemaError:
        return None


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in [model.graph, *model.functions.values()]:
        yield from ir.traversal.RecursiveGraphIterator(graph)


def _place(key: str) -> str:
    return f"output {key[1:]}" if key.startswith("o") else f"input {key}"


def _key(node: ir.Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _coverage(name: str, nodes: list[ir.Node], listed: frozenset[str] | set[str], rest: str) -> str:
    others = collections.Counter(_key(node) for node in nodes if _key(node) not in listed)
    said = f"{name} has kernels for {len(nodes) - others.total()} of {len(nodes)} nodes"
    if not others:
        return said
    names = ", ".join(f"{op} x {count}" for op, count in others.most_common(_SHOWN))
    return f"{said}; {rest} for the rest: {names}"


def describe(target: Target) -> str:
    versions = _table().versions
    return {
        "cpu": f"onnxruntime {ort.__version__} here",
        "cuda": f"onnxruntime {ort.__version__} here",
        "web": f"onnxruntime-web {versions['web']}",
        "mobile": f"the full mobile packages, as onnxruntime {versions['cpu']}",
    }[target]


@functools.cache
def _mobile_lists() -> dict[str, frozenset[str]]:
    """What NNAPI and CoreML take, from the lists that onnxruntime's own wheel brings; without their footnotes."""
    folder = Path(ort.__file__).parent / "tools" / "mobile_helpers"
    files = {"NNAPI": "nnapi_supported_ops.md", "CoreML": "coreml_supported_mlprogram_ops.md"}
    found: dict[str, frozenset[str]] = {}
    for name, file in files.items():
        text = (folder / file).read_text() if (folder / file).is_file() else ""
        pairs = re.findall(r"^\|(ai\.onnx|com\.microsoft):(\w+)\|", text, re.MULTILINE)
        found[name] = frozenset(op if domain == "ai.onnx" else f"{domain}.{op}" for domain, op in pairs)
    return found


@functools.cache
def _table() -> _Table:
    data: dict[str, Any] = json.loads((Path(__file__).parent / "kernels.json").read_text())
    names: list[str] = data["types"]
    kernels: dict[tuple[str, str], list[_Kernel]] = collections.defaultdict(list)

    def named(types: Mapping[str, list[int]]) -> dict[str, frozenset[str]]:
        return {key: frozenset(names[index] for index in indices) for key, indices in types.items()}

    for domain, op, start, end, types, *missing in data["kernels"]:
        kernels[domain, op].append(_Kernel(start, end, named(types), named(missing[0]) if missing else {}))
    return _Table(
        data["source"],
        data["versions"],
        data["newest"],
        frozenset(data["webgpu"]),
        {key: tuple(rows) for key, rows in kernels.items()},
    )
