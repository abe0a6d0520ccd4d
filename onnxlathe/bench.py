"""What ``bench`` prints."""

from __future__ import annotations

import functools
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from onnxlathe.compiler.gate import shape_of
from onnxlathe.compiler.load import load_model
from onnxlathe.runtime.benchmark import interleaved, paired_ratio
from onnxlathe.runtime.feeds import load_feeds, make_feeds
from onnxlathe.runtime.session import Session


def print_bench(
    model: Path, other: Path | None, samples: Path | None, target: str, threads: int, seconds: float
) -> None:
    """Times one model, or two in turns on the same inputs."""
    feeds = load_feeds(samples) if samples is not None else make_feeds(load_model(model))
    sessions = [Session(path, device=target, threads=threads) for path in (model, other) if path is not None]
    table = Table(
        title=f"on {sessions[0].device}, threads {threads or 'default'}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("input")
    for path in (model, other):
        if path is not None:
            table.add_column(f"{path.name} (ms)", justify="right")
    if other is not None:
        table.add_column("faster by", justify="right")
    table.add_column("noise", justify="right")
    for sample in feeds:
        for session in sessions:
            session.run(sample)  # checks the sample, and says so clearly
        timings = interleaved(
            [functools.partial(session.ort.run, None, dict(sample)) for session in sessions], budget=seconds
        )
        row = [f"{timing.median * 1e3:.3f}" for timing in timings]
        noise = max(timing.noise for timing in timings)
        if len(timings) == 2:
            ratio, noise = paired_ratio(timings[0], timings[1])
            row.append(f"{ratio:.2f} x")
        table.add_row(shape_of(sample), *row, f"{noise:.0%}")
    Console().print(table)
