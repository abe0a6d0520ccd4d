"""Lets one tool optimize one model in a fresh process; prints a line of JSON with time, memory and node counts.

    PYTHON benchmarks/prepare.py TOOL IN.onnx OUT.onnx [FOLDER]

Runs in the tool's own environment, so it imports nothing of ours except for the tool ``onnxlathe*``, which calibrates
on the samples (``.npz``) in FOLDER. Memory is the peak of what the process holds privately (``RssAnon``) above what it
had at the start, sampled every 10 ms: memory-mapped weights do not count, copies do. ``resident_bytes`` is the peak of
all that is resident (``VmRSS``), mapped files and libraries included. ``parts`` has both for what onnxlathe reports.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


def onnxlathe(source: str, target: str, passes: str, gate: bool, samples: str | None = None) -> None:
    """Ours."""
    import onnxlathe as lathe
    from onnxlathe.arguments import parse_passes

    done = lathe.compile(
        source, parse_passes(passes), threads=2, speed_gate=gate, calibration=samples, progress=MEMORY.begin
    )
    MEMORY.begin("save")
    done.save(target)


def onnxslim(source: str, target: str) -> None:
    """OnnxSlim with its defaults."""
    import onnx
    import onnxslim

    onnx.save(onnxslim.slim(source), target, **_external(target, source))


def onnxsim(source: str, target: str) -> None:
    """onnxsim with its defaults."""
    import onnx
    import onnxsim

    model, good = onnxsim.simplify(source)
    if not good:
        raise RuntimeError("onnxsim's own check failed")
    onnx.save(model, target, **_external(target, source))


def onnxoptimizer(source: str, target: str) -> None:
    """onnx's optimizer with its default passes."""
    import onnx
    import onnxoptimizer

    onnx.save(onnxoptimizer.optimize(onnx.load(source)), target, **_external(target, source))


def ort(source: str, target: str, level: str) -> None:
    """ONNX Runtime's own graph optimizer, offline."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = target
    if _external(target, source):
        key = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(key, Path(target).name + ".data")
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def transformers_optimizer(source: str, target: str) -> None:
    """onnxruntime.transformers for BERT, as its documentation runs it on the CPU."""
    from onnxruntime.transformers import optimizer

    result = optimizer.optimize_model(source, model_type="bert", num_heads=12, hidden_size=384, opt_level=0)
    result.save_model_to_file(target)


def onnxscript(source: str, target: str, fusions: bool) -> None:
    """onnxscript's optimizer, and on top its fusions for onnxruntime."""
    import onnx_ir as ir
    from onnxscript import optimizer

    model = ir.load(source)
    optimizer.optimize(model)
    if fusions:
        from onnxscript.rewriter.ort_fusions import optimize_for_ort

        result = optimize_for_ort(model)
        model = result[0] if isinstance(result, tuple) else result
    ir.save(model, target, external_data=Path(target).name + ".data" if _external(target, source) else None)


def _external(target: str, source: str) -> dict[str, object]:
    if not list(Path(source).parent.glob(Path(source).name + "*.data")):
        return {}
    return {"save_as_external_data": True, "location": Path(target).name + ".data"}


TOOLS: dict[str, Callable[[str, str], None]] = {
    "onnxlathe": lambda a, b: onnxlathe(a, b, "cpu-fp32", True),
    "onnxlathe cpu-fp32, no gate": lambda a, b: onnxlathe(a, b, "cpu-fp32", False),
    "onnxlathe basic": lambda a, b: onnxlathe(a, b, "basic", False),
    "onnxslim": onnxslim,
    "onnxsim": onnxsim,
    "onnxoptimizer": onnxoptimizer,
    "ORT basic": lambda a, b: ort(a, b, "BASIC"),
    "ORT extended": lambda a, b: ort(a, b, "EXTENDED"),
    "ORT transformers optimizer": transformers_optimizer,
    "onnxscript optimizer": lambda a, b: onnxscript(a, b, False),
    "onnxscript ort_fusions": lambda a, b: onnxscript(a, b, True),
}


class Memory:
    """Peaks of this process's memory, in bytes, by what was being done: ``{part: (private, resident)}``."""

    def __init__(self) -> None:
        self.peaks: dict[str, tuple[int, int]] = {}
        self._part, self._running = "start", True
        self._before = self._now()[0]
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        """Begins to sample."""
        self._thread.start()

    def stop(self) -> None:
        """Ends sampling."""
        self._running = False
        self._thread.join()

    def begin(self, message: str) -> None:
        """From here on another part: the message without numbers and what comes after them."""
        self._part = re.split(r"\d|:", message)[0].strip() or self._part

    @staticmethod
    def _now() -> tuple[int, int]:
        found = {"RssAnon": 0, "VmRSS": 0}
        for line in Path("/proc/self/status").read_text().splitlines():
            key = line.partition(":")[0]
            if key in found:
                found[key] = int(line.split()[1]) * 1024
        return found["RssAnon"], found["VmRSS"]

    def _sample(self) -> None:
        while self._running:
            (private, resident), (most, all_most) = self._now(), self.peaks.get(self._part, (0, 0))
            self.peaks[self._part] = (max(most, private - self._before), max(all_most, resident))
            time.sleep(0.01)


MEMORY = Memory()


def run_tool(tool: str, source: str, target: str, samples: str | None = None) -> None:
    """Runs one of ``TOOLS``, or onnxlathe with the preset that the name ends with."""
    if tool in TOOLS:
        TOOLS[tool](source, target)
    elif tool.startswith("onnxlathe "):
        onnxlathe(source, target, tool.removeprefix("onnxlathe "), False, samples)
    else:
        raise KeyError(tool)


def main(tool: str, source: str, target: str, samples: str | None = None) -> None:
    """Runs the tool and prints the figures."""
    import onnx

    MEMORY.start()
    start = time.perf_counter()
    run_tool(tool, source, target, samples)
    seconds = time.perf_counter() - start
    MEMORY.stop()
    model = onnx.load(target, load_external_data=False)
    ops: dict[str, int] = {}
    for node in model.graph.node:
        ops[node.op_type] = ops.get(node.op_type, 0) + 1
    found = {
        "seconds": seconds,
        "private_bytes": max(private for private, _ in MEMORY.peaks.values()),
        "resident_bytes": max(resident for _, resident in MEMORY.peaks.values()),
        "nodes": sum(ops.values()),
        "ops": ops,
        "parts": MEMORY.peaks,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
