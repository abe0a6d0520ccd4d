"""Tokenizers beside models, and text that streams in whole characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxlathe as lathe
from onnxlathe.models.stories import heldout_text, stories_tokenizer, tokenizer_json
from onnxlathe.runtime.generation.tokenizer import TextStream, eos_beside, load_tokenizer, put_tokenizer, tokenizer_file

tokenizers = pytest.importorskip("tokenizers")
SPECIAL = ["<s>", "</s>"]


def byte_level() -> Any:
    """As GPT-2, Llama 3 and Qwen have it."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    made.train_from_iterator([heldout_text()[:20000]], trainer)
    return made


def metaspace() -> Any:
    """As sentencepiece has it."""
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([heldout_text()[:20000]], trainer)
    return made


@pytest.mark.parametrize("make", [stories_tokenizer, byte_level, metaspace])
def test_pieces_add_up_to_the_text(make: Any) -> None:
    """For any token ids, also bytes that are no characters; and what was given out never changes."""
    tokenizer, rng = make(), np.random.default_rng(0)
    for number in range(400):
        ids = [1] * (number % 3) + rng.integers(tokenizer.get_vocab_size(), size=number % 25).tolist()
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("make", [stories_tokenizer, byte_level])
def test_pieces_are_whole_characters_and_come_at_once(make: Any) -> None:
    tokenizer = make()
    text = "A 世界, é! Once upon a time there was"
    stream = TextStream(tokenizer)
    ids = tokenizer.encode(text).ids
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert all(pieces[-4:]), "words do not wait"


def test_tokenizer_json_starts_texts() -> None:
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json())
    assert tokenizer.encode("Once").ids == [1, *stories_tokenizer().encode("Once").ids]
    assert tokenizer.decode(tokenizer.encode("Once upon").ids) == "Once upon"


def test_files_beside_a_model(tmp_path: Path) -> None:
    model = tmp_path / "a.onnx"
    assert tokenizer_file(model) is None
    with pytest.raises(lathe.ModelError, match=r"no tokenizer for .*a\.onnx\. Put the tokenizer\.json.*--tokenizer"):
        load_tokenizer(model)
    content = tokenizer_json().encode()
    assert put_tokenizer(content, model) == put_tokenizer(content, model) == tmp_path / "tokenizer.json"
    assert load_tokenizer(model).get_vocab_size() == load_tokenizer(tmp_path).get_vocab_size() == 512
    other = byte_level().to_str().encode()
    assert put_tokenizer(other, tmp_path / "b.onnx") == tmp_path / "b.onnx.tokenizer.json"
    assert (tmp_path / "tokenizer.json").read_bytes() == content, "another model's tokenizer stays"
    assert load_tokenizer(tmp_path / "b.onnx").get_vocab_size() == 400
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(lathe.ModelError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "ids"),
    [
        ("generation_config.json", '{"eos_token_id": [2, 7]}', (2, 7)),
        ("config.json", '{"eos_token_id": 3}', (3,)),
        ("genai_config.json", '{"model": {"eos_token_id": 4}}', (4,)),
        ("config.json", "[", ()),
        ("config.json", '{"eos_token_id": null}', ()),
    ],
)
def test_ends_of_texts_beside_a_model(tmp_path: Path, name: str, content: str, ids: tuple[int, ...]) -> None:
    (tmp_path / name).write_text(content)
    assert eos_beside(tmp_path / "model.onnx") == ids
