"""Memory plans: hard offset instances, real graphs, what ONNX Runtime really needs, planning time.

    python benchmarks/memory.py [--only offsets|graphs|ort|names|kernels|speed|growth|prefix] [--instances FOLDER]

Offsets: the MiniMalloc instances (id, lower, upper, size; capacity 1,048,576) against greedy by size, ORT's own way
(best fit in order of start) and ExecuTorch's planner. Graphs: bound of the order found / of the given order (that of
torch's exporter: the order in which the module runs), whether a complete search or a bound of every order proves it the
best, arena / bound, ExecuTorch's planner for the same lifetimes, onnxsim's arena for the given order. ORT: measured
peak of a run with the plan / without, each in a process of its own; the least that any order of the graph after ORT's
fusions needs; what a session with its arena holds between runs.
Names: measured peaks with other names for symbolic dims. Kernels: which of ORT's write over an input. Speed: ORT with
buffers freed at once / as it runs by itself. Growth: seconds for chains with branches of 1k to 10k nodes. Prefix: time
to the first token of a prompt of 1000 tokens whose first 900 were seen before / without, on the 135M Llama (random
weights).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import write_result
from memory_ort import BRANCHY, OTHERS, exported, kernels, measured, names, speed
from peers import python_of
from rich.console import Console
from rich.table import Table

import onnxlathe as lathe
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.memory_plan import MemoryPlan, read_plans
from onnxlathe.models.decoder import decoder
from onnxlathe.passes.memory.lifetimes import Sizes, flow_of
from onnxlathe.passes.memory.offsets import lower_bound, place_greedily, plan_offsets
from onnxlathe.passes.memory.order_bounds import least_bound, order_bound
from onnxlathe.passes.memory.order_search import proven_best
from onnxlathe.passes.memory.plan_memory import PlanMemory
from onnxlathe.runtime.artifact import save
from onnxlathe.runtime.feeds import make_feeds
from onnxlathe.runtime.memory_stats import measure_memory

CAPACITY = 1_048_576
Lifetimes = list[tuple[int, int, int]]  # start, end, bytes
_FOLDERS = [parent / "shared" / "data" / "minimalloc" for parent in Path(__file__).parents]
HARD = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[-1])


def offsets(folder: Path) -> dict[str, Any]:
    """Every instance: peak / bound of the baselines and ours, seconds, whether it fits the capacity."""
    rows: dict[str, Any] = {}
    instances: list[Lifetimes] = []
    for path in sorted(folder.glob("*.csv")):
        table = np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.int64)
        start, end, size = table[:, 1], table[:, 2], table[:, 3]
        bound = lower_bound(start, end, size)
        index = np.arange(len(size))
        greedy = place_greedily(start, end, size, np.lexsort([index, start - end, -size]))
        online = place_greedily(start, end, size, np.lexsort([index, -size, start]))
        begin = time.monotonic()
        lifetimes = list(zip(start.tolist(), end.tolist(), strict=True))
        found = plan_offsets(lifetimes, size.tolist(), CAPACITY, 60)
        rows[path.stem] = {
            "buffers": len(size),
            "greedy by size": float((greedy + size).max() / bound),
            "best fit as ORT": float((online + size).max() / bound),
            "ours": found.peak / bound,
            "fits": found.peak <= CAPACITY,
            "seconds": time.monotonic() - begin,
        }
        instances.append(list(zip(start.tolist(), end.tolist(), size.tolist(), strict=True)))
        print(path.stem, rows[path.stem], flush=True)
    for row, (arena, bound) in zip(rows.values(), _executorch(instances), strict=True):
        row["executorch greedy"] = arena / bound
    return rows


def graphs() -> dict[str, Any]:
    """Every graph: the order found against the given one, what no order can do without, and the arena."""
    rows: dict[str, Any] = {}
    instances: list[Lifetimes] = []
    for name in (*BRANCHY, *OTHERS):
        model = exported(name)
        begin = time.monotonic()
        out = lathe.compile(model, [PlanMemory(measure=False)], verify=False, progress=False)
        (plan,) = read_plans(out.model.metadata_props)
        seconds = time.monotonic() - begin
        flow = flow_of(model.graph, Sizes(model, {}))
        given = order_bound(flow, range(len(flow.before)))
        position = {node.name: index for index, node in enumerate(model.graph)}
        ran = measure_memory(model, make_feeds(model, 0, 1)[0], {"graph_optimization_level": "disable"}).order
        by_default = order_bound(flow, [position[name] for name in ran])
        found = [position[name] for name in plan.order]
        rows[name] = {
            "nodes": len(plan.order),
            "bound / given": plan.bound / given,
            "proven the best": proven_best(flow, found) or plan.bound == least_bound(flow),
            "every order / given": least_bound(flow) / given,
            "ORT's default order / given": by_default / given,
            "arena / bound": plan.peak / plan.bound,
            **_greedy(plan),
            "onnxsim arena / ours": _onnxsim(model) / plan.peak,
            "seconds": seconds,
        }
        instances.append([(buffer.start, buffer.end, buffer.size) for buffer in plan.buffers])
        print(name, rows[name], flush=True)
    for row, (arena, bound) in zip(rows.values(), _executorch(instances), strict=True):
        row["executorch greedy / bound"] = arena / bound
    return rows


def _executorch(instances: Sequence[Lifetimes]) -> list[tuple[float, int]]:
    """Bytes of the arena that ExecuTorch's greedy planner makes, not a number where it is not installed; the bound."""
    bounds = [lower_bound(*np.array(lifetimes).T) for lifetimes in instances]
    if not python_of("executorch").exists():
        return [(math.nan, bound) for bound in bounds]
    command = [python_of("executorch"), Path(__file__).parent / "executorch_arena.py"]
    done = subprocess.run(command, input=json.dumps(instances), capture_output=True, text=True, check=True)
    return list(zip(json.loads(done.stdout.splitlines()[-1]), bounds, strict=True))


def _greedy(plan: MemoryPlan) -> dict[str, float]:
    """Arena / bound of the baselines on the lifetimes of ``plan``."""
    start, end, size = np.array([(buffer.start, buffer.end, buffer.size) for buffer in plan.buffers]).T
    index = np.arange(len(size))
    orders = {
        "greedy by size / bound": np.lexsort([index, start - end, -size]),
        "best fit as ORT / bound": np.lexsort([index, -size, start]),
    }
    placed = {name: place_greedily(start, end, size, order) for name, order in orders.items()}
    return {name: float((offsets + size).max() / plan.bound) for name, offsets in placed.items()}


def _onnxsim(model: Any) -> float:
    """Bytes of onnxsim's arena for ``model`` as it is; not a number where it is not installed (see peers.py)."""
    if not python_of("onnxsim").exists():
        return math.nan
    code = "import onnx, onnxsim, sys; print(onnxsim.plan_activation_memory(onnx.load(sys.argv[1])).arena_bytes)"
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder) / "model.onnx")
        done = subprocess.run([python_of("onnxsim"), "-c", code, path], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def growth() -> dict[str, Any]:
    """Seconds to plan graphs of growing size."""
    import onnx.helper as oh
    import onnx_ir as ir
    from onnx import TensorProto

    rows: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for count in (1_000, 3_000, 10_000):
        values, nodes = ["x"], []
        for number in range(count):
            sources = [values[-1 - int(min(len(values) - 1, rng.geometric(0.4) - 1))] for _ in range(2)]
            nodes.append(oh.make_node("Add", sources, [f"v{number}"], name=f"n{number}"))
            values.append(f"v{number}")
        info = [oh.make_tensor_value_info(name, TensorProto.FLOAT, [64, 64]) for name in ("x", values[-1])]
        graph = oh.make_graph(nodes, "growth", info[:1], info[1:])
        model = ir.from_proto(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 20)], ir_version=10))
        begin = time.monotonic()
        infer_shapes(model)
        PlanMemory(measure=False)(model, lathe.PassContext())
        rows[str(count)] = {"seconds": time.monotonic() - begin}
        print(count, rows[str(count)], flush=True)
    return rows


def prefix() -> dict[str, Any]:
    """What the prefix cache saves of a prefill; the first token is the same with and without."""
    graph = lathe.compile(
        lathe.export_causal_lm(decoder("llama_135m"), check=False), "cpu-fp32", threads=2, speed_gate=False,
        verify=False, progress=False,
    ).model  # fmt: skip
    with_cache = lathe.Session(graph, threads=2, prefix_cache=1 << 30)
    rng = np.random.default_rng(0)
    rows: dict[str, Any] = {}
    for turn in range(5):
        first = rng.integers(3, 40_000, 1000)
        second = np.concatenate([first[:900], rng.integers(3, 40_000, 100)])
        seconds: list[float] = []
        for prompt in (first, second):
            begin = time.monotonic()
            token = with_cache.generate(prompt, 1, eos=())
            seconds.append(time.monotonic() - begin)
        plain = lathe.Session(graph, threads=2).generate(second, 1, eos=()) if turn == 0 else token
        rows[str(turn)] = {"time / without": seconds[1] / seconds[0], "same token": bool((plain == token).all())}
        print(turn, rows[str(turn)], flush=True)
    return rows


def show(results: dict[str, dict[str, Any]]) -> None:
    """One table a part."""
    console = Console(width=140)
    for title, rows in results.items():
        table = Table(title=title, title_justify="left")
        columns = list(next(iter(rows.values())))
        for column in ("", *columns):
            table.add_column(column, justify="left" if column in ("", "notes", "chosen") else "right")
        for name, row in rows.items():
            cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
            table.add_row(name, *cells)
        console.print(table)
        for column in ("greedy by size", "best fit as ORT", "executorch greedy", "ours"):
            if column in columns:
                mean = math.exp(sum(math.log(row[column]) for row in rows.values()) / len(rows))
                console.print(f"{column}: peak / bound, geometric mean {mean:.3f}")


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("offsets", "graphs", "ort", "names", "kernels", "speed", "growth", "prefix"))
    parser.add_argument("--instances", type=Path, default=HARD)
    arguments = parser.parse_args()
    parts = {
        "offsets": lambda: offsets(arguments.instances),
        "graphs": graphs,
        "ort": measured,
        "names": names,
        "kernels": kernels,
        "speed": speed,
        "growth": growth,
        "prefix": prefix,
    }
    wanted = [arguments.only] if arguments.only else list(parts)
    results = {name: parts[name]() for name in wanted}
    show({name: rows for name, rows in results.items() if rows})
    used = {"offsets": {"executorch"}, "graphs": {"executorch", "onnxsim"}}
    peers = {peer for name in wanted for peer in used.get(name, ()) if python_of(peer).exists()}
    write_result("memory" if not arguments.only else f"memory_{arguments.only}", 1, results, peers)


if __name__ == "__main__":
    main()
