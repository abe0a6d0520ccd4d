"""The models of the pruning benchmarks, and the text that they calibrate, train and judge on."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
from encoder_int8 import CALIBRATION, HELD_OUT, sentences
from harness import exported
from lowbit import TEXT, Feeds, sample_of

import onnxlathe as lathe
from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.models.stories import heldout_stories, split_stories
from onnxlathe.runtime.artifact import save

STRANGERS = 40


def minilm(folder: Path) -> ir.Model:
    """MiniLM as cpu-fp32 leaves it."""
    path = folder / "fused.onnx"
    if not path.exists():
        save(lathe.compile(exported("minilm"), "cpu-fp32", speed_gate=False, progress=False).model, path)
    model = load_model(path)
    infer_shapes(model)
    return model


def story_samples(count: int) -> tuple[list[Feeds], list[Feeds]]:
    """For stories260k: stories to calibrate on, and others to judge by."""
    found = [sample_of(story) for story in heldout_stories()]
    return found[::2][:count], found[1::2][:count]


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, in their order."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


def strangers() -> list[str]:
    """The sentences of stories of which ``texts`` gives none, to judge by what calibration has seen nothing of."""
    if not TEXT.exists():
        return []
    openings = {story[:60] for story in heldout_stories()}
    others = [s for s in split_stories(TEXT.read_text()) if not any(opening in s for opening in openings)]
    found = sorted({part for story in others[-STRANGERS:] for part in sentences_of(story) if len(part) > 20})
    return [found[index] for index in np.random.default_rng(2).permutation(len(found))]


def texts(count: int) -> tuple[list[str], list[str]]:
    """Sentences to calibrate on, and others, of the same stories, to judge by."""
    known = sentences()
    held = known[CALIBRATION : CALIBRATION + HELD_OUT]
    rest = known[:CALIBRATION] + known[CALIBRATION + HELD_OUT :]
    if TEXT.exists():
        more = set(sentences_of(TEXT.read_text())) - set(known) - set(strangers())
        extra = sorted(part for part in more if len(part) > 20)
        rest += [extra[index] for index in np.random.default_rng(1).permutation(len(extra))]
    return rest[:count], held
