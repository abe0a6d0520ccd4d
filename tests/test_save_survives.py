"""Saving where things go wrong: killed at a random moment, a full disk, a folder that cannot be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# Saves in every way there is, from a process of its own; what it says of each, and what is left in the folder.
SCRIPT = """
import os, resource, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[3])
from crash_save import _model as model
from onnxlathe.compiler.bundle import save_bundle
from onnxlathe.compiler.report import Report
from onnxlathe.runtime.artifact import save
from onnxlathe.runtime.errors import ModelError
from onnxlathe.runtime.files import write_atomically

folder, trouble = Path(sys.argv[1]), sys.argv[2]
large, plain = model(1), dict(report=Report(), metadata={}, ort_config={}, sample={"x": np.ones((1, 700), np.float32)})
ways = {
    "plain": lambda name: save(large, folder / f"{name}.onnx"),
    "external": lambda name: save(large, folder / f"{name}.onnx", external_data=True),
    "compressed": lambda name: save(large, folder / f"{name}.onnx.gz"),
    "bundle": lambda name: save_bundle(large, folder / f"{name}.onnx", **plain),
    "report": lambda name: write_atomically(folder / f"{name}.json", bytes(np.random.default_rng(0).bytes(2_000_000))),
}
large.graph.initializers["w"].const_value = __import__("onnx_ir").tensor(
    np.random.default_rng(0).standard_normal((700, 700)).astype(np.float32), name="w")
ways["bundle"]("old"), ways["plain"]("old")
if trouble == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
elif trouble == "read-only":
    folder.chmod(0o555)
    if os.getuid() == 0:
        os.setegid(65534), os.seteuid(65534)
for kind, write in ways.items():
    for name in ("new", "old"):
        try:
            write(name)
            print(kind, "was written")
        except ModelError as error:
            print(kind, error)
os.seteuid(os.getuid()), folder.chmod(0o755)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks and kills")
def test_killed_at_any_moment() -> None:
    """The old artifact or the new one, whole. ONNXLATHE_KILLS=50 is the long run."""
    command = [sys.executable, BENCHMARKS / "crash_save.py", "--moments", os.environ.get("ONNXLATHE_KILLS", "8")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["plain", "external", "bundle"]
    assert all(int(line.split(", ")[1].split()[0]) > 1 for line in lines), "no save ever came through"


def survive(folder: Path, trouble: str, *around: str) -> list[str]:
    """Lines that the script says; afterwards the folder holds what it held, whole."""
    command = [*around, sys.executable, "-c", SCRIPT, folder, trouble, BENCHMARKS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10 and not any("was written" in line for line in lines), lines
    return lines


def check_left(folder: Path) -> None:
    """Only the two artifacts from before are there, unhurt."""
    assert sorted(path.name for path in folder.iterdir()) == ["old.bundle", "old.onnx"]
    assert subprocess.run([sys.executable, folder / "old.bundle" / "selftest.py"], capture_output=True).returncode == 0
    assert (folder / "old.onnx").read_bytes() == (folder / "old.bundle" / "old.onnx").read_bytes()


def no_room(line: str, reason: str) -> bool:
    """Whether a line is the error that a full disk is to be; NumPy writes data files and has words of its own."""
    what = "there was no room for all of it" if line.startswith("external") else f"{reason}."
    return f"cannot be written: {what}" in line and line.endswith("Check permissions and free space.")


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    for line in survive(tmp_path, "limit"):
        assert no_room(line, "File too large"), line
    check_left(tmp_path)


def test_a_folder_that_cannot_be_written() -> None:
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: root becomes somebody else, who must get that far
        for line in survive(Path(name), "read-only"):
            assert "cannot be written: Permission denied. Check permissions and free space." in line
        check_left(Path(name))


def test_a_full_disk(tmp_path: Path) -> None:
    """A small tmpfs, in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = ["unshare", "--mount", "--map-root-user"] if os.getuid() else ["unshare", "--mount"]
    size = 2 * 1_960_000 + 900_000  # room for the two artifacts from before, not for one more
    script = (
        f'mount -t tmpfs -o size={size} tmpfs "{disk}" || exit 77; "$@" || exit 1; cp -r "{disk}" "{tmp_path}/left"'
    )
    around = [*inside, "sh", "-c", script, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*around, "true"], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    shutil.rmtree(tmp_path / "left")
    for line in survive(disk, "", *around):
        assert no_room(line, "No space left on device"), line
    check_left(tmp_path / "left")
