"""Versions and machine, as stored in reports and keyed in caches."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path


def environment(threads: int = 0) -> dict[str, str]:
    """What a reader needs to reproduce a figure: versions, CPU, threads, command line."""
    versions = {name: _version(name) for name in ("onnxlathe", "onnx", "onnx-ir", "onnxscript", "numpy", "torch")}
    runtime = _version("onnxruntime-gpu") or _version("onnxruntime")
    return {
        **{name: version for name, version in versions.items() if version},
        "onnxruntime": runtime,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(threads) if threads else "default",
        "command": _command(),
    }


def _command() -> str:
    """The command line, to be pasted into a shell."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":  # python -m package
        start = ["python", "-m", program.parent.name]
    else:
        start = ["python", str(program)] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


def cpu_name() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
