"""Damaged and hostile files: a clear error, in bounded time and memory, and nothing outside the folder is touched."""

from __future__ import annotations

import contextlib
import io
import json
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import onnxlathe as lathe
from onnxlathe.runtime.artifact import CONFIG_KEY, load, save
from onnxlathe.runtime.feeds import load_feeds
from onnxlathe.runtime.generation.causal_lm import EOS_KEY

Edit = Callable[[onnx.ModelProto, Path], None]
FLOAT = TensorProto.FLOAT


def model(*nodes: onnx.NodeProto, weight: np.ndarray | None = None) -> onnx.ModelProto:
    """x [n, 4] -> y; by default y = x w + x."""
    nodes = nodes or (helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Add", ["t", "x"], ["y"]))
    array = np.eye(4, dtype=np.float32) if weight is None else weight
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", FLOAT, ["n", "m"])],
        [onnx.numpy_helper.from_array(array, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def external(**entries: str) -> Edit:
    """Lets w lie in another file."""

    def edit(proto: onnx.ModelProto, folder: Path) -> None:
        (folder / "w.bin").write_bytes(np.eye(4, dtype=np.float32).tobytes())
        _outside(proto.graph.initializer[0], {"location": "w.bin", **entries})

    return edit


def _outside(tensor: onnx.TensorProto, entries: dict[str, str]) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def _symlink(proto: onnx.ModelProto, folder: Path) -> None:
    secret = folder.parent / "secret.bin"
    secret.write_bytes(bytes(64))
    (folder / "link.bin").symlink_to(secret)
    _outside(proto.graph.initializer[0], {"location": "link.bin"})


def _link_loop(proto: onnx.ModelProto, folder: Path) -> None:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    _outside(proto.graph.initializer[0], {"location": "a"})


def _external_attribute(proto: onnx.ModelProto, folder: Path) -> None:
    tensor = helper.make_tensor("value", FLOAT, [4, 4], np.eye(4).ravel())
    tensor.ClearField("float_data")
    _outside(tensor, {"location": "../secret.bin"})
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w2"], value=tensor))


def _external_in_a_body(proto: onnx.ModelProto, folder: Path) -> None:
    tensor = onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "inner")
    _outside(tensor, {"location": "/etc/passwd"})
    out = [helper.make_tensor_value_info("o", FLOAT, None)]
    body = helper.make_graph([helper.make_node("Identity", ["inner"], ["o"])], "b", [], out, [tensor])
    proto.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body))


def _dims(*dims: int) -> Edit:
    def edit(proto: onnx.ModelProto, folder: Path) -> None:
        proto.graph.initializer[0].dims[:] = dims

    return edit


def _made_twice(proto: onnx.ModelProto, folder: Path) -> None:
    proto.graph.node.append(helper.make_node("Relu", ["x"], ["t"]))


def _function(name: str, called: str, times: int) -> onnx.FunctionProto:
    nodes = [helper.make_node(called, ["a" if i == 0 else f"v{i}"], [f"v{i + 1}"], domain="f") for i in range(times)]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    return helper.make_function("f", name, ["a"], [f"v{times}"], nodes, imports)


def _calls_itself(proto: onnx.ModelProto, folder: Path) -> None:
    proto.functions.extend([_function("A", "B", 1), _function("B", "A", 1)])
    proto.opset_import.append(helper.make_opsetid("f", 1))
    proto.graph.node.append(helper.make_node("A", ["x"], ["z"], domain="f"))


def _billion_laughs(proto: onnx.ModelProto, folder: Path) -> None:
    last = _function("F30", "Relu", 2)
    for node in last.node:
        node.domain = ""
    proto.functions.extend([*(_function(f"F{i}", f"F{i + 1}", 2) for i in range(30)), last])
    proto.opset_import.append(helper.make_opsetid("f", 1))
    proto.graph.node.append(helper.make_node("F0", ["x"], ["z"], domain="f"))


def _raw(proto: onnx.ModelProto, folder: Path) -> None:
    proto.graph.initializer[0].raw_data = bytes(60)


def _type(proto: onnx.ModelProto, folder: Path) -> None:
    proto.graph.initializer[0].data_type = 99


LOADING: dict[str, tuple[Edit, str]] = {
    "parent folder": (external(location="../secret.bin"), "outside the model's folder"),
    "absolute path": (external(location="/etc/passwd"), "outside the model's folder"),
    "symbolic link": (_symlink, "outside the model's folder"),
    "links in a loop": (_link_loop, "no usable name|missing"),
    "NUL in the name": (external(location="w\0.bin"), "no usable name"),
    "no location": (external(location=""), "missing"),
    "Constant outside": (_external_attribute, "outside the model's folder"),
    "body outside": (_external_in_a_body, "outside the model's folder"),
    "offset behind the end": (external(offset="4096"), "truncated"),
    "negative offset": (external(offset="-64"), "offset '-64'"),
    "length too short": (external(length="8"), "8 bytes in w.bin"),
    "length that is no number": (external(length="many"), "length 'many'"),
    "data missing": (external(location="other.bin"), "other.bin, which is missing"),
    "negative dims": (_dims(-4, 4), r"dims \[-4, 4\]"),
    "huge dims": (_dims(1 << 40, 1 << 20), "its dims need"),
    "dims that overflow": (_dims(1 << 62, 1 << 62), "its dims need"),
    "raw data too short": (_raw, "has 60 bytes, its dims need 64"),
    "unknown element type": (_type, "element type 99"),
    "a value made twice": (_made_twice, "'t' is made more than once"),
    "functions in a circle": (_calls_itself, "calls itself"),
    "functions that double": (_billion_laughs, "inlined make"),
}


def written(edit: Edit, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    proto = model()
    edit(proto, folder)
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("name", LOADING)
def test_refused_when_loaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ``load``, by ``Session`` before ORT opens it, and by ``compile`` of the file and of the message."""
    edit, words = LOADING[name]
    path = written(edit, tmp_path / "folder")
    proto = onnx.load(path, load_external_data=False)
    monkeypatch.chdir(path.parent)
    start = time.monotonic()
    sources: list[Callable[[], object]] = [
        lambda: load(path),
        lambda: lathe.Session(path),
        lambda: lathe.compile(path, progress=False),
        lambda: lathe.compile(proto, progress=False),
    ]
    for run in sources:
        with pytest.raises(lathe.ModelError, match=words):
            run()
    assert time.monotonic() - start < 60  # a walk of what is there, whatever it claims to be


def _cycle(proto: onnx.ModelProto, folder: Path) -> None:
    proto.graph.node[0].input[0] = "y"


def _missing_input(proto: onnx.ModelProto, folder: Path) -> None:
    proto.graph.node[0].input[0] = "nobody"


def _huge_input(proto: onnx.ModelProto, folder: Path) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1 << 40


def _huge_value(proto: onnx.ModelProto, folder: Path) -> None:
    shape = onnx.numpy_helper.from_array(np.array([1 << 20, 1 << 20], np.int64), "shape")
    proto.graph.initializer.append(shape)
    proto.graph.node.append(helper.make_node("ConstantOfShape", ["shape"], ["big"]))
    proto.graph.node.append(helper.make_node("ReduceSum", ["big"], ["y2"]))
    proto.graph.output.append(helper.make_tensor_value_info("y2", FLOAT, [1, 1]))


def _unknown_operator(proto: onnx.ModelProto, folder: Path) -> None:
    proto.graph.node[0].op_type = "Mystery"


COMPILING: dict[str, tuple[Edit, str]] = {
    "cycle": (_cycle, "not valid ONNX"),
    "an operand that nobody makes": (_missing_input, "nobody"),
    "a huge input": (_huge_input, "more than"),
    "a huge value": (_huge_value, "'big'"),
    "an unknown operator": (_unknown_operator, "Mystery"),
}


@pytest.mark.parametrize("name", COMPILING)
def test_refused_when_compiled(name: str, tmp_path: Path) -> None:
    edit, words = COMPILING[name]
    path = written(edit, tmp_path / "folder")
    with pytest.raises(lathe.ModelError, match=words):
        lathe.compile(path, "cpu-fp32", progress=False)


METADATA = {
    "no JSON": (CONFIG_KEY, "{", "no JSON"),
    "a list": (CONFIG_KEY, "[1]", "no table"),
    "a level there is not": (CONFIG_KEY, '{"graph_optimization_level": "best"}', "'best'"),
    "a number": (CONFIG_KEY, '{"config_entries": {"a.b": 1}}', "'a.b'"),
    "a file to write": (
        CONFIG_KEY,
        json.dumps({"config_entries": {"session.collect_node_memory_stats_to_file": "/tmp/stolen"}}),
        "reaches for other files",
    ),
    "another folder": (
        CONFIG_KEY,
        json.dumps({"config_entries": {"session.model_external_initializers_file_folder_path": "/etc"}}),
        "reaches for other files",
    ),
}


@pytest.mark.parametrize("name", METADATA)
def test_session_options_of_a_file_are_checked(name: str, tmp_path: Path) -> None:
    key, value, words = METADATA[name]
    path = save(ir.from_proto(model()), tmp_path / "m.onnx", metadata={key: value})
    with pytest.raises(lathe.ModelError, match=words):
        lathe.Session(path)


def test_metadata_that_only_generation_reads(tmp_path: Path) -> None:
    path = save(ir.from_proto(model()), tmp_path / "m.onnx", metadata={EOS_KEY: "{]"})
    assert lathe.Session(path).run({"x": np.ones((1, 4), np.float32)})["y"].tolist() == [[2.0] * 4]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    content = model().SerializeToString().replace(b"\x0a\x01t", b"\x0a\x01\xff").replace(b"\x12\x01t", b"\x12\x01\xff")
    assert b"\xff" in content
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    for open_ in (load, lathe.Session):
        with pytest.raises(lathe.ModelError, match=r"the name b'\\xff' is no text"):
            open_(path)


def test_deeply_nested_bodies(tmp_path: Path) -> None:
    """Far deeper than protobuf reads: refused, not a crash of the stack."""
    out = [helper.make_tensor_value_info("o", FLOAT, None)]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["o"])], "b", [], out).SerializeToString()
    for _ in range(200):
        attribute = b"\x0a\x01g" + _field(6, graph) + b"\xa0\x01\x05"
        graph = _field(1, _field(4, b"If") + _field(5, attribute))
    path = tmp_path / "m.onnx"
    path.write_bytes(_field(7, graph))
    with pytest.raises(lathe.ModelError, match="not an ONNX model"):
        load(path)


def _field(number: int, content: bytes) -> bytes:
    size, length = len(content), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def _npz(folder: Path, content: bytes, size: int | None = None) -> Path:
    path = folder / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        for _ in range(size or 1):
            file.write(content)
    return path


def _header(shape: str, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [_header("(1099511627776, 1024)"), _header("(-1,)"), _header("'''"), _header("()", "|O"), b"\x93NUMPY\x09"],
)
def test_damaged_samples(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(lathe.ModelError, match="cannot be read"):
        load_feeds(_npz(tmp_path, content))


def test_a_sample_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxlathe.runtime.feeds._LARGEST_SAMPLE", 1 << 20)
    path = _npz(tmp_path, bytes(1 << 16), 64)
    assert path.stat().st_size < 20_000
    with pytest.raises(lathe.ModelError, match="unpacks to 4194304 bytes"):
        load_feeds(path)


def test_a_compressed_model_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxlathe.runtime.artifact._LARGEST_PROTO", 100)
    path = save(ir.from_proto(model()), tmp_path / "m.onnx.gz")
    with pytest.raises(lathe.ModelError, match="more than 2 GB"):
        load(path)


def test_damaged_samples_bit_by_bit(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.arange(64, dtype=np.float32))
    whole, rng = buffer.getvalue(), random.Random(0)
    path = tmp_path / "x.npz"
    for _ in range(200):
        content = bytearray(whole)
        content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with contextlib.suppress(lathe.ModelError):
            load_feeds(path)


@pytest.mark.parametrize("arguments", [["inspect"], ["compile", "-o", "out.onnx"], ["run"]])
def test_the_command_line_says_it_in_a_paragraph(arguments: list[str], tmp_path: Path) -> None:
    path = written(external(location="../secret.bin"), tmp_path / "folder")
    command = [sys.executable, "-m", "onnxlathe", arguments[0], str(path), *arguments[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "outside the model's folder" in done.stderr and "Traceback" not in done.stderr
    assert {item.name for item in tmp_path.iterdir()} == {"folder"}


_FLIP = """
import random, sys
import numpy as np
import onnxlathe as lathe
whole = open(sys.argv[1], "rb").read()
path, log = sys.argv[2], open(sys.argv[3], "w")
feeds = {"x": np.ones((2, 4), np.float32)}
for seed in range(int(sys.argv[4]), int(sys.argv[5])):
    rng, content = random.Random(seed), bytearray(whole)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    open(path, "wb").write(content[: rng.randrange(len(content))] if seed % 10 == 9 else content)
    print(seed, end=" ", file=log, flush=True)
    try:
        out = lathe.compile(path, "cpu-fp32", speed_gate=False, progress=False) if seed % 3 == 0 else None
        session = lathe.Session(path, threads=1)
        session.run(feeds)
        result = "ran"
    except lathe.LatheError as error:
        result = type(error).__name__
    print(result, file=log, flush=True)
"""


@pytest.mark.parametrize("start", [0])
def test_300_files_with_flipped_bits(start: int, tmp_path: Path) -> None:
    """Each either loads and runs or gives a LatheError; the process that does it ends by itself."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "w"], ["n"], axis=-1),
        helper.make_node("Gemm", ["n", "v"], ["g"], transB=1),
        helper.make_node("Reshape", ["g", "s"], ["r"]),
        helper.make_node("Concat", ["r", "x"], ["y"], axis=1),
    ]
    proto = model(*nodes, weight=np.ones(4, np.float32))
    rng = np.random.default_rng(0)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal((4, 4)).astype(np.float32), "v"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 4]), "s"))
    whole, log = tmp_path / "whole.onnx", tmp_path / "log"
    whole.write_bytes(proto.SerializeToString())
    command = [sys.executable, "-c", _FLIP, str(whole), str(tmp_path / "m.onnx"), str(log), str(start), "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = log.read_text().splitlines()
    assert done.returncode == 0, f"seed {lines[-1]}: {done.returncode} {done.stderr[-2000:]}"
    results = [line.split()[1] for line in lines]
    assert len(results) == 300 and results.count("ran") > 30 and results.count("ModelError") > 30
