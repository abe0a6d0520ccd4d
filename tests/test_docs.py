"""What the documents show works: the worked example and its tests, README's program, the install line."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from onnxlathe.cli import app

ROOT = Path(__file__).parent.parent


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code blocks of a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def test_worked_example_of_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "worked_example.py"
    file.write_text("\n\n".join(blocks(ROOT / "docs" / "writing-a-pass.md", "python")))
    spec = importlib.util.spec_from_file_location("worked_example", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "worked_example", module)
    spec.loader.exec_module(module)
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 4
    for test in tests:
        test()


@pytest.mark.parametrize("source", ["README.md", "examples/compile_encoder.py"])
def test_examples_run(source: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = ROOT / source
    code = blocks(path, "python")[0] if path.suffix == ".md" else path.read_text()
    small = code.replace("num_hidden_layers=6", "num_hidden_layers=1")
    small = small.replace('"cpu-fp32",', '"cpu-fp32", speed_gate=False,')
    assert small.count("num_hidden_layers=1") == small.count("speed_gate=False") == 1, "quick enough for a test"
    done = subprocess.run([sys.executable, "-c", small], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 Attention" in done.stdout and (tmp_path / "encoder.onnx").exists()


@pytest.mark.parametrize("example", ["custom_pass", "data_parallel", "edge_bundle", "generate_text"])
def test_other_examples_run(example: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, ROOT / "examples" / f"{example}.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_ci_installs_and_tests_by_the_lines_of_the_readme() -> None:
    install, test = (block.strip() for block in blocks(ROOT / "README.md", "bash")[:2])
    script = (ROOT / ".ci" / "run").read_text()
    arguments = re.search(r"pip install (.*?) &&", install)
    assert arguments is not None
    assert f"pip install -q {arguments[1]}\n" in script
    assert test.removeprefix(".venv/bin/") in script


def test_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    commands = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]
    assert len(commands) >= 9
    assert [name for name in commands if f"onnxlathe {name}" not in text] == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/writing-a-pass.md"])
def test_links_and_files_exist(document: str) -> None:
    path = ROOT / document
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"`((?:runtime|compiler|passes|models|onnxlathe|tests)/[\w*]+\.py)`", text):
        if name != "passes/fuse_relu_clip.py":  # the one the reader would write
            assert list(ROOT.glob(name)), name
