"""A model of more than 3 GB through fusion and int4: how much memory that takes, and how long.

    python benchmarks/large_model.py [--gigabytes 3.2] [--width 4096] [--folder DIR]

Feed-forward blocks, normalizations and activations written out, random weights in external data, are made in a
temporary folder and deleted afterwards. Memory is sampled in the process that compiles and saves: private pages
(RssAnon) are what it needs, pages of mapped files (RssFile) are the system's to take back. The bound is 1.3 times the
largest tensor group (a block's weights) and 2 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import onnx
from harness import write_result
from onnx import TensorProto, helper

_SPARE = 2 << 30
_FACTOR = 1.3


def write_model(folder: Path, width: int, gigabytes: float) -> tuple[Path, int, int]:
    """The model, its bytes of weights, and those of a block."""
    group = 2 * width * 4 * width * 4
    blocks = max(2, int(np.ceil(gigabytes * 1e9 / group)))
    nodes: list[onnx.NodeProto] = []
    initializers = [onnx.numpy_helper.from_array(np.array([-1], np.int64), "axis")]
    for name, number in (("two", 2.0), ("eps", 1e-5), ("root2", 2**0.5), ("one", 1.0), ("half", 0.5)):
        initializers.append(onnx.numpy_helper.from_array(np.float32(number), name))
    x, offset, rng = "x", 0, np.random.default_rng(0)

    def add(op: str, *inputs: str) -> str:
        name = f"v{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [name], name=f"n{len(nodes)}"))
        return name

    with (folder / "large.onnx.data").open("wb") as data:

        def weight(rows: int, columns: int) -> str:
            nonlocal offset
            name = f"w{len(initializers)}"
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[rows, columns])
            tensor.data_location = TensorProto.EXTERNAL
            length = rows * columns * 4
            for key, value in (("location", "large.onnx.data"), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
            for _ in range(rows // 256):
                data.write((rng.standard_normal((256, columns), np.float32) / np.float32(rows**0.5)).tobytes())
            offset += length
            return name

        for _ in range(blocks):
            centred = add("Sub", x, add("ReduceMean", x, "axis"))
            variance = add("ReduceMean", add("Pow", centred, "two"), "axis")
            h = add("Div", centred, add("Sqrt", add("Add", variance, "eps")))
            h = add("MatMul", h, weight(width, 4 * width))
            curve = add("Add", add("Erf", add("Div", h, "root2")), "one")
            h = add("Mul", add("Mul", h, "half"), curve)
            x = add("Add", x, add("MatMul", h, weight(4 * width, width)))
    nodes[-1].output[0] = "y"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "s", width]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], initializers)
    path = folder / "large.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    )
    return path, offset, group


def resident() -> dict[str, int]:
    """Private and file-mapped bytes of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: int(lines[kind].split()[0]) * 1024 for kind in ("RssAnon", "RssFile")}


def compile_one(path: Path, target: Path) -> None:
    """Compiles and saves; prints what it took as JSON."""
    import onnxlathe as lathe

    peak, done = resident(), threading.Event()
    before = peak["RssAnon"]

    def watch() -> None:
        while not done.wait(0.02):
            for kind, size in resident().items():
                peak[kind] = max(peak[kind], size)

    thread = threading.Thread(target=watch)
    thread.start()
    start, used = time.monotonic(), time.process_time()
    out = lathe.compile(path, "cpu-int4", speed_gate=False, progress=False, threads=1)
    out.save(target)
    done.set()
    thread.join()
    counts = {record.name: dict(record.counts) for record in out.report.passes if record.counts}
    seconds = {"wall": time.monotonic() - start, "cpu": time.process_time() - used}
    print(json.dumps({"peak": peak, "before": before, "seconds": seconds, "counts": counts, "error": out.report.error}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.2)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--compile", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_one(*args.compile)
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="onnxlathe-large-") as name:
        folder = Path(name)
        path, size, group = write_model(folder, args.width, args.gigabytes)
        target = folder / "small.onnx"
        command = [sys.executable, __file__, "--compile", str(path), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        written = sum(file.stat().st_size for file in folder.glob("small.onnx*"))
    bound = int(_FACTOR * group + _SPARE)
    content = {"weight_bytes": size, "group_bytes": group, "written_bytes": written, "bound_bytes": bound, **found}
    private = found["peak"]["RssAnon"]
    print(f"{size / 1e9:.2f} GB of weights, {written / 1e9:.2f} GB written, {found['seconds']['cpu']:.0f} s of CPU")
    mapped = found["peak"]["RssFile"]
    print(f"private peak {private / 1e9:.2f} GB of {bound / 1e9:.2f} allowed, mapped {mapped / 1e9:.2f} GB")
    write_result("large_model", 1, content, set())
    sys.exit(private > bound)


if __name__ == "__main__":
    main()
