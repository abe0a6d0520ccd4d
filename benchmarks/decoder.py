r"""A Llama-like decoder on the CPU: prefill, decoding steps and whole generation loops, against the peers.

    python benchmarks/peers.py && python benchmarks/decoder.py               # the 135M Llama, everything: long
    python benchmarks/decoder.py --sides "genai graph,onnxlathe" --cases "decode 128 b1"
    python benchmarks/decoder.py --quick                                     # the tiny decoder, under a minute
    python benchmarks/decoder.py --limit 1 --sides "genai int4 graph,onnxlathe" --result decoder_int4 \
        --preset "cpu-fp32,quantize-weights:symmetric=true:head_bits=4:embedding_bits=4" --cases "decode 128 b1"

Baseline: the first side, by default the graph of onnxruntime-genai's builder in plain onnxruntime; for loops, genai's
own. Ratios above 1 are faster. Each side is alone in its process; sides take turns; threads are fixed. Before a side is
timed, its logits (of the last position) or its greedy tokens are compared with PyTorch's, and it is refused above
1e-3. ``prefill N bB``: N tokens into an empty cache. ``decode N bB``: one token after N. ``text N bB``: N tokens and
32 greedy ones after them, by the whole loop; ``step N bB``: the time between two of its tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from decoder_models import LOOPS, NAMES, clean, make_side, weights
from harness import Side, Worker, compare, write_result
from rich.console import Console
from rich.table import Table

LIMIT = 1e-3


@dataclasses.dataclass(frozen=True)
class Case:
    """One column."""

    mode: str
    past: int
    batch: int

    @property
    def label(self) -> str:
        """E.g. ``decode 128 b1``."""
        return f"{self.mode} {self.past} b{self.batch}"

    def arrays(self, vocabulary: int, new: int) -> dict[str, Any]:
        """Random tokens, see ``decoder_worker.py``."""
        ids = np.random.default_rng(self.past).integers(3, vocabulary, (self.batch, self.past + 1))
        more: dict[str, Any] = {
            "decode": {"token": ids[:, -1:]},
            "text": {"new": new},
            "step": {"new": new, "steps": 1},
        }
        return {"prompt": ids[:, :-1], **more.get(self.mode, {})}


def cases(quick: bool) -> list[Case]:
    """All columns."""
    pasts, batches = ((48,), (1, 2)) if quick else ((128, 1024), (1, 4))
    steps = [Case(mode, past, batch) for mode in ("prefill", "decode") for batch in batches for past in pasts]
    loops = [Case(mode, pasts[0], batch) for mode in ("step", "text") for batch in batches]
    return [*steps, *loops]


def references(kind: str, config: str, samples: dict[str, Path], threads: int) -> dict[str, Any]:
    """What PyTorch makes of every case."""
    if not samples:
        return {}
    worker = Worker(Side("reference", kind, str(weights(config)), worker="decoder_worker.py"), threads)
    expected: dict[str, Any] = {}
    try:
        for label, path in samples.items():
            output = path.with_suffix(".expected.npy")
            worker.ask(load=str(path))
            worker.ask(outputs=str(output))
            expected[label] = np.load(output)
    finally:
        worker.close()
    return expected


def show(title: str, sides: list[Side], results: dict[str, dict[str, Any]], labels: list[str]) -> None:
    """Prints one table."""
    table = Table(title=title)
    table.add_column("side")
    for label in labels:
        table.add_column(label, justify="right")
    table.add_column("error", justify="right")
    table.add_column("note")
    for side in sides:
        rows = results[side.name]
        cells = [
            f"{rows[at]['ratio']:.2f} ±{rows[at]['spread']:.2f}" if "ratio" in rows.get(at, {}) else "-"
            for at in labels
        ]
        errors = [rows[label]["error"] for label in labels if label in rows]
        table.add_row(side.name, *cells, f"{max(errors):.1e}" if errors else "-", side.failure or side.note)
    Console(width=max(120, 60 + 14 * len(labels))).print(table)


def measure(sides: list[Side], samples: dict[str, Path], options: argparse.Namespace, reference: str) -> Any:
    """One comparison, the first side that works as its baseline; prints and returns it."""
    sides = sorted(sides, key=lambda side: bool(side.failure))  # keeps the order of those that work
    if not samples or not sides or sides[0].failure:
        return {}
    expected = references(reference, options.config, samples, options.threads)
    results = compare(
        sides, samples, threads=options.threads, rounds=options.rounds, seconds=options.seconds, reference=expected,
        warm=options.warm, limit=options.limit,
    )  # fmt: skip
    show(f"{options.config}, {options.threads} threads: times {sides[0].name}", sides, results, list(samples))
    rows = {side.name: {"note": side.note, "failure": side.failure, **results[side.name]} for side in sides}
    return {"baseline": sides[0].name, "sides": rows}


def main() -> None:
    """Prints the tables and writes the JSON."""
    options = arguments()
    chosen = [case for case in cases(options.quick) if case.label in options.cases]
    vocabulary = {"tiny": 512, "llama_135m": 49152}[options.config]
    with tempfile.TemporaryDirectory() as temporary:
        samples: dict[str, Path] = {}
        for case in chosen:
            samples[case.label] = Path(temporary) / f"{case.label.replace(' ', '-')}.npz"
            np.savez(samples[case.label], **case.arrays(vocabulary, options.new))
        steps = {label: path for label, path in samples.items() if label.startswith(("prefill", "decode"))}
        loops = {label: path for label, path in samples.items() if label not in steps}
        try:
            sides = [make_side(name, options.config, options.preset) for name in options.sides]
            content = {
                "config": options.config,
                "preset": options.preset,
                "steps": measure([side for side in sides if side.name not in LOOPS], steps, options, "torch"),
                "loops": measure([side for side in sides if side.name in LOOPS], loops, options, "torch loop"),
            }
        finally:
            clean(options.config)
    name = options.result or ("decoder_quick" if options.quick else "decoder")
    print("wrote", write_result(name, options.threads, content, {side.python for side in sides if not side.failure}))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny decoder, small cases, few rounds")
    parser.add_argument("--preset", default="cpu-fp32", help="what onnxlathe compiles with: a preset, or passes")
    parser.add_argument("--sides", default="", help=f"comma-separated; all: {', '.join(NAMES)}")
    parser.add_argument("--cases", default="", help=f"comma-separated; all: {', '.join(c.label for c in cases(False))}")
    parser.add_argument("--limit", type=float, default=LIMIT, help="largest relative error; 1 for low-bit sides")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="per turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--result", default="", help="name of the file in benchmarks/results")
    options = parser.parse_args()
    quick = options.quick
    options.config, options.new, options.warm = ("tiny", 8, 2) if quick else ("llama_135m", 32, 2)
    options.rounds = options.rounds or (3 if quick else 7)
    options.seconds = options.seconds or (0.02 if quick else 0.6)
    options.sides = _chosen(parser, options.sides, list(NAMES))
    options.cases = _chosen(parser, options.cases, [case.label for case in cases(quick)])
    return options


def _chosen(parser: argparse.ArgumentParser, text: str, known: list[str]) -> list[str]:
    """Comma-separated names; all if there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}")
    return names or known


if __name__ == "__main__":
    main()
