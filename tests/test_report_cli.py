"""The report and the viewer from the command line."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from onnxlathe import cli
from onnxlathe.passes.fusion.fuse_gelu import FuseGelu
from onnxlathe.reporting import call_text
from onnxlathe.runtime.artifact import REPORT_KEY, load, save
from onnxlathe.runtime.environment import environment
from rewriting import from_text


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """Runs a command in this process: exit code, stdout, stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["onnxlathe", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_compile_and_inspect_write_the_page(command: object, small_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    out, page, again = tmp_path / "out file.onnx", tmp_path / "report.html", tmp_path / "again.html"
    code, text, _ = command("compile", small_file, "-o", out, "--passes", "basic", "--report", page, "--profile")  # type: ignore[operator]
    assert code == 0 and f"wrote {page}" in text
    content = page.read_text()
    assert f"onnxlathe compile {small_file} -o &#39;{out}&#39; --passes basic" in content, "to be pasted into a shell"
    assert "Where the time goes" in content and "small.onnx" in content
    code, text, _ = command("inspect", out, "--report", again)  # type: ignore[operator]
    assert code == 0 and again.read_text() == content


def test_page_cannot_be_written(command: object, small_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    code, _, err = command("compile", small_file, "-o", out, "--report", tmp_path / "no" / "report.html")  # type: ignore[operator]
    assert code == 2 and "does not exist" in err and not out.exists(), "said before any work"
    code, _, err = command("inspect", small_file, "--report", tmp_path / "report.html")  # type: ignore[operator]
    assert code == 2 and "holds no report" in err
    code, _, err = command("compile", small_file, "-o", out, "--report", small_file)  # type: ignore[operator]
    assert code == 2 and "input itself" in err


def test_a_stored_report_that_cannot_be_read(command: object, small_model: ir.Model, tmp_path: Path) -> None:
    for number, content in enumerate(("{", "[]", '{"passes": [{"nodes": 3}]}', '{"graph": {"a": 1}}')):
        path = save(small_model, tmp_path / f"{number}.onnx", metadata={REPORT_KEY: content})
        code, _, err = command("inspect", path, "--report", tmp_path / "report.html")  # type: ignore[operator]
        assert code == 2 and "cannot be read" in err and "Traceback" not in err


def test_the_call_is_python(small_file: Path) -> None:
    """What the report says was called can be called."""
    call = lathe.compile(small_file, ["cleanup", FuseGelu()], threads=1, progress=False).report.environment["call"]
    assert call == f"lathe.compile({str(small_file)!r}, ['cleanup', FuseGelu()], threads=1, progress=False)"
    report = eval(call, {"lathe": lathe, "FuseGelu": FuseGelu}).report
    assert [record.name for record in report.passes] == ["cleanup", "fuse-gelu"]

    def function(model: object, *, samples: object = None, sizes: object = None) -> None: ...

    arrays = [{"x": np.ones(3)}]
    assert call_text(function, {"model": object(), "samples": arrays, "sizes": (1, 2)}) == (
        "lathe.function(..., samples=..., sizes=[1, 2])"
    )


def test_the_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    for argv, said in (
        (["/usr/bin/onnxlathe", "compile", "a b.onnx"], "onnxlathe compile 'a b.onnx'"),
        (["/x/onnxlathe/__main__.py", "inspect"], "python -m onnxlathe inspect"),
        (["examples/run.py", "$HOME"], "python examples/run.py '$HOME'"),
    ):
        monkeypatch.setattr(sys, "argv", argv)
        assert environment()["command"] == said


def test_diff_compares_by_meaning(command: object, tmp_path: Path) -> None:
    """Nodes with other names are the same; what was replaced is said once for alike places."""
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[2, 3] x) => (y) {{ {} }}'
    long = "a = Neg(x) {p}b = Sigmoid(a) {p}c = Mul(a, {p}b) {p}d = Exp({p}c) "
    long += "{p}e = Sigmoid({p}d) {p}f = Mul({p}d, {p}e) y = Relu({p}f)"
    first = save(from_text(text.format(long.format(p=""))), tmp_path / "first.onnx")
    same = save(from_text(text.format(long.format(p="other_"))), tmp_path / "same.onnx")
    code, out, _ = command("diff", first, same)  # type: ignore[operator]
    assert code == 0 and "7 nodes are the same, 0 went, 0 came" in out and "only in" not in out
    fused = "a = Neg(x) c = HardSwish(a) d = Exp(c) f = HardSwish(d) y = Relu(f)"
    other = save(from_text(text.format(fused)), tmp_path / "other.onnx")
    code, out, _ = command("diff", first, other)  # type: ignore[operator]
    assert code == 0 and "3 nodes are the same, 4 went, 2 came" in out
    assert "2 x  Sigmoid, Mul -> HardSwish" in out


def free_ports() -> int:
    """The first of two ports in a row that nobody uses."""
    for _ in range(50):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("localhost", 0))
            port = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("localhost", port + 1))
                return port
    pytest.skip("no two ports in a row are free")


def get(url: str) -> bytes:
    """What a server answers, once it is up."""
    for _ in range(150):
        with contextlib.suppress(OSError), urllib.request.urlopen(url) as answer:
            return answer.read()
        time.sleep(0.1)
    pytest.fail(f"nobody answers at {url}")


def default_sigint() -> None:
    """Jobs of a shell script start with SIGINT ignored; a person's terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_view_serves_both_models(small_file: Path, tmp_path: Path) -> None:
    """Each page names its own model, and gets that file's content; Ctrl-C ends both servers."""
    pytest.importorskip("netron")
    other = from_text('<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (y) { y = Neg(x) }')
    before = save(other, tmp_path / "before.onnx")
    port = free_ports()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "onnxlathe", "view", small_file, "--before", before),
            "--no-browser",
            "--port",
            str(port),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=default_sigint,
    )
    try:
        for number, path in enumerate((small_file, before)):
            address = f"http://localhost:{port + number}"
            assert f'content="/data/{path.name}"'.encode() in get(f"{address}/")
            assert get(f"{address}/data/{path.name}") == path.read_bytes()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode in (0, 130)
        for number in range(2):
            with socket.socket() as probe:
                assert probe.connect_ex(("localhost", port + number)) != 0, "still served"
    finally:
        process.kill()


def test_view_says_that_the_second_port_is_taken(command: object, small_file: Path) -> None:
    pytest.importorskip("netron")
    port = free_ports()
    with socket.socket() as taken:
        taken.bind(("localhost", port + 1))
        taken.listen()
        code, _, err = command("view", small_file, "--before", small_file, "--no-browser", "--port", port)  # type: ignore[operator]
    assert code == 2 and str(port + 1) in err and "--port" in err


def test_nodes_say_which_pass_made_them_and_from_what(tmp_path: Path) -> None:
    """Down to the nodes of the original, through two passes; as Netron shows it."""
    model = from_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[4, 8] x, float[8, 8] w, float[8] b) => (y) '
        "{ m = MatMul(x, w) a = Add(m, b) y = Relu(a) }",
        w=np.eye(8, dtype=np.float32),
        b=np.ones(8, np.float32),
    )
    for node in model.graph:
        node.name = f"my_{node.op_type}"
    out = lathe.compile(model, ["fuse-linear"], progress=False)
    path = out.save(tmp_path / "out.onnx")
    gemm = next(node for node in load(path).graph if node.op_type == "Gemm")
    assert gemm.metadata_props["onnxlathe.pass"] == "fuse-linear"
    assert {"MatMul:my_MatMul", "Add:my_Add"} <= set(gemm.metadata_props["onnxlathe.from"].split(", "))
    assert json.loads(load(path).metadata_props[REPORT_KEY])["graph"]["replacements"][0]["passes"] == ["fuse-linear"]
