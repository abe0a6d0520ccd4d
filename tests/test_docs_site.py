"""The documentation site builds without a warning, and every pass has its page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onnxlathe.passes import PASSES

ROOT = Path(__file__).parent.parent


def test_site_builds_and_has_a_page_for_each_pass(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs_gen_files", reason="needs the extra docs")
    quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **quiet}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, kind in PASSES.items():
        page = (tmp_path / "passes" / name / "index.html").read_text()
        assert "<h1 id=" in page and kind.__name__ in page
        assert "Not measured" not in page, f"{name} needs a case, or a place, in benchmarks/passes.py"
    assert "calibration" in (tmp_path / "api" / "index.html").read_text()
