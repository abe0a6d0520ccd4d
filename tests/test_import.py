"""Importing is quick and light, and the layers import one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import onnxlathe

ROOT = Path(__file__).parent.parent
# layer -> layers it may import from
ALLOWED = {
    "models": {"models"},
    "runtime": {"runtime"},
    "compiler": {"compiler", "runtime", "models"},
    "passes": {"passes", "compiler", "runtime", "models"},
    "onnxlathe": {"onnxlathe", "passes", "compiler", "runtime", "models"},
}


def test_import_is_quick_and_without_torch() -> None:
    code = "import time; t = time.perf_counter(); import onnxlathe, sys; "
    code += "print(time.perf_counter() - t, 'torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True).stdout.split() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in runs) < 0.5
    assert all(torch == "False" for _, torch in runs)


def test_compiling_needs_no_torch() -> None:
    code = "import onnxlathe as l, sys; l.compile, l.Session, l.passes, l.export; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_python_started_in_the_checkout_finds_the_packages() -> None:
    """There the folder ``onnxlathe`` is found first, and holds the face only."""
    code = "import onnxlathe, onnxlathe.models.zoo; print(onnxlathe.Session, onnxlathe.passes.PASSES)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there() -> None:
    for name in onnxlathe.__all__:
        assert getattr(onnxlathe, name) is not None
    assert set(onnxlathe.__all__) <= set(dir(onnxlathe))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = onnxlathe.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("layer", ALLOWED)
def test_imports_go_one_way(layer: str) -> None:
    files = list((ROOT / layer).rglob("*.py"))
    assert files
    for file in files:
        depth = len(file.relative_to(ROOT / layer).parts)  # of a sub-package 2: two dots are its own layer there
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            parts = (node.module or "").split(".")
            if parts[0] == "onnxlathe":
                assert layer == "onnxlathe", f"{file.name}: use relative imports inside the packages"
                target = parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "onnxlathe"
            elif node.level == depth + 1:
                target = parts[0]
            else:
                continue
            assert target in ALLOWED[layer], f"{file.name} imports {node.module}"
