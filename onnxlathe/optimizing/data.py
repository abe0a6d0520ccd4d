"""The samples of a search: some calibrate, others judge, a few shapes are timed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxlathe.compiler.budget import split
from onnxlathe.compiler.gate import shape_of
from onnxlathe.compiler.scores import LABELS
from onnxlathe.compiler.training.data import Data as Given
from onnxlathe.compiler.training.data import sample_of_rows, training_samples
from onnxlathe.runtime.errors import ModelError
from onnxlathe.runtime.feeds import Feeds, load_feeds, make_feeds
from onnxlathe.runtime.generation.causal_lm import MASK, TOKENS, CausalLM

_SHAPES = 4  # timed at most
_NEW = 16  # tokens timed after a prompt
_JUDGED = 8  # made samples
_WINDOW, _ROWS = 128, 8  # of streams of tokens
_PROMPT = 128


@dataclasses.dataclass(frozen=True)
class Timed:
    """What one timing runs.

    Attributes:
        label: its shape.
        weight: how many of the user's samples it stands for.
        feeds: the model's inputs; for a decoder ``prompt`` int64 [batch, tokens] and ``new`` (tokens to add).
    """

    label: str
    weight: float
    feeds: Feeds


@dataclasses.dataclass(frozen=True)
class SearchData:
    """Samples apart by what they are for.

    Attributes:
        calibration: what passes see; empty: nothing real is known.
        judged: what decides on quality, with ``labels`` where the user gave them.
        timed: shapes that decide on speed.
        made: nothing was given: the samples are random, and quality on them means little.
        same: there was one sample only, which calibrates and judges.
    """

    calibration: list[Feeds]
    judged: list[Feeds]
    timed: list[Timed]
    made: bool = False
    same: bool = False

    @property
    def labelled(self) -> bool:
        """Whether all judged samples have labels."""
        return all(LABELS in sample for sample in self.judged)

    @property
    def rows(self) -> int:
        """How many rows the calibration samples have together."""
        return sum(_rows_of(sample) for sample in self.calibration)

    def save(self, folder: Path) -> None:
        """Writes ``calibration/``, and ``timed-N.npz`` in order, for the processes that use them."""
        (folder / "calibration").mkdir()
        for number, sample in enumerate(self.calibration):
            _save(folder / "calibration" / f"{number:06}.npz", sample)
        for number, timed in enumerate(self.timed):
            _save(folder / f"timed-{number}.npz", timed.feeds)


def gather(
    model: ir.Model,
    samples: Given | None,
    *,
    decoder: CausalLM | None,
    held_out: float,
    judged: Iterable[Mapping[str, np.ndarray[Any, Any]]] | None,
    sizes: Sequence[Mapping[str, int]],
    made_timed: list[Feeds],
    seed: int,
) -> SearchData:
    """Reads the user's samples and takes them apart; or makes some.

    Args:
        model: the model they are for.
        samples: what the user gave; None for nothing.
        decoder: how the model continues texts; None for other models.
        held_out: share of the samples that judge.
        judged: samples to judge on instead; then all others calibrate.
        sizes: sizes of symbolic dims to time; empty: the samples' own shapes.
        made_timed: what to time where nothing is known.
        seed: of the split and of made samples.

    Raises:
        ModelError: a sample does not fit the model, or there is none.
    """
    if samples is None:
        made = make_feeds(model, seed, _JUDGED)
        return SearchData([], made, _timed(model, decoder, [], sizes, made_timed, seed), made=True)
    found = read(model, samples)
    if judged is not None:
        calibrating, judging = found, read(model, list(judged))
    else:
        calibrating, judging = (list(part) for part in split(found, held_out, seed))
    timed = _timed(model, decoder, found, sizes, made_timed, seed)
    bare = [_without_labels(sample) for sample in calibrating]
    if decoder is not None:  # there they are the next tokens, which the samples hold anyway
        judging = [_without_labels(sample) for sample in judging]
    return SearchData(bare, judging, timed, same=judged is None and len(found) == 1)


def read(model: ir.Model, samples: Given) -> list[Feeds]:
    """All samples, checked; those of a language model may be streams of tokens, or ``input_ids`` alone."""
    inputs = {value.name or "": value for value in model.graph.inputs if not value.is_initializer()}
    if isinstance(samples, (str, Path)) and TOKENS in inputs:
        samples = load_feeds(samples)
    if isinstance(samples, Iterable) and not isinstance(samples, (str, Path)):
        samples = [_completed(item, inputs) for item in samples]
    found = training_samples(samples, model, _WINDOW, _ROWS)
    if not found:
        raise ModelError("There are no samples.", "Give at least one, or leave samples out.")
    return found


def _completed(sample: Any, inputs: Mapping[str, ir.Value]) -> Any:
    """A sample of nothing but tokens, and perhaps their mask, with the other inputs as a text from its start has."""
    if not isinstance(sample, Mapping) or not {TOKENS} <= set(sample) <= {TOKENS, MASK} or set(inputs) <= set(sample):
        return sample
    ids = np.asarray(sample[TOKENS])
    mask = np.asarray(sample.get(MASK, np.ones_like(ids))).astype(bool)
    if TOKENS not in inputs or ids.ndim != 2 or ids.dtype.kind not in "iu" or mask.shape != ids.shape:
        return sample
    rows = [row[kept] for row, kept in zip(ids, mask, strict=True)]
    return _without_labels(sample_of_rows(rows, inputs))


def _timed(
    model: ir.Model,
    decoder: CausalLM | None,
    samples: list[Feeds],
    sizes: Sequence[Mapping[str, int]],
    made: list[Feeds],
    seed: int,
) -> list[Timed]:
    if decoder is not None:
        return _prompts(decoder, samples, sizes, seed)
    if sizes:
        chosen = [make_feeds(model, seed, 1, dict(size))[0] for size in sizes]
        return [Timed(shape_of(sample), 1.0, sample) for sample in chosen]
    if not samples:
        return [Timed(shape_of(sample), 1.0, sample) for sample in made]
    bare = [_without_labels(sample) for sample in samples]
    return [Timed(shape_of(bare[at]), weight, bare[at]) for at, weight in representatives(bare)]


def representatives(samples: Sequence[Feeds]) -> list[tuple[int, float]]:
    """Numbers of the samples to time, and how many each stands for.

    One of each shape where there are up to four; else the samples are put in order of size and divided into four
    parts, and the middle of each is taken.
    """
    shapes: dict[Any, list[int]] = {}
    for number, sample in enumerate(samples):
        shapes.setdefault(tuple((name, array.shape) for name, array in sorted(sample.items())), []).append(number)
    if len(shapes) <= _SHAPES:
        return [(numbers[0], float(len(numbers))) for numbers in shapes.values()]
    order = sorted(range(len(samples)), key=lambda number: sum(array.size for array in samples[number].values()))
    parts = np.array_split(np.array(order), _SHAPES)
    return [(int(part[len(part) // 2]), float(len(part))) for part in parts]


def _prompts(decoder: CausalLM, samples: list[Feeds], sizes: Sequence[Mapping[str, int]], seed: int) -> list[Timed]:
    """Texts to continue: of the lengths asked for, else one as long as the samples' median."""
    texts = [row for sample in samples for row in _rows(sample)]
    length = int(statistics.median(map(len, texts))) if texts else _PROMPT
    rng = np.random.default_rng(seed)
    stock = np.concatenate(texts) if texts else rng.integers(0, decoder.vocabulary or 2, 4 * _PROMPT)
    found: list[Timed] = []
    for size in sizes or ({"batch": 1, "sequence": length},):
        batch, wanted = size.get("batch", 1), size.get("sequence", length)
        longest = (decoder.positions or 2 * wanted + _NEW) - _NEW
        tokens = max(1, min(wanted, longest))
        ids = np.resize(stock, (batch, tokens)).astype(np.int64)
        rows = f", {batch} rows" if batch > 1 else ""
        found.append(Timed(f"{tokens}{rows}", 1.0, {"prompt": ids, "new": np.array(_NEW)}))
    return found


def _rows(sample: Feeds) -> list[np.ndarray[Any, Any]]:
    ids = sample[TOKENS]
    mask = sample.get(MASK, np.ones_like(ids))[:, -ids.shape[1] :].astype(bool)
    return [row[kept] for row, kept in zip(ids, mask, strict=True) if kept.any()]


def _rows_of(sample: Feeds) -> int:
    return max((array.shape[0] for array in sample.values() if array.ndim), default=1)


def _without_labels(sample: Feeds) -> Feeds:
    return {name: array for name, array in sample.items() if name != LABELS}


def _save(path: Path, sample: Feeds) -> None:
    arrays: dict[str, Any] = dict(sample)
    np.savez(path, **arrays)
