"""The command line, read as a person would, and every bad input of the list: exit code 2, thing and remedy named."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxlathe import cli
from onnxlathe.runtime.artifact import load, save
from rewriting import from_text


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Runs a command in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["onnxlathe", *map(str, args)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    return lambda *args: run(monkeypatch, capsys, *args)


def test_compile_inspect_run_diff_bench(command: object, small_file: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    before = small_file.read_bytes()
    code, text, _ = command("compile", small_file, "-o", out, "--passes", "basic", "--json", report)  # type: ignore[operator]
    assert code == 0 and "1 no-op Identity" in text and "4 -> 3 nodes" in text
    assert small_file.read_bytes() == before
    assert json.loads(report.read_text())["ops_after"] == {"MatMul": 1, "Add": 1, "Relu": 1}

    code, text, _ = command("inspect", out)  # type: ignore[operator]
    assert code == 0 and "[batch,8]" in text and "compiled by onnxlathe" in text and "no-op Identity" in text

    np.savez(tmp_path / "in.npz", x=np.ones((2, 8), np.float32))
    code, text, _ = command("run", out, "--samples", tmp_path / "in.npz", "-o", tmp_path / "y.npz")  # type: ignore[operator]
    assert code == 0 and "[2, 600]" in text
    assert np.load(tmp_path / "y.npz")["y"].shape == (2, 600)

    code, text, _ = command("diff", small_file, out)  # type: ignore[operator]
    assert code == 0 and "output y: largest relative error 0.0e+00" in text and "- Identity -> i" in text

    code, text, _ = command("bench", small_file, out, "--seconds", "0.1")  # type: ignore[operator]
    assert code == 0 and " x" in text and "%" in text


def test_passes_with_options(command: object, small_file: Path, tmp_path: Path) -> None:
    code, _, _ = command(
        "compile", small_file, "-o", tmp_path / "o.onnx", "--passes", "cleanup,fold-constants:growth_limit=0"
    )  # type: ignore[operator]
    assert code == 0
    code, text, _ = command("passes")  # type: ignore[operator]
    assert code == 0 and "fuse-attention" in text and "growth_limit=1024" in text and "cpu-fp32" in text


def test_export_from_a_file(command: object, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "net.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Linear(4, 2), (torch.ones(3, 4),), {'input': {0: 'batch'}}\n"
    )
    code, text, _ = command("export", f"{tmp_path}/net.py:build", "-o", tmp_path / "net.onnx")  # type: ignore[operator]
    assert code == 0 and "checked against PyTorch" in text
    assert str(load(tmp_path / "net.onnx").graph.inputs[0].shape) == "[batch,4]"


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260k as ``export`` leaves it."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("stories") / "stories.onnx"
    done = subprocess.run(
        [sys.executable, "-m", "onnxlathe", "export", "zoo:stories260k", "-o", path], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--prompt" in done.stdout, done.stderr
    return path


def test_run_continues_a_prompt(command: object, stories: Path, tmp_path: Path) -> None:
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ask = ["--prompt", "Once upon a time", "--threads", "1"]
    code, out, err = command("run", stories, *ask, "--max-new-tokens", 40)  # type: ignore[operator]
    assert code == 0 and out.startswith(text) and "5 tokens read" in err and "40 written" in err

    sampled = ["--temperature", "1", "--top-k", "40", "--top-p", "0.9", "--chunk", "2", "--max-new-tokens", "30"]
    first, second, third = (command("run", stories, *ask, *sampled, "--seed", seed)[1] for seed in (3, 3, 4))  # type: ignore[operator]
    assert first == second != third

    (tmp_path / "elsewhere").mkdir()
    compiled = tmp_path / "elsewhere" / "compiled.onnx"
    code, _, _ = command("compile", stories, "-o", compiled, "--passes", "cleanup")  # type: ignore[operator]
    code, out, _ = command("run", compiled, *ask, "--max-new-tokens", 20)  # type: ignore[operator]
    assert code == 0 and text.startswith(out.strip())
    (compiled.parent / "tokenizer.json").unlink()
    code, out, err = command("run", compiled, *ask)  # type: ignore[operator]
    assert code == 2 and not out and "no tokenizer" in err and "--tokenizer" in err
    code, out, _ = command("run", compiled, *ask, "--tokenizer", stories.parent, "--max-new-tokens", 5)  # type: ignore[operator]
    assert code == 0 and text.startswith(out.strip())
    code, _, err = command("run", stories, *ask, "--samples", "x.npz")  # type: ignore[operator]
    assert code == 2 and "neither --samples nor --output" in err


def test_ctrl_c_keeps_the_text(stories: Path) -> None:
    ask = [sys.executable, "-m", "onnxlathe", "run", stories, "--prompt", "Once upon a time", "--threads", "1"]
    process = subprocess.Popen(
        [*ask, "--max-new-tokens", "100000", "--temperature", "3", "--seed", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=default_sigint,
    )
    assert process.stdout is not None
    begun = process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"stopped" in err and b"Traceback" not in err
    assert (begun + rest).startswith(b"Once upon a time") and rest.endswith(b"\n")


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def outside(folder: Path, model: ir.Model) -> Path:
    path = save(model, folder / "outside.onnx", external_data=True)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.bin"
    return write(path, proto.SerializeToString())


def lost(folder: Path, model: ir.Model) -> Path:
    path = save(model, folder / "lost.onnx", external_data=True)
    (folder / "lost.onnx.data").unlink()
    return path


def old(folder: Path) -> Path:
    model = from_text('<ir_version: 3, opset_import: ["" : 9]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
    proto = ir.to_proto(model)
    proto.opset_import[0].version = 3
    return write(folder / "old.onnx", proto.SerializeToString())


def strange(folder: Path) -> Path:
    model = from_text('<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
    proto = ir.to_proto(model)
    proto.graph.node[0].op_type = "Frobnicate"
    return write(folder / "strange.onnx", proto.SerializeToString())


def renamed(folder: Path, model: ir.Model) -> Path:
    other = model.clone()
    other.graph.outputs[0].name = "z"
    return save(other, folder / "renamed.onnx")


def nan(folder: Path) -> Path:
    np.savez(folder / "nan.npz", x=np.full((1, 8), np.nan, np.float32))
    return folder / "nan.npz"


BAD = {
    "no such file": (lambda t, m, f: ["compile", t / "no.onnx"], "no file", "Check the path"),
    "not ONNX": (
        lambda t, m, f: ["compile", write(t / "a.onnx", b"\x89PNG nothing of the kind")],
        "a.onnx is not an ONNX",
        "again",
    ),
    "truncated": (lambda t, m, f: ["compile", write(t / "b.onnx", f.read_bytes()[:5000])], "truncated", "again"),
    "external data missing": (lambda t, m, f: ["compile", lost(t, m)], "lost.onnx.data", "Put it into"),
    "path escapes": (lambda t, m, f: ["compile", outside(t, m)], "outside the model's folder", "beside it"),
    "old opset": (lambda t, m, f: ["compile", old(t)], "opset 3", "version_converter"),
    "unknown operator": (lambda t, m, f: ["compile", strange(t)], "Frobnicate", ""),
    "unknown pass": (
        lambda t, m, f: ["compile", f, "--passes", "fuse-everything"],
        "no pass 'fuse-everything'",
        "Passes: ",
    ),
    "unknown option": (
        lambda t, m, f: ["compile", f, "--passes", "cleanup:hard=1"],
        "no option ['hard']",
        "Its options: none",
    ),
    "option of another type": (
        lambda t, m, f: ["compile", f, "--passes", "upgrade-opset:to=new"],
        "'upgrade-opset' cannot be 'new'",
        "int",
    ),
    "option not among the choices": (
        lambda t, m, f: ["compile", f, "--passes", "fuse-attention:form=best"],
        "cannot be 'best'",
        "'auto'",
    ),
    "unreadable option": (
        lambda t, m, f: ["compile", f, "--passes", "cleanup:hard"],
        "Cannot read the options",
        "name:option=value",
    ),
    "NaN in calibration": (lambda t, m, f: ["compile", f, "--calibration", nan(t)], "NaN", "sample"),
    "unknown target": (lambda t, m, f: ["compile", f, "--target", "tpu"], "'tpu'", "'cpu'"),
    "output is input": (lambda t, m, f: ["compile", f, "-o", f], "is the input itself", "another file"),
    "output folder missing": (lambda t, m, f: ["compile", f, "-o", t / "no" / "x.onnx"], "does not exist", "Create"),
    "run with wrong input": (lambda t, m, f: ["run", f, "--samples", nan(t)], "NaN", ""),
    "run over its input": (lambda t, m, f: ["run", f, "-o", f], "is the input itself", "another file"),
    "report over the input": (lambda t, m, f: ["compile", f, "--json", f], "is the input itself", "another file"),
    "output is a folder": (lambda t, m, f: ["compile", f, "-o", t], "is a folder", "name of a file"),
    "negative threads": (lambda t, m, f: ["compile", f, "--threads", "-1"], "'--threads'", "0"),
    "folder without a model": (lambda t, m, f: ["export", t, "-o", t / "o.onnx"], "no Hugging Face", "config.json"),
    "no such function": (
        lambda t, m, f: ["export", f"{write(t / 'n.py', b'x = 1')}:build", "-o", t / "o.onnx"],
        "no function 'build'",
        "(module, args)",
    ),
    "function of something else": (
        lambda t, m, f: ["export", f"{write(t / 'n.py', b'build = lambda: 3')}:build", "-o", t / "o.onnx"],
        "returned a int",
        "(module, args)",
    ),
    "view without a model": (lambda t, m, f: ["view", t / "no.onnx", "--no-browser"], "no file", "Check the path"),
    "diff of strangers": (lambda t, m, f: ["diff", f, renamed(t, m)], "no output of the same name", "same outputs"),
    "zoo name": (lambda t, m, f: ["export", "zoo:gpt5", "-o", t / "o.onnx"], "no 'gpt5'", "minilm"),
    "export source": (
        lambda t, m, f: ["export", "nothing", "-o", t / "o.onnx"],
        "Cannot export 'nothing'",
        "FILE.py:FUNCTION",
    ),
    "no arguments": (lambda t, m, f: ["compile"], "Missing argument", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(command: object, case: str, small_model: ir.Model, small_file: Path, tmp_path: Path) -> None:
    make, what, remedy = BAD[case]
    content = small_file.read_bytes()
    args = make(tmp_path, small_model, small_file)
    if args[0] == "compile" and "-o" not in args and case != "no arguments":
        args += ["-o", tmp_path / "out.onnx"]
    code, _, err = command(*args)  # type: ignore[operator]
    assert code == 2, err
    assert what in err and remedy in err and "Traceback" not in err
    assert small_file.read_bytes() == content, "the input file is never touched"
    assert not (tmp_path / "out.onnx").exists()


def test_demo_on_the_model_that_ships(command: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the MiniLM package is not installed; without the speed gate, which takes its time."""
    pytest.importorskip("transformers")
    from onnxlathe import demo

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("gt_") else found(name))
    monkeypatch.setattr(demo, "compile", functools.partial(demo.compile, speed_gate=False))
    code, text, _ = command("demo", "--folder", tmp_path / "demo")  # type: ignore[operator]
    assert code == 0 and "RMSNormalization" in text
    error = re.search(r"against PyTorch on new inputs: largest relative error (\S+)", text)
    assert error is not None and float(error[1]) < 1e-4
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"stories260k.onnx", "stories260k-fast.onnx"}
    assert f"onnxlathe view {tmp_path}/demo/stories260k-fast.onnx" in text, "to be copied, so not wrapped"


def default_sigint() -> None:
    """Jobs of a shell script start with SIGINT ignored; a person's terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_view_serves_the_model(small_file: Path) -> None:
    pytest.importorskip("netron")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "onnxlathe", "view", small_file, "--no-browser", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=default_sigint,
    )
    try:
        page = b""
        for _ in range(100):
            time.sleep(0.1)
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/") as answer:
                page = answer.read()
                break
        assert b"Netron" in page
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode in (0, 130)
    finally:
        process.kill()


def test_view_says_that_a_port_is_taken(command: object, small_file: Path) -> None:
    pytest.importorskip("netron")
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = command("view", small_file, "--no-browser", "--port", port)  # type: ignore[operator]
    assert code == 2 and str(port) in err and "--port" in err


def test_view_needs_netron(command: object, small_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "netron", None)
    code, _, err = command("view", small_file)  # type: ignore[operator]
    assert code == 2 and "onnxlathe[view]" in err


def test_an_existing_output_survives_a_failed_compile(command: object, small_file: Path, tmp_path: Path) -> None:
    out = write(tmp_path / "out.onnx", b"precious")
    code, _, _ = command("compile", small_file, "-o", out, "--calibration", nan(tmp_path))  # type: ignore[operator]
    assert code == 2 and out.read_bytes() == b"precious"


def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A real process, interrupted while it measures."""
    body = " ".join(f"v{i + 1} = MatMul(v{i}, w)" for i in range(40))
    rng = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32) / 16
    model = from_text(
        f'<ir_version: 10, opset_import: ["" : 20]> g (float[n, 256] x, float[256, 256] w) => (y) '
        f"{{ v0 = Identity(x) {body} y = Neg(v40) }}",
        w=rng,
    )
    source = save(model, tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    code = "import onnxlathe.cli as cli, onnxlathe.api; print('ready', flush=True); cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "compile", source, "-o", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_sigint,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "nothing was left half-written" in err and "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"in.onnx"}


def test_place_takes_the_constants_of_devices(command: object, small_file: Path, tmp_path: Path) -> None:
    """A device that is so fast, near and roomy that it gets all, and one that is too far away."""
    out = tmp_path / "placed.onnx"
    ask = ["place", small_file, "-o", out, "--cost", "roofline", "--machine"]
    code, text, _ = command(*ask, "cuda=1000,10000,0.001", "--link", 10000, "--latency", 0)  # type: ignore[operator]
    assert code == 0 and "4 nodes on cuda" in text and "x the time of cpu alone" in text
    code, text, _ = command(*ask, "cuda=1000,10000,0.001", "--latency", 1e6)  # type: ignore[operator]
    assert code == 0 and "4 nodes on cpu" in text
    code, _, err = command(*ask, "cuda=1000", "--latency", 0)  # type: ignore[operator]
    assert code == 2 and "Cannot read 'cuda=1000'" in err and "GB/s" in err
    code, _, err = command(*ask, "cuda=1,1,1", "--memory", "cuda=1e-9", "--memory", "cpu=1e-9")  # type: ignore[operator]
    assert code == 2 and "The weights do not fit" in err


def test_help_is_quick_and_has_examples() -> None:
    names = ["export", "compile", "run", "bench", "inspect", "diff", "view", "passes", "demo"]
    seconds: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        text = subprocess.run([sys.executable, "-m", "onnxlathe", "--help"], capture_output=True, text=True).stdout
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
    assert all(name in text for name in names)
    for name in ("compile", "view"):
        text = subprocess.run(
            [sys.executable, "-m", "onnxlathe", name, "--help"], capture_output=True, text=True
        ).stdout
        assert f"Example: onnxlathe {name}" in text
