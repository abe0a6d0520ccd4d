"""Random graphs through every pass and preset, before and after compared in ONNX Runtime. Resumable.

    python benchmarks/fuzz.py --graphs 10000 --seed 0
    python benchmarks/fuzz.py --graphs 1000 --seed 0 --kind blocks

Graph number i of a seed and a kind is always the same; ``blocks`` are repeated residual blocks, on which what prunes
and distills is tried with many options. Every fiftieth graph the counts are written to ``results/fuzz.json`` (or
``fuzz_blocks.json``); a second run goes on from there. A wrong result is reduced and saved as ``NUMBER-PASS.onnx`` with
``.npz`` feeds in ``--failures``; ``--recheck`` tries the recorded ones again, after a fix.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import numpy as np
import onnx
from harness import RESULTS, write_result

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from graph_fuzzer.generate import Case, draw
from graph_fuzzer.judge import Judge, Verdict
from graph_fuzzer.reduce import reduce
from graph_fuzzer.repeated import draw_blocks
from graph_fuzzer.trials import BLOCK_TRIALS, TRIALS, Trial

_LOAD, _TRUTH = Trial("load"), Trial("truthful")
_STEP, _COLLECT = 50, 10
_KINDS = {"graphs": (draw, TRIALS), "blocks": (draw_blocks, BLOCK_TRIALS)}


@dataclasses.dataclass
class State:
    """What was found so far: per pass how often each verdict, and the wrong ones."""

    graphs: int = 0
    redrawn: int = 0
    nodes: int = 0
    operators: set[str] = dataclasses.field(default_factory=set)
    seconds: float = 0.0
    verdicts: dict[str, Counter[str]] = dataclasses.field(default_factory=lambda: defaultdict(Counter))
    rules: dict[str, Counter[str]] = dataclasses.field(default_factory=lambda: defaultdict(Counter))
    refusals: dict[str, Counter[str]] = dataclasses.field(default_factory=lambda: defaultdict(Counter))
    wrong: list[dict[str, object]] = dataclasses.field(default_factory=list)
    crashed: list[dict[str, object]] = dataclasses.field(default_factory=list)

    def add(self, number: int, trial: Trial, verdict: Verdict) -> None:
        """Counts one verdict."""
        self.verdicts[trial.name][verdict.kind] += 1
        self.rules[trial.name].update(verdict.rules)
        if verdict.kind == "refused":
            self.refusals[trial.name][verdict.detail[:60]] += 1
        if verdict.kind == "wrong":
            self.wrong.append({"graph": number, "pass": trial.name, "after": trial.after, "detail": verdict.detail})

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        return {**vars(self), "operators": sorted(self.operators)}

    @classmethod
    def read(cls, path: Path) -> State:
        """The state that an earlier run left."""
        data = json.loads(path.read_text())["fuzz"]
        state = cls(data["graphs"], data["redrawn"], data["nodes"], set(data["operators"]), data["seconds"])
        for name in ("verdicts", "rules", "refusals"):
            for key, counts in data[name].items():
                getattr(state, name)[key].update(counts)
        state.wrong, state.crashed = data["wrong"], data["crashed"]
        return state


class Running:
    """What is being tried, in a file that outlives the process, should ORT take it down."""

    def __init__(self, path: Path) -> None:
        self.before = path.read_text().strip() if path.exists() else ""
        self._file = path.open("w")  # kept open, and never made shorter: opening takes longer than a pass

    def say(self, text: str) -> None:
        """Replaces what the file says."""
        self._file.seek(0)
        self._file.write(f"{text:<80}")
        self._file.flush()


def try_graph(number: int, seed: int, state: State, failures: Path, running: Running, kind: str = "graphs") -> None:
    """Every pass whose turn it is on graph ``number``."""
    running.say(f"{number} draw")
    random = Random(f"{seed}/{number}")
    make, trials = _KINDS[kind]
    case = make(random)
    judge = Judge(case, random)
    state.redrawn += case.redrawn
    state.nodes += len(case.proto.graph.node)
    state.operators.update(node.op_type for node in case.proto.graph.node)
    state.add(number, _LOAD, judge.load())
    for place, trial in enumerate(trials):
        if (number + place) % trial.every == 0:
            running.say(f"{number} {trial.name}")
            verdict = judge.trial(trial)
            state.add(number, trial, verdict)
            if verdict.kind == "wrong":
                print(f"{number} {trial.name} {trial.after}: {verdict.detail}", flush=True)
                _save(number, trial, case, failures)
    state.add(number, _TRUTH, judge.truthful())
    running.say("")


def _save(number: int, trial: Trial, case: Case, folder: Path) -> None:
    """The failing graph, as small as it gets, with its feeds."""

    def fails(smaller: Case) -> bool:
        return any(Judge(smaller, Random(seed)).trial(trial).kind == "wrong" for seed in range(3))

    folder.mkdir(parents=True, exist_ok=True)
    small = reduce(case, fails)
    stem = folder / f"{number}-{trial.name.replace(' ', '-')}"
    onnx.save(small.proto, f"{stem}.onnx")
    for index, feeds in enumerate(small.feeds):
        np.savez(f"{stem}-{index}.npz", **feeds)


def recheck(state: State, seed: int, failures: Path, running: Running, kind: str) -> None:
    """Tries the graphs again that were wrong or ended the process; what is right now counts as ``same``."""
    crashed, state.crashed = state.crashed, []
    for item in crashed:
        try_graph(int(str(item["graph"])), seed, state, failures, running, kind)
    old, state.wrong = state.wrong, []
    for number in sorted({int(str(item["graph"])) for item in old}):
        before = [item for item in old if item["graph"] == number]
        now = State()
        try_graph(number, seed, now, failures, running, kind)
        state.wrong += now.wrong
        for item in before:
            still = any(new["pass"] == item["pass"] and new["after"] == item["after"] for new in now.wrong)
            if not still:
                state.verdicts[str(item["pass"])].update({"wrong": -1, "same": 1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(_KINDS), default="graphs")
    parser.add_argument("--name", help="results/NAME.json; fuzz, or fuzz_blocks")
    parser.add_argument("--failures", type=Path, default=Path("fuzz_failures"))
    parser.add_argument("--recheck", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.name = args.name or {"graphs": "fuzz", "blocks": "fuzz_blocks"}[args.kind]
    args.failures.mkdir(parents=True, exist_ok=True)
    if not args.worker:
        sys.exit(_supervise())
    path = RESULTS / f"{args.name}.json"
    state = State.read(path) if path.exists() else State()
    running = Running(args.failures / "running")
    if running.before:  # the process before this one died there: its counts since the last writing are made again
        number, what = running.before.split(" ", 1)
        state.crashed.append({"graph": int(number), "pass": what})
    gc.disable()  # graphs are full of cycles: collected now and then
    gc.freeze()
    if args.recheck:
        recheck(state, args.seed, args.failures, running, args.kind)
        write_result(args.name, 0, {"seed": args.seed, "fuzz": state.to_dict()}, set())
    while state.graphs < args.graphs:
        if any(item["graph"] == state.graphs for item in state.crashed):
            state.graphs += 1
            continue
        start = time.process_time()
        try_graph(state.graphs, args.seed, state, args.failures, running, args.kind)
        if state.graphs % _COLLECT == 0:
            gc.collect()
        state.seconds += time.process_time() - start
        state.graphs += 1
        if state.graphs % _STEP == 0 or state.graphs == args.graphs:
            write_result(args.name, 0, {"seed": args.seed, "fuzz": state.to_dict()}, set())
    _print(state)
    sys.exit(bool(state.wrong))


def _supervise() -> int:
    """Runs this script in a process of its own, and again where ONNX Runtime took the process down with it."""
    while True:
        done = subprocess.run([sys.executable, *sys.argv, "--worker"], check=False)
        if done.returncode in (0, 1, 2):
            return done.returncode
        print(f"the process ended with {done.returncode}: going on behind that graph", flush=True)


def _print(state: State) -> None:
    print(f"{state.graphs} graphs, {state.nodes} nodes, {len(state.operators)} operators, {len(state.wrong)} wrong")
    print(f"{'pass':28} {'tried':>7} {'acted':>7} {'refused':>8} {'ill':>5} {'wrong':>6}")
    for name, counts in sorted(state.verdicts.items()):
        acted = counts["same"] + counts["approximate"] + counts["ill-conditioned"]
        tried = acted + counts["unchanged"] + counts["refused"] + counts["wrong"]
        print(f"{name:28} {tried:7} {acted:7} {counts['refused']:8} {counts['ill-conditioned']:5} {counts['wrong']:6}")


if __name__ == "__main__":
    main()
