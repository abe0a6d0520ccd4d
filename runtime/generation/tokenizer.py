"""Text to token ids and back, by the ``tokenizers`` library; text as it streams."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, RuntimeUnavailable
from ..files import write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Who keeps the ids that end a text, and under which keys.
_EOS_FILES = {
    "generation_config.json": ("eos_token_id",),
    "config.json": ("eos_token_id",),
    "genai_config.json": ("model", "eos_token_id"),
}


def tokenizer_file(model: str | os.PathLike[str]) -> Path | None:
    """The tokenizer that lies beside a model: ``<model file>.tokenizer.json``, else ``tokenizer.json``."""
    path = Path(model)
    candidates = [path.with_name(f"{path.name}.{FILE}"), path.with_name(FILE)]
    return next((file for file in candidates if file.is_file()), None)


def put_tokenizer(content: bytes, model: str | os.PathLike[str]) -> Path:
    """Writes a tokenizer beside ``model``, under the first name that holds no other tokenizer; returns its path."""
    path = Path(model)
    common = path.with_name(FILE)
    file = path.with_name(f"{path.name}.{FILE}") if common.exists() and common.read_bytes() != content else common
    if not file.exists() or file.read_bytes() != content:
        write_atomically(file, content)
    return file


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Loads a ``tokenizer.json``: that file, the one in that folder, or the one beside that ``.onnx`` (``.gz``).

    Raises:
        RuntimeUnavailable: the library is not installed.
        ModelError: there is no such file, or it is not a tokenizer.
    """
    if importlib.util.find_spec("tokenizers") is None:
        raise RuntimeUnavailable("tokenizers is not installed.", 'Install it with: pip install "onnxlathe[hf]"')
    from tokenizers import Tokenizer

    file: Path | None = Path(path)
    if file.is_dir():
        file = file / FILE
    elif file.suffix in (".onnx", ".gz"):
        file = tokenizer_file(file)
    if file is None or not file.is_file():
        raise ModelError(
            f"There is no tokenizer for {path}.",
            f"Put the {FILE} that belongs to the model into its folder, or name it with --tokenizer.",
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(
            f"{file} is not a tokenizer: {str(error).splitlines()[0]}", "It must be a file of the tokenizers library."
        ) from error


def eos_beside(model: str | os.PathLike[str]) -> tuple[int, ...]:
    """The token ids that end a text, by the configuration files beside a model of others; empty if none says."""
    for name, keys in _EOS_FILES.items():
        value: Any = _read_json(Path(model).with_name(name))
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None  # pyright: ignore[reportUnknownMemberType]
        if value is not None:
            return tuple(value) if isinstance(value, list) else (int(value),)  # pyright: ignore[reportUnknownArgumentType]
    return ()


class TextStream:
    """Turns token ids that come one by one into text, in whole characters.

    The pieces, with what ``finish`` gives, are ``tokenizer.decode`` of all the ids. Text is kept back while it may
    change: at the start of a character of several bytes, and in a run of byte tokens (``<0xE4>``), of which one wrong
    byte makes all of them wrong. The library's ``DecodeStream`` raises at such bytes, and loses the end.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Special tokens are left out of texts; a run of bytes goes on over them.
        self._silent = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self._ids: list[int] = []  # from the last token on before which nothing can change
        self._known = 0  # how many of them were given out
        self._text = ""  # and what they read

    def push(self, token: int) -> str:
        """Takes a token, gives the text that is now certain."""
        self._ids.append(token)
        if token in self._silent or (self._tokenizer.id_to_token(token) or "").startswith("<0x"):
            return ""
        text = self._decode(self._ids)
        return "" if text.endswith(_UNFINISHED) else self._give(text)

    def finish(self) -> str:
        """The rest."""
        return self._give(self._decode(self._ids))

    def _give(self, text: str) -> str:
        piece = text[len(self._text) :]
        # Decoders treat the first token differently (no space before it), so one that reads as text stays in front.
        tail = self._decode(self._ids[self._known :])
        if tail:
            self._ids, text = self._ids[self._known :], tail
        self._known, self._text = len(self._ids), text
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
