"""Every node test and light model of ``onnx.backend.test`` through the presets: same outputs, or a refusal by name.

    python benchmarks/backend_tests.py [--every 20] [--only NAME] [--name backend_tests]

The judge is the model before compiling, in ONNX Runtime without optimizations; what that cannot run is listed and left
out. The light models are architectures whose weights are made at run time.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from harness import write_result
from onnx.backend.test.loader import load_model_tests

import onnxlathe as lathe
from onnxlathe.compiler.load import load_model
from onnxlathe.compiler.verify import relative_error
from onnxlathe.runtime.feeds import make_feeds
from onnxlathe.runtime.inference import open_session, run_session, session_options

_LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
PRESETS = ("basic", "cpu-fp32", "cpu-int8", "cpu-int4")
_EXACT = ("basic", "cpu-fp32")
_TOLERANCE = 1e-5
_HALF = 400  # half precision may be off by four of its units, 4e-3
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")


@dataclasses.dataclass(frozen=True)
class Light:
    """An architecture whose weights are made at run time."""

    name: str
    path: Path


def cases() -> list[Any]:
    """All tests that have a model on disk."""
    found = [
        case
        for kind in ("node", "simple", "pytorch-operator", "pytorch-converted")
        for case in load_model_tests(kind=kind)
    ]
    return [*found, *(Light(path.stem, path) for path in sorted(_LIGHT.glob("*.onnx")))]


def samples_of(case: Any, proto: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    """The test's inputs; made ones for the light models, which have none."""
    if isinstance(case, Light):
        return make_feeds(load_model(proto), count=1)
    initializers = {tensor.name for tensor in proto.graph.initializer}
    names = [value.name for value in proto.graph.input if value.name not in initializers]
    if case.data_sets is not None:  # node tests are made in memory
        return [dict(zip(names, inputs, strict=False)) for inputs, _ in case.data_sets]
    found: list[dict[str, np.ndarray]] = []
    for folder in sorted(Path(case.model_dir).glob("test_data_set_*")):
        paths = [folder / f"input_{number}.pb" for number in range(len(names))]
        tensors = [onnx.numpy_helper.to_array(onnx.load_tensor(path)) for path in paths]
        found.append(dict(zip(names, tensors, strict=True)))
    return found or [{}]


def judge(case: Any) -> dict[str, str]:
    """``{preset: what came of it}``; ``{"skipped": why}`` where ONNX Runtime is no judge."""
    path = case.path if isinstance(case, Light) else Path(case.model_dir) / "model.onnx" if case.model_dir else None
    proto = onnx.load(path) if path is not None else case.model
    if any(node.op_type in _RANDOM for node in proto.graph.node):
        return {"skipped": "random by definition"}
    try:
        feeds = samples_of(case, proto)
        session = open_session(ir.from_proto(proto), session_options(threads=1, optimize=False, repack=False))
        before = [run_session(session, sample) for sample in feeds]
    except Exception as error:
        return {"skipped": f"ONNX Runtime: {_short(error)}"}
    if any(not isinstance(array, np.ndarray) for result in before for array in result.values()):
        return {"skipped": "sequences, maps or optionals as outputs"}
    return {preset: _compiled(proto, preset, feeds, before) for preset in PRESETS}


def _compiled(proto: onnx.ModelProto, preset: str, feeds: list[dict[str, np.ndarray]], before: list[Any]) -> str:
    try:
        out = lathe.compile(proto, preset, calibration=feeds, speed_gate=False, progress=False, threads=1)
        session = open_session(out.model, session_options(threads=1, optimize=False, repack=False))
        after = [run_session(session, sample) for sample in feeds]
    except lathe.LatheError as error:
        kind = "WRONG" if isinstance(error, lathe.VerifyError) or "Please report" in str(error) else "refused"
        return f"{kind}: {type(error).__name__}: {error}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {_short(error)}"
    pairs = [(a[name], b[name]) for a, b in zip(before, after, strict=True) for name in a]
    worst = max(relative_error(a, b) / (_HALF if a.dtype.itemsize == 2 else 1) for a, b in pairs)
    changed = any(record.counts for record in out.report.passes)
    if worst > _TOLERANCE and (preset in _EXACT or not out_is_quantized(out.model)):
        return f"WRONG: differs by {worst:.1e}"
    return "same" if worst <= _TOLERANCE and changed else "unchanged" if not changed else f"quantized ({worst:.1e})"


def out_is_quantized(model: ir.Model) -> bool:
    """Whether anything in ``model`` is computed with fewer bits."""
    kinds = {node.op_type for graph in model.graphs() for node in graph}
    return bool(kinds & {"DequantizeLinear", "MatMulNBits", "MatMulIntegerToFloat", "GatherBlockQuantized"})


def _short(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="each n-th test only")
    parser.add_argument("--only", default="", help="tests whose names contain this")
    parser.add_argument("--name", default="backend_tests", help="results/NAME.json")
    args = parser.parse_args()
    start, verdicts = time.process_time(), dict[str, dict[str, str]]()
    for case in [case for case in cases() if args.only in case.name][:: args.every]:
        verdicts[case.name] = found = judge(case)
        gc.collect()
        for preset, verdict in found.items():
            if verdict.startswith("WRONG"):
                print(case.name, preset, verdict[:300], flush=True)
    counts = Counter(
        f"{preset}: {verdict.split(':')[0].split(' (')[0]}"
        for found in verdicts.values()
        for preset, verdict in found.items()
    )
    for key, count in sorted(counts.items()):
        print(f"{key:40} {count:6}")
    unusual = {name: found for name, found in verdicts.items() if any(_unusual(text) for text in found.values())}
    content = {"tests": len(verdicts), "seconds": time.process_time() - start, "counts": counts, "unusual": unusual}
    write_result(args.name, 1, content, set())
    sys.exit(any("WRONG" in key for key in counts))


def _unusual(text: str) -> bool:
    return text not in ("same", "unchanged") and not text.startswith("quantized")


if __name__ == "__main__":
    main()
