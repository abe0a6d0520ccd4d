"""Which passes and presets run on a drawn graph, with options that let them act on small graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Literal

from onnxlathe.compiler.base import Pass
from onnxlathe.compiler.budget import Budget
from onnxlathe.passes import (
    AdaRound,
    ClipOutliers,
    ConvertFloat16,
    CorrectBias,
    Distill,
    FewLevelWeights,
    FuseAttention,
    FuseSkipNormalization,
    MixedPrecision,
    PlanMemory,
    PruneAdaptive,
    PruneDepth,
    PruneSparse,
    PruneWidth,
    QuantizeDynamic,
    QuantizeProgressive,
    QuantizeStatic,
    QuantizeWeights,
    SmoothQuant,
    TilePatches,
)
from onnxlathe.passes.partition.partition_devices import PartitionDevices
from onnxlathe.passes.partition.partition_stages import PartitionStages
from onnxlathe.passes.presets import PRESETS, make_pass

_FORMS: list[Literal["auto", "Attention", "MultiHeadAttention"]] = ["auto", "Attention", "MultiHeadAttention"]
_MULTIPLY: list[Literal["never", "where-it-pays"]] = ["never", "where-it-pays"]
_MACHINES = {"cuda": (1e12, 1e11, 5e-6)}
_LOOSE = Budget("relative_error", 100.0)
_ALL = ("ffn", "heads", "channels")
_KINDS = [_ALL, _ALL, _ALL, ("ffn", "channels"), ("heads",)]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One pass on one graph.

    Attributes:
        name: of the pass, or ``preset NAME``.
        make: the pass with options drawn for this graph; None for a preset.
        after: passes that prepare the graph, e.g. quantize it.
        raw: whether it gets the graph with its dead nodes; the others expect that cleanup ran, as presets run it first.
        every: of how many graphs one is tried: what trains or searches takes seconds.
        again: whether a second run must change nothing.
    """

    name: str
    make: Callable[[Random], Pass] | None = None
    after: tuple[str, ...] = ()
    raw: bool = False
    every: int = 1
    again: bool = True


_PLAIN = [
    "simplify-shapes",
    "fold-constants",
    "fuse-gelu",
    "fuse-normalization",
    "fuse-rotary",
    "fuse-conv",
    "fuse-linear",
    "fuse-gate-up",
    "fuse-group-query-attention",
    "keep-last-logits",
    "split-skip-normalization",
    "equalize-layers",
    "partition-tensor",
]


def _plain(name: str) -> Callable[[Random], Pass]:
    return lambda random: make_pass(name)


TRIALS: list[Trial] = [
    Trial("cleanup", _plain("cleanup"), raw=True),
    *(Trial(name, _plain(name)) for name in _PLAIN),
    Trial(
        "fuse-attention", lambda random: FuseAttention(form=random.choice(["auto", "Attention", "MultiHeadAttention"]))
    ),
    Trial("fuse-skip-normalization", lambda random: FuseSkipNormalization(always=True)),
    Trial("fuse-skip-normalization", lambda random: FuseSkipNormalization(always=True), ("fuse-normalization",)),
    Trial("split-skip-normalization", _plain("split-skip-normalization"), ("fuse-normalization",)),
    Trial("fuse-qkv", _plain("fuse-qkv"), ("fuse-attention",)),
    Trial("pack-qkv", _plain("pack-qkv"), ("fuse-group-query-attention",)),
    Trial("upgrade-opset", _plain("upgrade-opset"), every=3),
    Trial("fuse-normalization", _plain("fuse-normalization"), ("upgrade-opset",), every=3),
    Trial("fuse-attention", _plain("fuse-attention"), ("upgrade-opset", "fuse-rotary"), every=6),
    Trial("fuse-integer-product", _plain("fuse-integer-product")),
    Trial("plan-memory", lambda random: PlanMemory(({"n": 2, "s": 5},), measure=False, time_limit=0.2), every=8),
    Trial("tile-patches", lambda random: TilePatches(batch=2)),
    Trial(
        "partition-devices",
        lambda random: PartitionDevices(machines={"cuda": (1e12, 1e11, 5e-6)}, cost="roofline"),
        every=8,
    ),
    Trial("partition-stages", lambda random: PartitionStages(cost="roofline"), every=8),
    Trial("quantize-weights", lambda random: QuantizeWeights(bits=random.choice([2, 4, 8]), block_size=16), every=4),
    Trial("few-level-weights", lambda random: FewLevelWeights(block_size=32), every=8),
    Trial("quantize-dynamic", lambda random: QuantizeDynamic(per_channel=random.random() < 0.5), every=4),
    Trial("quantize-static", lambda random: QuantizeStatic(products=random.random() < 0.5), every=4),
    Trial("quantize-kv-cache", _plain("quantize-kv-cache"), ("fuse-group-query-attention",)),
    Trial("convert-float16", lambda random: ConvertFloat16(), every=4),
    Trial("smooth-quant", lambda random: SmoothQuant(alpha=0.5, multiply=random.choice(_MULTIPLY)), every=4),
    Trial("clip-outliers", lambda random: ClipOutliers(), every=8),
    Trial("fuse-integer-product", _plain("fuse-integer-product"), ("quantize-static",), every=8),
    Trial("correct-bias", lambda random: CorrectBias(), ("quantize-static",), every=20, again=False),
    Trial("adaround", lambda random: AdaRound(iterations=2), ("quantize-static",), every=40, again=False),
    Trial("quantize-progressive", lambda random: QuantizeProgressive(budget=_LOOSE), every=40),
    Trial("mixed-precision", lambda random: MixedPrecision(block_sizes=(16,)), every=40),
    Trial("prune-sparse", lambda random: PruneSparse(), every=20, again=False),
    Trial("prune-width", lambda random: PruneWidth(multiple=random.choice([1, 4])), every=20, again=False),
    Trial("prune-depth", lambda random: PruneDepth(layers=1), every=20, again=False),
    Trial("prune-adaptive", lambda random: PruneAdaptive(multiple=4), every=60, again=False),
    Trial("distill", lambda random: Distill(steps=2, hidden=1.0), every=60, again=False),
    *(
        Trial(f"preset {name}", None, every={"basic": 6, "cpu-fp32": 6, "cpu-fast": 60}.get(name, 20))
        for name in PRESETS
    ),
    Trial("chain-variadic", _plain("chain-variadic"), every=8),
]


def _width(random: Random) -> PruneWidth:
    return PruneWidth(
        ratio=random.choice([0.1, 0.3, 0.5, 0.8]),
        bytes_target=random.choice([None, None, None, 0.8]),
        what=random.choice(_KINDS),
        method=random.choice(["obs", "magnitude", "activation"]),
        refit=random.random() < 0.5,
        multiple=random.choice([1, 1, 4, 16]),
    )


def _depth(random: Random) -> PruneDepth:
    return PruneDepth(
        layers=random.choice([None, 1, 1, 2]),
        ratio=random.choice([1 / 6, 0.4]),
        method=random.choice(["influence", "greedy", "replace"]),
        what=random.choice(["blocks", "blocks", "blocks", "attention", "ffn"]),
    )


def _sparse(random: Random) -> PruneSparse:
    fixed = random.choice(["sparsity", "sparsity", "sparsity", "pattern", "threshold"])
    return PruneSparse(
        sparsity=random.choice([0.3, 0.5, 0.9]),
        threshold=0.05 if fixed == "threshold" else None,
        method=random.choice(["magnitude", "wanda", "sparsegpt", "admm"]),
        pattern=random.choice(["2:4", "1:4"]) if fixed == "pattern" else None,
        refit=random.random() < 0.5,
        allocation=random.choice(["uniform", "global", "sensitivity"]) if fixed == "sparsity" else "uniform",
        add_bias=random.random() < 0.3,
        target=random.choice([0.0, 0.75, 1.0]),
    )


def _adaptive(random: Random) -> PruneAdaptive:
    return PruneAdaptive(
        bytes=random.choice([0.6, 0.8, 0.95]),
        quality=random.choice([None, None, Budget("relative_error", random.choice([0.1, 1.0]), held_out=0.3)]),
        what=random.choice(_KINDS),
        multiple=random.choice([1, 4]),
    )


def _faster(random: Random) -> PruneAdaptive:
    return PruneAdaptive(speedup=random.choice([1.02, 1.05, 1.1]), multiple=random.choice([1, 4]))


def _distill(random: Random) -> Distill:
    return Distill(steps=random.choice([3, 10]), hidden=1.0, held_out=0.2, lr=random.choice([1e-3, 1e-2]))


_FUSED = ("fuse-normalization", "fuse-attention", "fuse-skip-normalization")
_CHEAP = ("quantize-weights", "quantize-dynamic", "quantize-static", "convert-float16", "smooth-quant", "clip-outliers")

BLOCK_TRIALS: list[Trial] = [
    *(dataclasses.replace(t, every=3 * t.every) for t in TRIALS if t.every == 1 or t.name in _CHEAP),
    Trial("prune-width", _width),
    Trial("prune-width", _width, _FUSED),
    Trial("prune-width", _width, ("prune-depth",), every=2),
    Trial("prune-depth", _depth),
    Trial("prune-depth", _depth, _FUSED),
    Trial("prune-depth", _depth, ("prune-width",), every=2),
    Trial("prune-sparse", _sparse),
    Trial("prune-adaptive", _adaptive, every=2, again=False),
    Trial("prune-adaptive", _adaptive, _FUSED, every=2, again=False),
    Trial("prune-adaptive", _faster, every=40, again=False),
    Trial("distill", _distill, ("prune-sparse",), every=5, again=False),
    Trial("distill", _distill, ("prune-width",), every=5, again=False),
    Trial("distill", _distill, ("prune-depth",), every=10, again=False),
    Trial("distill", _distill, ("quantize-static",), every=10, again=False),
]
"""For graphs of repeated blocks (``repeated.py``), on which these have something to do."""
