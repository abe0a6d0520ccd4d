"""The edge bundle: it is whole, and tests itself where there is only onnxruntime with numpy, or a browser."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import onnxlathe as lathe
from cached_decoders import grouped, tiny
from onnxlathe import cli
from onnxlathe.compiler.bundle import bundle_folder, save_bundle, session_json
from onnxlathe.compiler.report import Report
from onnxlathe.models import zoo
from onnxlathe.runtime.artifact import load
from onnxlathe.runtime.errors import ModelError
from rewriting import from_text

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PROMPT = [1, 403, 407, 261]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees onnxruntime and numpy and nothing else; nothing is downloaded."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(home, with_pip=False)
    site = next(home.glob("lib/python*/site-packages"))
    for package in ("onnxruntime", "numpy"):
        folder = Path(importlib.util.find_spec(package).origin).parent  # type: ignore[union-attr,arg-type]
        for source in (folder, folder.with_name(f"{package}.libs")):
            if source.exists():
                (site / source.name).symlink_to(source)
    interpreter = home / "bin" / "python"
    seen = "import importlib.util as u; print([n for n in ('onnx', 'onnx_ir', 'onnxlathe', 'torch') if u.find_spec(n)])"
    done = subprocess.run([interpreter, "-c", seen], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "[]", done.stderr
    return interpreter


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, exported_stories: ir.Model) -> Path:
    """An encoder in int8 and in int4 and the stories260k decoder, compiled for the web."""
    folder = tmp_path_factory.mktemp("bundles")
    entry = zoo.build("encoder")
    encoder = lathe.export(entry.module, entry.args, dynamic_shapes=entry.dynamic_shapes, check=False)
    rng = np.random.default_rng(0)
    mask = np.ones((2, 16), np.int64)
    mask[1, 10:] = 0
    zeros = np.zeros_like(mask)
    feeds = [
        {"input_ids": rng.integers(0, 1000, (2, 16)), "attention_mask": mask, "token_type_ids": zeros} for _ in range(3)
    ]
    ids = np.array([PROMPT])
    story = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(4)[None]}
    for value in exported_stories.graph.inputs:
        if (value.name or "").startswith("past"):
            story[value.name or ""] = np.zeros((1, 4, 0, 8), np.float32)
    for name, model, passes, samples in (
        ("int8", encoder, "cpu-int8", feeds),
        ("int4", encoder, "cpu-int4", feeds),
        ("stories", exported_stories, "cpu-fp32", [story]),
    ):
        out = lathe.compile(model, passes, calibration=samples, target="web", speed_gate=False, progress=False)
        assert out.save(folder / f"{name}.onnx", bundle=True) == folder / f"{name}.bundle"
    return folder


def plain_bundle(model: ir.Model, path: Path, **options: Any) -> Path:
    """A bundle without a compile."""
    return save_bundle(model, path, **{"report": Report(), "metadata": {}, "ort_config": {}, **options})


def selftest(python: Path, folder: Path, script: str = "selftest.py", *args: str) -> tuple[int, str]:
    done = subprocess.run([python, folder / script, *args], capture_output=True, text=True, cwd="/")
    return done.returncode, done.stdout + done.stderr


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bundle.json").read_text())


def test_everything_is_there_and_listed(bundles: Path) -> None:
    folder = bundles / "stories.bundle"
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {*sums, "SHA256SUMS"}
    wanted = {
        "stories.onnx",
        "bundle.json",
        "session.json",
        "report.json",
        "report.html",
        "run.py",
        "selftest.py",
        "generate.py",
    }
    assert wanted | {"web.html", "sample/inputs.npz", "sample/expected.npz", "sample/inputs/0.bin"} <= files
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert Report.from_dict(json.loads((folder / "report.json").read_text())).passes
    assert "onnxlathe.report" in load(folder / "stories.onnx").metadata_props
    assert not (bundles / "int8.bundle" / "generate.py").exists()


def test_raw_samples_are_the_arrays(bundles: Path) -> None:
    folder = bundles / "int8.bundle"
    for kind, archive in (("inputs", "inputs.npz"), ("outputs", "expected.npz")):
        arrays = dict(np.load(folder / "sample" / archive))
        assert [info["name"] for info in described(folder)[kind]] == list(arrays)
        for info in described(folder)[kind]:
            raw = np.frombuffer((folder / info["file"]).read_bytes(), info["dtype"]).reshape(info["shape"])
            assert np.array_equal(raw, arrays[info["name"]])


def test_expected_output_is_that_of_plain_onnxruntime(bundles: Path) -> None:
    folder = bundles / "int4.bundle"
    session = ort.InferenceSession(folder / "int4.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, dict(np.load(folder / "sample" / "inputs.npz")))
    for array, name in zip(got, [value.name for value in session.get_outputs()], strict=True):
        assert np.allclose(array, np.load(folder / "sample" / "expected.npz")[name], atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int4", "stories"])
def test_selftest_in_a_clean_environment(python: Path, bundles: Path, name: str) -> None:
    code, said = selftest(python, bundles / f"{name}.bundle")
    assert code == 0, said
    assert said.count("ok  ") == (4 if name == "stories" else 3) and "FAIL" not in said
    code, said = selftest(python, bundles / f"{name}.bundle", "run.py")
    assert code == 0 and ("logits" if name == "stories" else "float32") in said


def test_a_decoder_generates(python: Path, bundles: Path, exported_stories: ir.Model) -> None:
    """The plain loop and ours, of the original graph, agree; other prompts than the sample's run too."""
    folder = bundles / "stories.bundle"
    session = lathe.Session(exported_stories)
    assert described(folder)["decoder"]["prompt"] == PROMPT
    code, said = selftest(python, folder, "generate.py", "24")
    assert code == 0 and [int(word) for word in said.split()] == session.generate(PROMPT, 24).tolist()
    code, said = selftest(python, folder, "generate.py", "5", "1", "300")
    assert code == 0 and [int(word) for word in said.split()] == session.generate([1, 300], 5).tolist()


@pytest.mark.parametrize("rotary", [True, False])
def test_a_decoder_whose_cache_is_one_buffer(python: Path, tmp_path: Path, rotary: bool) -> None:
    """GroupQueryAttention, with the positions inside it or outside."""
    code, said = selftest(python, plain_bundle(grouped(tiny(), rotary=rotary), tmp_path / "m.onnx"))
    assert code == 0 and "ok    tokens" in said, said


def test_damage_is_found(python: Path, bundles: Path, tmp_path: Path) -> None:
    """Each check can fail: files, versions, answers, tokens; and a model that does not even load."""
    folder = tmp_path / "broken"

    def broken(change: Any, name: str = "stories") -> str:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bundles / f"{name}.bundle", folder)
        change()
        code, said = selftest(python, folder)
        assert code == 1, said
        return said

    def edit(change: Any) -> None:
        content = described(folder)
        change(content)
        (folder / "bundle.json").write_text(json.dumps(content))

    def other_expectation() -> None:
        arrays = dict(np.load(folder / "sample" / "expected.npz"))
        np.savez(folder / "sample" / "expected.npz", **{name: 1.01 * array for name, array in arrays.items()})

    said = broken(lambda: (folder / "stories.onnx").write_bytes(b"half a model"))
    assert "FAIL  files  changed or missing: stories.onnx" in said and "FAIL  answers" in said
    assert "missing: run.py" not in said
    said = broken(lambda: edit(lambda content: content["requires"].update(onnxruntime="99.0")))
    assert "at least 99.0 is needed" in said and "missing: bundle.json" in said
    said = broken(other_expectation)
    assert "FAIL  answers  largest relative error" in said and "ok    tokens" in said
    said = broken(lambda: edit(lambda content: content["decoder"]["expected"].append(7)))
    assert "FAIL  tokens" in said and "ok    answers" in said
    said = broken(lambda: (folder / "web.html").unlink())
    assert "changed or missing: web.html" in said and "ok    answers" in said


def test_session_options_travel(python: Path, small_model: ir.Model, tmp_path: Path) -> None:
    config = {
        "graph_optimization_level": "disable",
        "execution_order": "priority",
        "memory_arena": False,
        "memory_reuse": False,
        "config_entries": {"session.intra_op.allow_spinning": "0"},
    }
    folder = plain_bundle(small_model, tmp_path / "m.onnx", ort_config=config)
    assert json.loads((folder / "session.json").read_text()) == session_json(config)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from run import open_session; o = open_session(1)"
    code += ".get_session_options(); print(o.graph_optimization_level, o.execution_order, o.enable_cpu_mem_arena, "
    code += "o.enable_mem_pattern, o.enable_mem_reuse, o.get_session_config_entry('session.intra_op.allow_spinning'))"
    said = subprocess.run([python, "-c", code, folder], capture_output=True, text=True, cwd="/").stdout
    wanted = ["GraphOptimizationLevel.ORT_DISABLE_ALL", "ExecutionOrder.PRIORITY_BASED", "False", "True", "False", "0"]
    assert said.split() == wanted


def test_external_data_and_extra_files(python: Path, small_model: ir.Model, tmp_path: Path) -> None:
    extra = tmp_path / "t.json"
    extra.write_text("{}")
    folder = plain_bundle(small_model, tmp_path / "m.onnx", external_data=True, extra={"tokenizer.json": extra})
    assert described(folder)["external_data"] == ["m.onnx.data"] and (folder / "tokenizer.json").read_text() == "{}"
    assert selftest(python, folder)[0] == 0


def test_an_older_bundle_stays_until_the_new_one_is_whole(
    small_model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plain_bundle(small_model, tmp_path / "m.onnx")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("onnxlathe.compiler.bundle._write_sums", lambda draft: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            plain_bundle(small_model, tmp_path / "m.onnx", metadata={"new": "1"})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.bundle"]
    (folder / "stale").touch()
    plain_bundle(small_model, tmp_path / "m.onnx", metadata={"new": "1"})
    assert not (folder / "stale").exists() and load(folder / "m.onnx").metadata_props["new"] == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["m.bundle"]


def test_where_two_folders_cannot_change_places(
    small_model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxlathe.runtime.files._exchange", lambda first, second: False)
    for number in "12":
        folder = plain_bundle(small_model, tmp_path / "m.onnx", metadata={"number": number})
    assert load(folder / "m.onnx").metadata_props["number"] == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["m.bundle"]


def test_what_is_refused(small_model: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "m.bundle").mkdir()
    (tmp_path / "m.bundle" / "notes").touch()
    with pytest.raises(ModelError, match="is not a bundle"):
        plain_bundle(small_model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"cannot hold a model called n\.onnx\.gz"):
        plain_bundle(small_model, tmp_path / "n.onnx.gz")
    with pytest.raises(ModelError, match="the model takes"):
        plain_bundle(small_model, tmp_path / "n.onnx", sample={"x": np.ones((2, 9), np.float32)})
    with pytest.raises(ModelError, match="does not exist"):
        plain_bundle(small_model, tmp_path / "no" / "n.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.bundle"]


def test_command_line(
    small_file: Path,
    python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "small.onnx.tokenizer.json").write_text("{}")
    arguments = [
        "compile",
        small_file,
        "-o",
        tmp_path / "out.onnx",
        "--passes",
        "basic",
        "--target",
        "mobile",
        "--bundle",
    ]
    monkeypatch.setattr(sys, "argv", ["onnxlathe", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said, folder = capsys.readouterr().out, bundle_folder(tmp_path / "out.onnx")
    assert not stop.value.code and f"wrote {folder}" in said and "NNAPI has kernels for" in said.replace("\n", " ")
    assert (folder / "tokenizer.json").exists() and not (tmp_path / "out.onnx").exists()
    assert selftest(python, folder)[0] == 0


def integer_products() -> ir.Model:
    """Products of the largest codes, which saturate where pairs of them are added in 16 bits."""
    text = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
    g (uint8[4, 64] x, int8[64, 8] w, float[8] s, float one, uint8 zero, float far, int8 z, int8[8, 64, 1, 1] k)
      => (int32[4, 8] a, float[4, 8] b, float[4, 8] c, uint8[4, 8, 1, 1] d)
      <int64[4] image = {4, 64, 1, 1}> {
        a = MatMulInteger(x, w)
        b = com.microsoft.MatMulIntegerToFloat(x, w, one, s)
        f = Cast<to=1>(x)  c = com.microsoft.DynamicQuantizeMatMul(f, w, s)
        i = Reshape(x, image)  d = QLinearConv(i, one, zero, k, one, z, far, zero)
    }"""
    weight = np.tile(np.array([127, 127, 5, -128], np.int8), (64, 2))
    scalars = {"one": np.float32(1), "zero": np.uint8(0), "far": np.float32(64 * 255), "z": np.int8(0)}
    kernel = np.ascontiguousarray(weight.T.reshape(8, 64, 1, 1))
    return from_text(text, w=weight, s=np.ones(8, np.float32), k=kernel, **scalars)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A page of a headless browser that has onnxruntime-web."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from web import browser_page, problem  # type: ignore[import-not-found]

    if reason := problem():
        pytest.skip(reason)
    with browser_page() as opened:
        yield opened


def test_in_the_browser(page: Any, bundles: Path, small_model: ir.Model, python: Path) -> None:
    """onnxruntime-web, wasm: the int8 and the int4 encoder answer within the tolerance, the decoder says the same."""
    from web import served  # type: ignore[import-not-found]

    plain_bundle(
        small_model, bundles / "data.onnx", external_data=True, ort_config={"graph_optimization_level": "basic"}
    )
    plain_bundle(integer_products(), bundles / "integers.onnx", sample={"x": np.full((4, 64), 255, np.uint8)})
    with served(bundles) as address:
        for name in ("int8", "int4", "stories", "data", "integers"):
            page.goto(f"{address}/{name}.bundle/web.html?threads=1")
            page.wait_for_function("window.result")
            result = page.evaluate("window.result")
            assert result["ok"], (name, result)
            assert name in ("data", "integers") or result["error"] > 0, "another machine, and it was really compared"
            if name == "stories":
                assert result["tokens"] == described(bundles / "stories.bundle")["decoder"]["expected"]
        expected = bundles / "data.bundle" / described(bundles / "data.bundle")["outputs"][0]["file"]
        expected.write_bytes(bytes(expected.stat().st_size))
        page.goto(f"{address}/data.bundle/web.html?threads=1")
        page.wait_for_function("window.result")
        assert page.evaluate("window.result.ok") is False and page.title() == "FAIL"
