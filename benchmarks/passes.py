"""What each pass is worth by itself: a pipeline on a real model without the pass, and the same pipeline with it.

    python benchmarks/passes.py [--only fuse-gelu quantize-static] [--threads 2]

Speed is the pipeline's result without the pass over that with it, both in ONNX Runtime with its default optimizations,
in turns in one process (above 1: the pass gains); bytes and nodes are with / without. The error is the largest of any
output, relative, against the original model on held-out inputs. Pages of the documentation draw these figures
(``docs/pass_pages.py``). Passes whose worth is no such figure are measured elsewhere, see ``ELSEWHERE``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from cnn_int8 import digits
from encoder_int8 import batches, random_tokens, sentences
from harness import HERE, exported, write_result
from lowbit import samples as stories
from rich.console import Console
from rich.table import Table

import onnxlathe as lathe
from onnxlathe import passes
from onnxlathe.compiler.gate import measure_speed
from onnxlathe.compiler.graph import weight_bytes
from onnxlathe.compiler.verify import compare_tokens, run_reference
from onnxlathe.models.zoo import build

Feeds = dict[str, np.ndarray]
Steps = Sequence[str | passes.Pass]
DATA = HERE.parent.parent / "shared" / "data"
CLEAN: Steps = ("upgrade-opset", "cleanup", "simplify-shapes", "fold-constants")
FUSED: Steps = (*CLEAN, "fuse-gelu", "fuse-normalization", "fuse-attention", "fuse-linear")
CACHED: Steps = (*CLEAN, "fuse-gelu", "fuse-normalization", "fuse-group-query-attention")
INT8: Steps = ("quantize-static", "fuse-integer-product", "cleanup")
ELSEWHERE = {
    "convert-float16": "cuda",
    "distill": "distillation",
    "mixed-precision": "lowbit",
    "partition-stages": "distributed",
    "partition-tensor": "distributed",
    "plan-memory": "memory",
    "prune-adaptive": "distillation_minilm",
    "prune-depth": "pruning_structured",
    "prune-sparse": "pruning_sparse",
    "prune-width": "pruning_structured",
}
# Passes that no benchmark measures: what stands in for a figure.
TESTED = {
    "chain-variadic": "tests/test_chain_variadic.py",
    "few-level-weights": "tests/test_few_level_weights.py",
    "fuse-rotary": "tests/test_fuse_rotary.py",
    "partition-devices": "tests/test_partition_devices.py",
    "quantize-kv-cache": "tests/test_quantize_kv_cache.py",
    "quantize-progressive": "tests/test_quantize_progressive.py",
    "tile-patches": "tests/test_tile_patches.py",
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with what calibrates, judges and times it."""

    model: ir.Model
    calibration: Sequence[Feeds]
    judged: Sequence[Feeds]
    timed: Feeds


@dataclasses.dataclass(frozen=True)
class Case:
    """Where a pass is measured.

    Attributes:
        subject: name of the model.
        before: passes in front of it, in both pipelines.
        after: passes behind it, in both pipelines.
        step: the pass, where its default options are not what is measured.
    """

    subject: str
    before: Steps = CLEAN
    after: Steps = ()
    step: passes.Pass | None = None


CASES = {
    "cleanup": Case("minilm", ()),
    "simplify-shapes": Case("stories260k", ("cleanup",)),
    "fold-constants": Case("ultraface", ()),
    "upgrade-opset": Case("minilm", (), ("cleanup", "fuse-attention")),
    "fuse-gelu": Case("stories260k"),
    "fuse-normalization": Case("stories260k"),
    "fuse-attention": Case("minilm"),
    "fuse-linear": Case("mnist"),
    "fuse-qkv": Case("minilm", (*CLEAN, "fuse-gelu", "fuse-normalization", "fuse-attention")),
    "fuse-skip-normalization": Case("minilm", FUSED),
    "split-skip-normalization": Case("minilm", FUSED),
    "fuse-conv": Case("ultraface"),
    "fuse-group-query-attention": Case("stories260k"),
    "pack-qkv": Case("llama-135m", CACHED),
    "fuse-gate-up": Case("llama-135m", CACHED),
    "keep-last-logits": Case("stories260k", CACHED),
    "quantize-dynamic": Case("minilm", FUSED),
    "quantize-static": Case("minilm", FUSED),
    "fuse-integer-product": Case("minilm", (*FUSED, "quantize-static")),
    "smooth-quant": Case("minilm", FUSED, INT8),
    "equalize-layers": Case("mnist", ("upgrade-opset", "cleanup"), INT8),
    "clip-outliers": Case("minilm", FUSED, INT8),
    "adaround": Case("mnist", ("upgrade-opset", "cleanup", "quantize-static")),
    "correct-bias": Case("minilm", (*FUSED, "quantize-static")),
    "quantize-weights": Case("llama-135m", CACHED),
}


@functools.cache
def minilm() -> Subject:
    """The sentence encoder; real sentences to calibrate and to judge, (1,128) to time."""
    texts = sentences()
    return Subject(exported("minilm"), batches(texts[:64], 4), batches(texts[64:128], 4), random_tokens((1, 128)))


@functools.cache
def stories260k() -> Subject:
    """The small language model; whole stories with an empty cache, one of them to time."""
    calibration, judged = stories(24)
    return Subject(lathe.export_causal_lm(build("stories260k").module), calibration, judged, judged[0])


@functools.cache
def llama_135m() -> Subject:
    """A decoder of a usual size with random weights: for speed, one token after 128; its error says little."""
    model = lathe.export_causal_lm(build("llama-135m").module)
    rng = np.random.default_rng(0)
    layers = sum(value.name.endswith(".key") for value in model.graph.inputs if value.name)

    def sample(past: int, tokens: int) -> Feeds:
        feeds = {
            "input_ids": rng.integers(0, 32000, (1, tokens)),
            "attention_mask": np.ones((1, past + tokens), np.int64),
            "position_ids": np.arange(past, past + tokens)[None],
        }
        for layer in range(layers):
            for kind in ("key", "value"):
                cache = rng.standard_normal((1, 3, past, 64)) * 0.1
                feeds[f"past_key_values.{layer}.{kind}"] = cache.astype(np.float32)
        return feeds

    prompt = sample(0, 32)
    return Subject(model, [prompt], [prompt], sample(128, 1))


@functools.cache
def ultraface() -> Subject:
    """A face detector; noise as image, as only exact passes are measured on it."""
    noise = np.random.default_rng(0)
    images = [{"input": noise.standard_normal((1, 3, 240, 320)).astype(np.float32)} for _ in range(2)]
    return Subject(lathe.load(DATA / "ultraface" / "version-RFB-320.onnx"), images, images, images[0])


@functools.cache
def mnist() -> Subject:
    """The digits' network; digits to calibrate and others to judge."""
    images, _ = digits(DATA / "mnist")
    feeds = [{"Input3": images[index : index + 1]} for index in range(600)]
    return Subject(lathe.load(DATA / "mnist" / "mnist_conv.onnx"), feeds[:200], feeds[200:], feeds[0])


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "minilm": minilm,
    "stories260k": stories260k,
    "llama-135m": llama_135m,
    "ultraface": ultraface,
    "mnist": mnist,
}


def measure(name: str, case: Case, threads: int) -> dict[str, Any]:
    """The figures of one pass; ``applied`` says whether it found something to do."""
    subject = SUBJECTS[case.subject]()
    step = case.step or passes.PASSES[name]()
    without, with_it = (
        lathe.compile(
            subject.model, list(steps), calibration=subject.calibration, threads=threads, speed_gate=False,
            progress=False,
        )
        for steps in ((*case.before, *case.after), (*case.before, step, *case.after))
    )  # fmt: skip
    record = next(item for item in with_it.report.passes[len(case.before) :] if item.name == step.name)
    expected = run_reference(subject.model, subject.judged)
    declared = [expected, [step.expected(result) for result in expected]]
    errors = [
        compare_tokens(subject.judged, wanted, run_reference(out.model, subject.judged))[0]
        for wanted, out in zip(declared, (without, with_it), strict=True)
    ]
    speed = measure_speed(
        without.model,
        with_it.model,
        [subject.timed],
        device="cpu",
        threads=threads,
        config_before=without.ort_config,
        config_after=with_it.ort_config,
    )
    sizes = [weight_bytes(out.model) for out in (without, with_it)]
    nodes = [sum(out.report.ops_after.values()) for out in (without, with_it)]
    return {
        "model": case.subject,
        "before": [str(item) for item in case.before],
        "after": [str(item) for item in case.after],
        "applied": record.status == "applied",
        "speed": speed.ratio,
        "noise": speed.noise,
        "bytes": sizes[1] / sizes[0],
        "nodes": nodes,
        "errors": errors,
    }


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    table = Table(title=f"Each pass by itself, CPU, {options.threads} threads")
    for column in ("pass", "model", "speed", "bytes", "nodes", "error without", "error with"):
        table.add_column(column, justify="left" if column in ("pass", "model") else "right")
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        if options.only and name not in options.only:
            continue
        try:
            row = results[name] = measure(name, case, options.threads)
        except lathe.LatheError as error:
            results[name] = {"model": case.subject, "failure": str(error)}
            table.add_row(name, case.subject, str(error)[:60])
            continue
        speed = f"{row['speed']:.2f} ±{row['noise']:.2f}" if row["applied"] else "nothing to do"
        errors = [f"{error:.1e}" for error in row["errors"]]
        table.add_row(name, case.subject, speed, f"{row['bytes']:.2f}", "{} -> {}".format(*row["nodes"]), *errors)
    Console(width=120).print(table)
    if not options.only:
        print(
            "wrote",
            write_result(
                "passes", options.threads, {"passes": results, "elsewhere": ELSEWHERE, "tested": TESTED}, {"ours"}
            ),
        )


if __name__ == "__main__":
    main()
