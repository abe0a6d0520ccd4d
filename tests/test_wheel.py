"""The wheel, in a clean virtual environment: install it, run the console script on a model."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sources, without touching the checkout."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    wanted = ("onnxlathe/", "compiler/", "passes/", "runtime/", "models/", "pyproject", "README", "LICENSE")
    for name in tracked or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]:
        if name.startswith(wanted) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith("dist-info")} == {"onnxlathe"}, "no top-level 'models' or 'runtime'"
    data = "models/data/stories260k/stories260K.bin"
    page = ("compiler/reporting/page.html.j2", "compiler/reporting/page.css")
    for needed in (
        "py.typed",
        *page,
        "compiler/pipeline.py",
        "compiler/training/loop.py",
        "passes/simplify/cleanup.py",
        data,
    ):
        assert f"onnxlathe/{needed}" in names
    assert any("LICENSE" in name for name in names)


def test_runs_in_a_clean_environment(wheel: Path, small_file: Path, tmp_path: Path) -> None:
    """Dependencies come from this environment by a path file, the package from the wheel; nothing is downloaded."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, capture_output=True)
    site = next(home.glob("lib/python*/site-packages"))
    (site / "zz-dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    out = tmp_path / "out.onnx"
    run = [home / "bin" / "onnxlathe", "compile", small_file, "-o", out]
    done = subprocess.run([*run, "--no-speed-gate"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert out.exists() and "no-op Identity" in done.stdout
    command = [python, "-c", "import onnxlathe; print(onnxlathe.__file__)"]
    where = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert str(home) in where.stdout, "the wheel's package, not the checkout's"
