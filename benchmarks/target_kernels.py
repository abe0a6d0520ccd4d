"""Writes ``runtime/kernels.json``: the kernels of ONNX Runtime's CPU provider, and which of them the browser build has.

    python benchmarks/peers.py onnxsim && python benchmarks/target_kernels.py

The kernels are what the CPU wheel registers (``get_all_opkernel_def``, which crashes in the GPU wheel: hence a peer's
environment). For each of them, and for each operator that is a function of others, models of one node are opened both
in that wheel and in onnxruntime-web (wasm, headless Chromium), one for each type it takes: a kernel that is missing
answers "could not find an implementation". Types that only the wheel opens are marked as missing in the browser. The
highest opset and IR version that load are found the same way.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx.helper as oh
from onnx import TensorProto, TypeProto
from peers import python_of
from web import ROOT, VERSION, browser_page, problem, served

TARGET = Path(__file__).parent.parent / "runtime" / "kernels.json"
_OPEN_END = 2**31 - 1
_MISSING = re.compile(r"could not find an implementation|is not a registered function|unsupported", re.IGNORECASE)
_NEWEST = 26
_ELEMENTS = {
    "float": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "string": 8, "bool": 9,
    "float16": 10, "double": 11, "uint32": 12, "uint64": 13, "complex64": 14, "complex128": 15, "bfloat16": 16,
    "float8e4m3fn": 17, "float8e4m3fnuz": 18, "float8e5m2": 19, "float8e5m2fnuz": 20, "uint4": 21, "int4": 22,
    "float4e2m1": 23, "float8e8m0": 24, "uint2": 25, "int2": 26,
}  # fmt: skip
# What a tensor of onnxruntime-web can hold is less than what its kernels can: such values are cast inside the graph.
_NOT_IN_JAVASCRIPT = {name for name in _ELEMENTS if name.startswith(("bfloat16", "float8", "float4", "int2", "uint2"))}

_DUMP = """
import json
from onnxruntime import __version__
from onnxruntime.capi import onnxruntime_pybind11_state as state
kernels = [[k.domain, k.op_name, *k.version_range, k.type_constraints]
           for k in state.get_all_opkernel_def() if k.provider == "CPUExecutionProvider"]
print(json.dumps({"version": __version__, "kernels": kernels}))
"""
_CONTRIB = """
import json
from onnxruntime.capi import onnxruntime_pybind11_state as state
def option(p): return str(p.option).split(".")[-1]
print(json.dumps([[s.domain, s.name, s.since_version,
  [[p.name, p.typeStr, option(p)] for p in s.inputs], [[p.name, p.typeStr, option(p)] for p in s.outputs],
  [[a.name, str(a.type).split(".")[-1]] for a in s.attributes.values() if a.required],
  {c.type_param_str: list(c.allowed_type_strs) for c in s.type_constraints}]
  for s in state.get_all_operator_schema() if s.domain == "com.microsoft"]))
"""
_OPEN = """
import base64, json, sys
import onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 4
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
options.intra_op_num_threads = 1
answers = []
for text in json.load(open(sys.argv[1])):
    try:
        ort.InferenceSession(base64.b64decode(text), options, providers=["CPUExecutionProvider"])
        answers.append("")
    except Exception as error:
        answers.append(str(error) or "error")
json.dump(answers, open(sys.argv[2], "w"))
"""
_OPEN_IN_BROWSER = """async () => {
    const ort = await import('/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs');
    ort.env.wasm.numThreads = 1;
    const texts = await (await fetch('/models.json')).json();
    const answers = [];
    for (const text of texts) {
        const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
        try {
            const session = await ort.InferenceSession.create(
                bytes, {graphOptimizationLevel: 'disabled', logSeverityLevel: 4, executionProviders: ['wasm']});
            await session.release();
            answers.push('');
        } catch (error) { answers.push(String(error.message || error)); }
    }
    return answers;
}"""


@dataclasses.dataclass(frozen=True)
class Argument:
    """A formal parameter: its name, its type or type variable, and whether it is Single, Optional or Variadic."""

    name: str
    type: str
    option: str


@dataclasses.dataclass(frozen=True)
class Operator:
    """What one version of an operator takes; from onnx or, for ``com.microsoft``, from the wheel."""

    domain: str
    name: str
    since: int
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    required: tuple[tuple[str, str], ...]
    types: dict[str, list[str]]
    function: bool = False


@dataclasses.dataclass
class Row:
    """One kernel, or one version of a function: types by position of the argument (``0``, ``1``, ``o0``).

    Attributes:
        missing: the types among them that the browser build has no kernel for.
    """

    domain: str
    op: str
    start: int
    end: int
    types: dict[str, list[str]]
    missing: dict[str, list[str]] = dataclasses.field(default_factory=dict)


def main() -> None:
    """Asks both, writes the table, prints what the browser lacks."""
    if reason := problem():
        sys.exit(f"onnxruntime-web cannot be asked: {reason}")
    python = python_of("onnxsim")
    found = json.loads(subprocess.run([python, "-c", _DUMP], capture_output=True, text=True, check=True).stdout)
    operators = _operators(python)
    rows = [_row(kernel, operators) for kernel in found["kernels"] if kernel[0] != "com.microsoft.nchwc"]
    known = {(row.domain, row.op, row.start) for row in rows}
    rows += [row for op in operators.values() if op.function for row in _function_rows(op, known)]
    questions = [(row, argument, kind, text) for row in rows for argument, kind, text in _questions(row, operators)]
    limits = _limit_models()
    texts = [text for *_, text in questions] + [text for *_, text in limits]
    print(f"{len(rows)} kernels and functions, {len(texts)} models of one node")
    in_wheel, in_browser = _open_in_wheel(python, texts), _open_in_browser(texts)
    for (row, argument, kind, _), ours, theirs in zip(questions, in_wheel, in_browser, strict=False):
        if _MISSING.search(ours):  # a function that nobody can run with this type
            row.types[argument].remove(kind)
        elif theirs and (not ours or _MISSING.search(theirs)):  # both refuse, otherwise: for what the model is, not for
            row.missing.setdefault(argument, []).append(kind)  # want of a kernel
    newest = {
        "cpu": _newest(limits, in_wheel[len(questions) :]),
        "web": _newest(limits, in_browser[len(questions) :]),
    }
    _write(rows, found["version"], newest)


def _operators(python: Path) -> dict[tuple[str, str, int], Operator]:
    operators: dict[tuple[str, str, int], Operator] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain not in ("", "ai.onnx.ml") or schema.deprecated:
            continue
        operators[schema.domain, schema.name, schema.since_version] = Operator(
            schema.domain,
            schema.name,
            schema.since_version,
            tuple(Argument(p.name, p.type_str, p.option.name) for p in schema.inputs),
            tuple(Argument(p.name, p.type_str, p.option.name) for p in schema.outputs),
            tuple((a.name, a.type.name) for a in schema.attributes.values() if a.required),
            {c.type_param_str: list(c.allowed_type_strs) for c in schema.type_constraints},
            schema.has_function or schema.has_context_dependent_function,
        )
    text = subprocess.run([python, "-c", _CONTRIB], capture_output=True, text=True, check=True).stdout
    for domain, name, since, inputs, outputs, required, types in json.loads(text):
        operators[domain, name, since] = Operator(
            domain,
            name,
            since,
            tuple(Argument(*p) for p in inputs),
            tuple(Argument(*p) for p in outputs),
            tuple((a, t) for a, t in required),
            types,
        )
    return operators


def _row(kernel: list[Any], operators: dict[tuple[str, str, int], Operator]) -> Row:
    """The kernel with its constraints by position instead of by the schema's type variables."""
    domain, name, start, end, constraints = kernel
    operator = _operator(operators, domain, name, start)
    types: dict[str, list[str]] = {}
    for variable, allowed in constraints.items():
        if operator is not None:
            for key in _positions(operator, variable):
                types[key] = [_short(kind) for kind in allowed]
    return Row(domain, name, start, end, types)


def _operator(operators: dict[tuple[str, str, int], Operator], domain: str, name: str, start: int) -> Operator | None:
    versions = [op for (d, n, since), op in operators.items() if (d, n) == (domain, name) and since <= start]
    return max(versions, key=lambda op: op.since, default=None)


def _positions(operator: Operator, variable: str) -> list[str]:
    """Where a type variable, or an argument's own name, stands: its first place is enough, as all agree."""
    inputs = [str(i) for i, p in enumerate(operator.inputs) if variable in (p.type, p.name)]
    outputs = [f"o{i}" for i, p in enumerate(operator.outputs) if variable in (p.type, p.name)]
    return (inputs or outputs)[:1]


def _function_rows(operator: Operator, known: set[tuple[str, str, int]]) -> Iterator[Row]:
    if (operator.domain, operator.name, operator.since) in known:
        return
    first = operator.inputs[0].type if operator.inputs else ""
    types = {"0": [_short(kind) for kind in operator.types[first]]} if first in operator.types else {}
    later = [since for (d, n, since) in onnx_versions() if (d, n) == (operator.domain, operator.name)]
    ends = [since - 1 for since in later if since > operator.since]
    yield Row(operator.domain, operator.name, operator.since, min(ends, default=_OPEN_END), types)


def onnx_versions() -> set[tuple[str, str, int]]:
    """Every version of every operator that onnx knows."""
    return {(s.domain, s.name, s.since_version) for s in onnx.defs.get_all_schemas_with_history()}


def _questions(row: Row, operators: dict[tuple[str, str, int], Operator]) -> Iterator[tuple[str, str, str]]:
    operator = _operator(operators, row.domain, row.op, row.start)
    if operator is None or any(kind.startswith("sparse_") for kinds in row.types.values() for kind in kinds):
        return
    for argument, kinds in row.types.items():
        for kind in kinds:
            try:
                model = _one_node(operator, row, argument, kind)
            except (
                KeyError,
                StopIteration,
            ):  # a required attribute that is a tensor or a sparse type: Constant, old ops
                continue
            yield argument, kind, base64.b64encode(model.SerializeToString()).decode()


def _one_node(operator: Operator, row: Row, argument: str, kind: str) -> onnx.ModelProto:
    variables: dict[str, str] = {}
    for place, kinds in row.types.items():
        formal = operator.outputs[int(place[1:])] if place[0] == "o" else operator.inputs[int(place)]
        variables[formal.type] = kind if place == argument else kinds[0]

    def type_of(formal: Argument) -> str:
        if formal.type in variables:
            return variables[formal.type]
        allowed = [_short(kind) for kind in operator.types.get(formal.type, [formal.type])]
        return next(kind for kind in allowed if not kind.startswith("sparse_"))

    inputs = [p for p in operator.inputs if p.option != "Optional"]
    outputs = [p for p in operator.outputs if p.option != "Optional"] or list(operator.outputs[:1])
    values = [(f"i{i}", type_of(p)) for i, p in enumerate(inputs)]
    results = [(f"o{i}", type_of(p)) for i, p in enumerate(outputs)]
    attributes = {name: _attribute(name, shape, type_of(outputs[0])) for name, shape in operator.required}
    node = oh.make_node(row.op, [n for n, _ in values], [n for n, _ in results], domain=row.domain, **attributes)
    if row.op in ("EyeLike", "RandomNormal", "RandomUniform"):
        node.attribute.append(oh.make_attribute("dtype", _ELEMENTS[type_of(outputs[0])]))
    casts_in = [oh.make_node("Cast", [f"{n}_js"], [n], to=_ELEMENTS[t]) for n, t in values if t in _NOT_IN_JAVASCRIPT]
    casts_out = [
        oh.make_node("Cast", [n], [f"{n}_js"], to=TensorProto.FLOAT) for n, t in results if t in _NOT_IN_JAVASCRIPT
    ]
    sides = [[_seen(name, made) for name, made in side] for side in (values, results)]
    graph = oh.make_graph([*casts_in, node, *casts_out], "one", *sides)
    for name, made in results:
        if made in _NOT_IN_JAVASCRIPT:
            graph.value_info.append(oh.make_value_info(name, _type(made)))
    opset = row.start if row.domain == "" else _NEWEST - 3
    imports = [oh.make_opsetid("", max(opset, 7))] + ([oh.make_opsetid(row.domain, row.start)] if row.domain else [])
    return oh.make_model(graph, opset_imports=imports, ir_version=10)


def _seen(name: str, kind: str) -> onnx.ValueInfoProto:
    """A graph input or output; what JavaScript has no tensors of is float outside and cast inside."""
    hidden = kind in _NOT_IN_JAVASCRIPT
    return oh.make_value_info(f"{name}_js" if hidden else name, _type("float" if hidden else kind))


def _attribute(name: str, shape: str, output: str) -> Any:
    if name == "to":
        return _ELEMENTS[output]
    if shape == "GRAPH":
        result = oh.make_tensor_value_info("r", TensorProto.FLOAT, None)
        body = oh.make_node("Constant", [], ["r"], value_float=1.0)
        return oh.make_graph([body], "body", [], [result])
    named = {"num_heads": 2, "kv_num_heads": 2, "K": 64, "N": 64, "bits": 4, "block_size": 32, "q_num_heads": 2}
    plain = {"FLOAT": 1.0, "STRING": "x", "INTS": [1], "FLOATS": [1.0], "STRINGS": ["x"]}
    return named.get(name, 1) if shape == "INT" else plain[shape]


def _type(kind: str) -> TypeProto:
    match = re.fullmatch(r"(seq|optional|map)\((.*)\)", kind)
    if match is None:
        return oh.make_tensor_type_proto(_ELEMENTS[kind], None)
    if match[1] == "seq":
        return oh.make_sequence_type_proto(_type(match[2]))
    if match[1] == "optional":
        return oh.make_optional_type_proto(_type(match[2]))
    key, value = match[2].split(",", 1)
    return oh.make_map_type_proto(_ELEMENTS[key.strip()], _type(value.strip()))


def _short(kind: str) -> str:
    """``float`` for ``tensor(float)``; sequences, optionals and maps keep their wrapping."""
    return re.sub(r"tensor\((\w+)\)", r"\1", kind)


def _limit_models() -> list[tuple[str, int, str]]:
    """A Relu stamped with each opset and each IR version."""
    models: list[tuple[str, int, str]] = []
    for limit, numbers in (("opset", range(7, 31)), ("ir_version", range(3, 17))):
        for number in numbers:
            value, result = (oh.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
            graph = oh.make_graph([oh.make_node("Relu", ["x"], ["y"])], "g", [value], [result])
            opset, version = (number, 10) if limit == "opset" else (17, number)
            model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=version)
            models.append((limit, number, base64.b64encode(model.SerializeToString()).decode()))
    return models


def _newest(limits: list[tuple[str, int, str]], answers: list[str]) -> dict[str, int]:
    """The highest opset and IR version that were opened."""
    opened = [limit[:2] for limit, answer in zip(limits, answers, strict=True) if not answer]
    return {kind: max(number for name, number in opened if name == kind) for kind in ("opset", "ir_version")}


def _open_in_wheel(python: Path, texts: list[str]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.json"
        asked.write_text(json.dumps(texts))
        subprocess.run([python, "-c", _OPEN, asked, answered], check=True)
        return json.loads(answered.read_text())


def _open_in_browser(texts: list[str]) -> list[str]:
    answers: list[str] = []
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as address:
        (Path(folder) / "index.html").write_text("<title>kernels</title>")
        for start in range(0, len(texts), 1000):  # a fresh page each: what a refused session leaves is not given back
            (Path(folder) / "models.json").write_text(json.dumps(texts[start : start + 1000]))
            with browser_page() as page:
                page.goto(f"{address}/index.html")
                page.set_default_timeout(300_000)
                answers += page.evaluate(_OPEN_IN_BROWSER)
            print(f"{len(answers)} of {len(texts)} opened in the browser", flush=True)
    return answers


def _webgpu() -> list[str]:
    """Operators that the package's own document lists for WebGPU; its kernels are not asked."""
    text = (ROOT / "node_modules/onnxruntime-web/docs/webgpu-operators.md").read_text()
    found = re.findall(r"^\| (\w+) \| ([^|]*)\|", text, re.MULTILINE)
    domains = {"ai.onnx": "", "com.microsoft": "com.microsoft."}
    names = {f"{prefix}{op}" for op, where in found for domain, prefix in domains.items() if f"{domain}(" in where}
    return sorted(name for name in names if not name.startswith("Memcpy"))


def _write(rows: list[Row], version: str, newest: dict[str, dict[str, int]]) -> None:
    names = sorted({kind for row in rows for kinds in row.types.values() for kind in kinds})
    index = {name: i for i, name in enumerate(names)}

    def packed(types: dict[str, list[str]]) -> dict[str, list[int]]:
        return {key: sorted(index[kind] for kind in kinds) for key, kinds in types.items() if kinds}

    rows = sorted(rows, key=lambda row: (row.domain, row.op, row.start, row.end))
    lines = [
        json.dumps(
            [row.domain, row.op, row.start, row.end if row.end < _OPEN_END else None, packed(row.types)]
            + ([packed(row.missing)] if row.missing else []),
            separators=(",", ":"),
        )
        for row in rows
    ]
    head = {
        "source": f"benchmarks/target_kernels.py: kernels that onnxruntime {version} registers for its CPU provider; "
        f"last column: types that onnxruntime-web {VERSION} (wasm) does not open",
        "versions": {"cpu": version, "web": VERSION},
        "newest": newest,
        "webgpu": _webgpu(),
        "types": names,
    }
    body = ",\n".join(lines)
    TARGET.write_text(json.dumps(head)[:-1] + ',\n"kernels": [\n' + body + "\n]}\n")
    print(f"wrote {TARGET} ({TARGET.stat().st_size} bytes); newest: {newest}; not in the browser:")
    for row in rows:
        if row.missing:
            print(" ", row.domain or "ai.onnx", row.op, row.start, row.missing)


if __name__ == "__main__":
    main()
