"""``lathe.optimize``: the pipeline that suits a model, found by trying."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import onnx
import onnx_ir as ir

from onnxlathe.api import compile, progress_sink, timed_samples, to_graph
from onnxlathe.compiler.budget import Budget, Metric, Score
from onnxlathe.compiler.graph import weight_bytes
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.report import Speed
from onnxlathe.compiler.scores import LABELS
from onnxlathe.compiler.training.data import Data
from onnxlathe.compiler.verify import check_model
from onnxlathe.reporting import call_text
from onnxlathe.runtime.artifact import read_config, save
from onnxlathe.runtime.errors import LatheError, ModelError
from onnxlathe.runtime.generation.causal_lm import CausalLM, read_causal_lm
from onnxlathe.runtime.targets import device_of

from .candidates import Goal, Progress, Subject
from .data import SearchData, gather
from .judge import Judge, default_metric, metric_words
from .kept import Kept, open_kept, search_key
from .optimized import Optimized
from .processes import Race
from .search import Searcher
from .trials import ORIGINAL, Search, Trial

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def optimize(
    model: ir.Model | onnx.ModelProto | str | os.PathLike[str] | torch.nn.Module,
    goal: Goal = "speed",
    max_drop: float | str | Budget = 0.01,
    *,
    samples: Data | None = None,
    metric: Metric | Score | None = None,
    sizes: Sequence[Mapping[str, int]] = (),
    time_budget: float | str = 1200.0,
    target: str = "cpu",
    threads: int = 0,
    args: tuple[Any, ...] | None = None,
    seed: int = 0,
    progress: bool | Callable[[str], None] = True,
) -> Optimized:
    """Tries the pipelines that suit a model and returns the best that keeps what is asked for.

    Each is compiled in a process of its own on three quarters of the samples, judged on the others against the model as
    it was, and timed against it in turns, each side alone in its process. The best is measured again, longer. Never
    returned: what loses more than ``max_drop``, or is slower than the model as it was; where nothing qualifies the
    model is returned as it was. Results are kept (``optimizing/kept.py``), so a search that was stopped goes on.

    Speed is the geometric mean over the samples: of the ratios at their shapes, or at four sizes where there are more.
    Of a language model with a cache it is that of a prompt as long as the samples' median and of the tokens after it,
    in ``Session.generate``.

    Args:
        model: as ``compile`` takes it. Not changed.
        goal: ``"speed"``, ``"size"`` (bytes of the weights), or ``"balanced"`` (the geometric mean of times as fast and
            times as small).
        max_drop: the most that may be lost: a share (0.01 or ``"1%"``) in the metric's unit, see ``docs/goal.md``; or a
            ``Budget``, or its text (``"sqnr>=40"``), which says the metric too.
        samples: ``{input name: array}`` items, an ``.npz`` file or a folder of them; with ``labels`` (integers) for
            accuracy. Of a language model also streams of tokens, or ``input_ids`` alone. None: made, and only
            pipelines without calibration are tried.
        metric: one of ``Budget``'s, or a callable ``score(samples, outputs)`` whose fall counts. None: accuracy where
            all samples have labels, KL of the next token for language models with a cache, else the pooled cosine.
        sizes: sizes of symbolic dims to time instead of the samples' shapes, e.g. ``[{"batch": 1, "sequence": 128}]``.
        time_budget: seconds, or a text such as ``"20m"``.
        target: as of ``compile``.
        threads: intra-op threads of the target, 0 for ONNX Runtime's default.
        args: example inputs, for a torch module.
        seed: of the split, of made samples and of passes.
        progress: show what is being done on a terminal; or a function that is told.

    Raises:
        LatheError: an unknown goal, or a ``max_drop`` or ``time_budget`` that cannot be read.
        ModelError: the model or the samples cannot be used.
        RuntimeUnavailable: the target is not there.
    """
    start, call = time.monotonic(), call_text(optimize, locals())
    if goal not in get_args(Goal):
        raise LatheError(f"There is no goal {goal!r}.", f"Goals: {', '.join(get_args(Goal))}.")
    budget, named = read_budget(max_drop, metric)
    deadline = start + read_seconds(time_budget)
    device = device_of(target)
    graph = to_graph(model, args)
    infer_shapes(graph)
    check_model(graph)
    decoder = _decoder(graph)
    with progress_sink(progress) as tell:
        tell("reading the samples")
        data = gather(
            graph, samples, decoder=decoder, held_out=budget.held_out, judged=budget.samples, sizes=sizes,
            made_timed=[] if sizes or samples is not None or decoder else timed_samples(graph, seed, device), seed=seed,
        )  # fmt: skip
        if not named:
            chosen = default_metric(decoder is not None, data.labelled)
            budget = dataclasses.replace(budget, metric=chosen)
        key = _key(graph, data, budget, target, threads, seed)
        with open_kept(key) as kept:
            original = _files(graph, model, data, kept)
            judge = Judge(original, data.judged, budget, decoder is not None, device, threads)
            subject = Subject.of(graph, decoder is not None, device, data.rows)
            searcher = Searcher(
                original, data, Progress(subject, goal, budget, weight_bytes(graph)), judge,
                Race(original, device, threads), kept, target, threads, seed, deadline, tell,
            )  # fmt: skip
            best = searcher.run()
            search = Search(
                goal, metric_words(budget, decoder is not None, judge.outputs), budget.limit, searcher.trials,
                best.name if best else ORIGINAL, weight_bytes(graph), len(judge.samples), data.made,
                time.monotonic() - start, [*_remarks(data, judge, best, goal), *searcher.notes],
            )  # fmt: skip
            if best is None:
                out = compile(graph, [], verify=False, progress=False, target=device, threads=threads)
                result = Optimized(graph, out.report, read_config(graph.metadata_props), search=search)
            else:
                result = Optimized.read(kept.model(best.passes), search)
                result.report.speed = Speed(min(best.speeds.values()), best.noise, best.speeds)
    result.report.source = str(model) if isinstance(model, (str, os.PathLike)) else type(model).__name__
    result.report.environment["call"] = call
    result.report.search = search.to_dict()
    result.sample = {name: array for name, array in data.judged[0].items() if name != LABELS}
    return result


def read_budget(max_drop: float | str | Budget, metric: Metric | Score | None) -> tuple[Budget, bool]:
    """What ``max_drop`` and ``metric`` say, and whether they say the metric.

    Raises:
        LatheError: they cannot be read, or contradict each other.
    """
    if isinstance(max_drop, str) and re.search("[<>]=", max_drop):
        try:
            max_drop = Budget.parse(max_drop)
        except ValueError as error:
            raise LatheError(f"The largest drop cannot be read: {error}.", 'Give "1%", or "cosine<=0.01".') from error
    if isinstance(max_drop, Budget):
        if metric is not None:
            raise LatheError("Both max_drop and metric say what is measured.", "Give one of them.")
        return max_drop, True
    share = _share(max_drop)
    try:
        return Budget(metric or "pooled_cosine", share), metric is not None
    except ValueError as error:
        raise LatheError(f"The metric cannot be used: {error}.", "See lathe.Budget.") from error


def read_seconds(text: float | str) -> float:
    """Seconds from a number or a text such as ``90s``, ``20m``, ``1.5h``.

    Raises:
        LatheError: it is neither, or leaves no time.
    """
    number, unit = re.fullmatch(r"\s*(.*?)\s*([a-z]*)\s*", str(text)).groups()  # pyright: ignore[reportOptionalMemberAccess]
    try:
        seconds = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        seconds = math.nan
    if not seconds > 0 or math.isinf(seconds):
        raise LatheError(f"The time budget {text!r} is no time.", "Give seconds, or a text such as 90s, 20m or 1h.")
    return seconds


def _share(max_drop: float | str) -> float:
    text = str(max_drop).strip()
    try:
        share = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        share = math.nan
    if not 0.0 <= share < 1.0:
        raise LatheError(
            f"The largest drop {max_drop!r} is no share of 1.",
            'Give one such as "1%" or 0.01, or a budget such as "sqnr>=40".',
        )
    return share


def _decoder(graph: ir.Model) -> CausalLM | None:
    try:
        return read_causal_lm(graph)
    except ModelError:
        return None


def _key(graph: ir.Model, data: SearchData, budget: Budget, target: str, threads: int, seed: int) -> str:
    everything = [*data.calibration, {}, *data.judged, {}, *(timed.feeds for timed in data.timed)]
    weights = [timed.weight for timed in data.timed]
    metric = "a function" if callable(budget.metric) else budget.metric
    return search_key(graph, everything, metric, weights, target, threads, seed)


def _files(graph: ir.Model, model: Any, data: SearchData, kept: Kept) -> Path:
    """Writes what the processes read, if an earlier search did not; returns where the original lies."""
    if not (kept.folder / "samples").is_dir():
        with tempfile.TemporaryDirectory(dir=kept.folder) as draft:
            data.save(Path(draft))
            shutil.copytree(draft, kept.folder / "samples", dirs_exist_ok=True)
    if isinstance(model, (str, os.PathLike)):
        return Path(model)
    original = kept.folder / "original.onnx"
    return original if original.exists() else save(graph, original)


def _remarks(data: SearchData, judge: Judge, best: Trial | None, goal: str) -> list[str]:
    notes: list[str] = []
    if data.made:
        notes.append(
            "No samples were given: quality was judged on made-up inputs, which says little about real ones, and "
            "pipelines that calibrate were not tried. Give samples of your own (--samples, samples=...)."
        )
    if data.same:
        notes.append("There is one sample only: it was judged on what it was calibrated on. Give more.")
    if len(judge.samples) < len(data.judged):
        notes.append(f"Only {len(judge.samples)} of {len(data.judged)} samples judge: their outputs are large.")
    if best is None:
        notes.append(
            "Nothing that was tried to its end is both within the limit and not slower: "
            "the model is returned as it was."
        )
    elif best.exact:
        notes.append(
            f"Nothing else that was tried within the limit is better for {goal}: "
            "the original is returned, fused exactly."
        )
    return notes
