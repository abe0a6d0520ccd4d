"""The onnxruntime-genai folder: what the configuration says must be what the graph says. genai itself is not needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from cached_decoders import grouped, tiny
from onnxlathe.runtime.errors import ModelError
from onnxlathe.runtime.generation.genai_folder import save_genai


@pytest.fixture(scope="module")
def exported() -> ir.Model:
    """The tiny Llama with a cache that grows by Concat."""
    return lathe.export_causal_lm(tiny(), check=False)


@pytest.fixture
def huggingface(tmp_path: Path) -> Path:
    """The model's folder with a tokenizer file."""
    tiny().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    return tmp_path / "hf"


def check_against_graph(folder: Path) -> dict[str, Any]:
    """Everything that the configuration names exists, with the sizes it says."""
    config = json.loads((folder / "genai_config.json").read_text())
    model, decoder = config["model"], config["model"]["decoder"]
    graph = onnx.load(folder / decoder["filename"], load_external_data=False).graph
    dims = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*graph.input, *graph.output]}
    layers = range(decoder["num_hidden_layers"])
    named = [name % i for name in decoder["inputs"].values() if "%d" in name for i in layers]
    named += [name for name in decoder["inputs"].values() if "%d" not in name]
    assert sorted(named) == sorted(value.name for value in graph.input)
    presents = [name % i for name in decoder["outputs"].values() if "%d" in name for i in layers]
    assert sorted([*presents, decoder["outputs"]["logits"]]) == sorted(value.name for value in graph.output)
    for name in named:
        if name.startswith("past_key_values"):
            assert dims[name][1::2] == [decoder["num_key_value_heads"], decoder["head_size"]]
    assert model["vocab_size"] == dims["logits"][2]
    return config


def test_plain_export(exported: ir.Model, huggingface: Path, tmp_path: Path) -> None:
    done = lathe.compile(exported, "basic", progress=False)
    config = check_against_graph(done.save_genai(tmp_path / "out", huggingface=huggingface))
    want = tiny().config
    assert config["search"]["past_present_share_buffer"] is False
    assert config["model"]["context_length"] == config["search"]["max_length"] == want.max_position_embeddings
    assert (config["model"]["bos_token_id"], config["model"]["eos_token_id"]) == (want.bos_token_id, want.eos_token_id)
    decoder = config["model"]["decoder"]
    assert decoder["num_attention_heads"] == want.num_attention_heads
    assert decoder["hidden_size"] == want.hidden_size
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    session = lathe.Session(tmp_path / "out" / "model.onnx")
    assert "onnxlathe.report" in session.metadata
    assert len(session.generate([1, 5, 7], 4, eos=())) == 4


@pytest.mark.parametrize("rotary", [True, False])
def test_grouped_attention_shares_the_buffer(rotary: bool, tmp_path: Path) -> None:
    config = check_against_graph(save_genai(grouped(tiny(), rotary=rotary), tmp_path / "out", eos=[2, 3], bos=1))
    assert config["search"]["past_present_share_buffer"] is True
    assert ("position_ids" in config["model"]["decoder"]["inputs"]) is not rotary
    assert config["model"]["decoder"]["num_attention_heads"] == tiny().config.num_attention_heads
    assert config["model"]["eos_token_id"] == [2, 3] and config["model"]["pad_token_id"] == 2
    assert config["model"]["context_length"] == tiny().config.max_position_embeddings  # from the graph


def test_session_options_travel(tmp_path: Path) -> None:
    wanted = {"config_entries": {"session.intra_op.allow_spinning": "0"}, "graph_optimization_level": "basic"}
    save_genai(grouped(tiny(), rotary=True), tmp_path / "out", eos=2, ort_config=wanted)
    options = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert options["graph_optimization_level"] == "ORT_ENABLE_BASIC"
    assert options["session.intra_op.allow_spinning"] == "0"


def test_an_older_folder_is_replaced_and_others_are_not_touched(tmp_path: Path) -> None:
    model = grouped(tiny(), rotary=True)
    save_genai(model, tmp_path / "out", eos=2)
    (tmp_path / "out" / "stale").touch()
    save_genai(model, tmp_path / "out", eos=3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["genai_config.json", "model.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(ModelError, match="not an onnxruntime-genai folder"):
        save_genai(model, tmp_path / "mine", eos=2)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


def test_a_failure_leaves_the_older_folder(tmp_path: Path) -> None:
    model = grouped(tiny(), rotary=True)
    save_genai(model, tmp_path / "out", eos=2)
    before = (tmp_path / "out" / "genai_config.json").read_text()
    with pytest.raises(ModelError, match="no tokenizer files"):
        save_genai(model, tmp_path / "out", eos=3, tokenizer=tmp_path)
    assert (tmp_path / "out" / "genai_config.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "ends a text"),
        ({"eos": 512}, "not below the vocabulary"),
        ({"eos": 2, "context_length": 10_000}, "positions"),
        ({"eos": 2, "huggingface": "nowhere"}, "no config.json"),
    ],
)
def test_what_is_missing_is_said(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        save_genai(grouped(tiny(), rotary=True), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_other_models_are_refused(small_model: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot generate"):
        save_genai(small_model, tmp_path / "out", eos=2)
    model = grouped(tiny(), rotary=True)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.name = (value.name or "").replace(".1.", ".2.")
    with pytest.raises(ModelError, match="counts layers from 0"):
        save_genai(model, tmp_path / "out", eos=2)
