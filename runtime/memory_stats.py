"""What memory ONNX Runtime really needs for a run, and in which order it ran: measured in a process of its own.

    python -m onnxlathe.runtime.memory_stats model.onnx feeds.npz '{"...ort_config..."}'

The C library is told to return every freed block at once, the arena is off, and the kernel's own high-water mark of
resident memory (``VmHWM``) is reset before a run: its growth is what the run needed, kernels' scratch memory included.
(``session.collect_node_memory_stats_to_file`` gives sizes by node, but neither an order nor a peak.)
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from .errors import ModelError, RuntimeUnavailable

Array = np.ndarray[Any, Any]
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_RUNS = 3


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """What a run needed.

    Attributes:
        peak: bytes at the fullest moment above what the session holds between runs; weights do not count.
        order: names of the nodes as they ran, after ONNX Runtime's own fusions.
        held: bytes that a session keeps after a few runs with its arena as ``ort_config`` has it (by default on: it
            grows by doubling, and keeps what it has).
    """

    peak: int
    order: tuple[str, ...]
    held: int


def measure_memory(model: ir.Model, feeds: Mapping[str, Array], ort_config: Mapping[str, Any]) -> MemoryUse:
    """Runs ``model`` in a fresh process with ``ort_config`` and one thread, and returns what the run needed.

    Raises:
        RuntimeUnavailable: not on Linux, where the kernel can be asked.
        ModelError: the model does not run.
    """
    if not can_measure():
        raise RuntimeUnavailable("Memory can only be measured on Linux.", "Plan there, or without measuring.")
    from .artifact import save

    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder) / "model.onnx")
        np.savez(Path(folder) / "feeds.npz", allow_pickle=False, **feeds)
        command = [sys.executable, "-m", "onnxlathe.runtime.memory_stats", path, Path(folder) / "feeds.npz"]
        done = subprocess.run([*command, json.dumps(ort_config)], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise ModelError(f"The model does not run: {lines[-1] if lines else done.returncode}", "Check the samples.")
    result = json.loads(done.stdout.splitlines()[-1])
    return MemoryUse(result["peak"], tuple(result["order"]), result["held"])


def can_measure() -> bool:
    """Whether this system can say how much memory a run needed."""
    return sys.platform == "linux" and Path("/proc/self/clear_refs").exists()


def _resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeUnavailable(f"The kernel does not say {field}.", "Plan without measuring.")


def main() -> None:
    """Measures one model and prints JSON."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 32768)
    libc.mallopt(_TRIM_THRESHOLD, 0)
    path, feeds_path, config = sys.argv[1:]
    from .inference import open_session, session_options

    with np.load(feeds_path, allow_pickle=False) as archive:
        feeds = {name: archive[name] for name in archive.files}
    options = session_options(threads=1, ort_config=json.loads(config))
    arena, options.enable_cpu_mem_arena = options.enable_cpu_mem_arena, False
    session = open_session(path, options)
    for _ in range(_RUNS):  # the first runs trace and allocate what stays
        session.run(None, feeds)
    needed: list[int] = []
    for _ in range(_RUNS):
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        session.run(None, feeds)
        needed.append(_resident("VmHWM") - before)
    options.enable_cpu_mem_arena = arena
    session = open_session(path, options)
    before = _resident("VmRSS")
    for _ in range(_RUNS):
        session.run(None, feeds)
    held = _resident("VmRSS") - before
    print(json.dumps({"peak": min(needed), "held": held, "order": _executed(path, feeds, json.loads(config))}))


def _executed(path: str, feeds: Mapping[str, Array], config: Mapping[str, Any]) -> list[str]:
    """Names of the nodes in the order they ran, from ONNX Runtime's own profile."""
    from .inference import open_session, session_options

    options = session_options(threads=1, ort_config=config)
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(path).with_suffix(""))
    session = open_session(path, options)
    session.run(None, dict(feeds))
    events = json.loads(Path(session.end_profiling()).read_text())
    suffix = "_kernel_time"
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(suffix)]
    return [event["name"].removesuffix(suffix) for event in sorted(kernels, key=lambda event: event["ts"])]


if __name__ == "__main__":
    main()
