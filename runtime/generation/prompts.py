"""Prompts given to ``generate``: read, checked, and kept with what is generated for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ModelError

Array = np.ndarray[Any, Any]
TokenIds = Array | Sequence[int]


@dataclasses.dataclass
class Row:
    """A prompt and its continuation.

    Attributes:
        index: its place among the prompts given.
        prompt: int64 token ids.
        rng: draws this row's tokens, so that they do not depend on the other rows.
        tokens: the new token ids.
        done: no more are wanted.
    """

    index: int
    prompt: Array
    rng: np.random.Generator
    tokens: list[int] = dataclasses.field(default_factory=list[int])
    done: bool = False


def read_prompts(prompts: Any) -> tuple[list[Array], bool]:
    """Token ids as int64 arrays [sequence], and whether one prompt alone was given.

    Raises:
        ModelError: text, no prompt, an empty prompt, or something that is not whole numbers in one dimension.
    """
    if isinstance(prompts, np.ndarray):
        single = prompts.ndim == 1
    elif isinstance(prompts, Sequence) and not isinstance(prompts, (str, bytes)):
        single = len(prompts) > 0 and all(np.ndim(item) == 0 and not isinstance(item, str) for item in prompts)
    else:
        raise ModelError(
            f"generate got a {type(prompts).__name__}, not token ids.",
            "Encode the text first: onnxlathe.runtime.generation.tokenizer.load_tokenizer(path).encode(text).",
        )
    items: list[Any] = [prompts] if single else list(prompts)
    if not items:
        raise ModelError("generate got no prompt.", "Give token ids [sequence], or a list of them.")
    return [_read(item, number) for number, item in enumerate(items)], single


def check_prompts(prompts: Sequence[Array], vocabulary: int | None, limit: int | None, fixed: bool) -> None:
    """Checks token ids and lengths before anything runs.

    Raises:
        ModelError: names the prompt.
    """
    for number, prompt in enumerate(prompts):
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            known = f", the model knows 0 to {vocabulary - 1}" if vocabulary is not None else ""
            raise ModelError(
                f"Prompt {number} has the token id {low if low < 0 else high}{known}.",
                "Use the tokenizer that belongs to the model.",
            )
        if limit is not None and len(prompt) >= limit:
            what = f"max_length is {limit}" if fixed else f"the model knows {limit} positions"
            raise ModelError(
                f"Prompt {number} has {len(prompt)} tokens and leaves no room for new ones: {what}.",
                "Shorten it, or raise max_length." if fixed else "Shorten it.",
            )


def _read(prompt: Any, number: int) -> Array:
    try:
        array = np.asarray(prompt)
    except ValueError as error:
        raise ModelError(f"Prompt {number} cannot be read: {error}.", "Give token ids [sequence].") from error
    if array.ndim != 1:
        raise ModelError(f"Prompt {number} has the shape {list(array.shape)}.", "Give token ids [sequence].")
    if array.size == 0:
        raise ModelError(
            f"Prompt {number} is empty.", "Give at least one token, such as the one every text begins with."
        )
    if array.dtype.kind not in "iu":
        raise ModelError(
            f"Prompt {number} has dtype {array.dtype}, not integers.", "Give token ids, not text or scores."
        )
    return array.astype(np.int64)
