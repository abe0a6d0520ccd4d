"""Bytes of the arena that ExecuTorch's greedy planner makes of given lifetimes; runs in its own environment (peers.py).

Reads ``[[[start, end, size], ...], ...]`` as JSON from the standard input, end exclusive; prints a list of bytes.
"""

from __future__ import annotations

import json
import logging
import sys

import torch
from executorch.exir.memory_planning import greedy  # pyright: ignore[reportMissingImports, reportUnknownVariableType]
from executorch.exir.tensor import TensorSpec  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

Lifetimes = list[tuple[int, int, int]]


def arena(lifetimes: Lifetimes) -> int:
    """Bytes of the arena."""
    specs: list[TensorSpec] = []
    for start, end, size in lifetimes:
        spec = TensorSpec(torch.uint8, torch.Size([size]))
        spec.alignment = 1
        spec.lifetime = [start, end - 1]
        specs.append(spec)
    empty = torch.fx.GraphModule({}, torch.fx.Graph())
    return sum(greedy(1, specs, empty, None).bufsizes)  # a list: a set would break ties differently in each process


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    print(json.dumps([arena(lifetimes) for lifetimes in json.load(sys.stdin)]))
