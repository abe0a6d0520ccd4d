"""The artifact as an onnxruntime-genai folder: ``model.onnx``, ``genai_config.json`` and the tokenizer's files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..artifact import save
from ..errors import ModelError
from ..files import new_folder
from .causal_lm import CausalLM, read_causal_lm

CONFIG = "genai_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


def save_genai(
    model: ir.Model,
    folder: str | os.PathLike[str],
    *,
    huggingface: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    context_length: int | None = None,
    bos: int | None = None,
    eos: int | Sequence[int] | None = None,
    pad: int | None = None,
    metadata: Mapping[str, str] | None = None,
    ort_config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a folder that ``onnxruntime_genai.Model(folder)`` loads; an older one is replaced when it is complete.

    What the graph says comes from the graph: names, layers, heads, sizes, vocabulary, positions, and whether past and
    present may be one buffer (``past_present_share_buffer``: every present is made by a GroupQueryAttention).
    Otherwise an argument wins over ``huggingface``, and that over the artifact's metadata.

    Args:
        model: a decoder as ``export_causal_lm`` writes it, before or after passes.
        folder: the folder to write.
        huggingface: the model's Hugging Face config, as a folder with ``config.json`` and ``generation_config.json``
            or as a mapping; it knows the special tokens and the context length.
        tokenizer: a folder whose tokenizer files are copied; None takes those of ``huggingface`` if it is a folder.
        context_length: tokens a text can have.
        bos: token id that begins a text.
        eos: token id, or ids, that end a text.
        pad: token id that fills rows of a batch; the first ``eos`` if nobody says.
        metadata: extra ``metadata_props`` of the model.
        ort_config: session options, as stored in an artifact.

    Raises:
        ModelError: the graph is no decoder that onnxruntime-genai can run, nobody says the context length or what ends
            a text, or the folder holds something else.
    """
    target = Path(folder)
    source: Path | None = None
    known: dict[str, Any] = {}
    if isinstance(huggingface, Mapping):
        known = dict(huggingface)
    elif huggingface is not None:
        source = Path(huggingface)
        known = _read_huggingface(source)
    given = {"context_length": context_length, "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    known |= {name: value for name, value in given.items() if value is not None}
    config = genai_config(model, known, ort_config or {})
    with new_folder(target, CONFIG, "an onnxruntime-genai folder") as draft:
        save(model, draft / "model.onnx", metadata=metadata)
        (draft / CONFIG).write_text(json.dumps(config, indent=4) + "\n")
        _copy_tokenizer(Path(tokenizer) if tokenizer is not None else source, draft, required=tokenizer is not None)
    return target


def genai_config(model: ir.Model, known: Mapping[str, Any], ort_config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``genai_config.json``.

    Args:
        model: the decoder.
        known: a Hugging Face config; ``context_length`` in it wins over ``max_position_embeddings``.
        ort_config: session options, as stored in an artifact.

    Raises:
        ModelError: as for ``save_genai``.
    """
    facts = read_causal_lm(model)
    heads, size = _uniform_cache(facts)
    if facts.vocabulary is None:
        raise ModelError("The graph does not say how many tokens it knows.", "Give the logits a fixed last dim.")
    context = known.get("context_length") or known.get("max_position_embeddings") or facts.positions
    if context is None:
        raise ModelError("Nobody says how long a text can be.", "Give context_length, or the Hugging Face config.")
    if facts.positions is not None and context > facts.positions:
        raise ModelError(
            f"The context length is {context}, but the graph knows {facts.positions} positions.", "Give at most that."
        )
    eos = known.get("eos_token_id")
    ends = list(facts.eos) if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if not ends:
        raise ModelError("Nobody says which token ends a text.", "Give eos, or the Hugging Face config.")
    special = {"bos_token_id": known.get("bos_token_id"), "pad_token_id": known.get("pad_token_id")}
    special["pad_token_id"] = ends[0] if special["pad_token_id"] is None else special["pad_token_id"]
    if strange := [token for token in [*ends, *special.values()] if token is not None and token >= facts.vocabulary]:
        raise ModelError(f"The tokens {strange} are not below the vocabulary's {facts.vocabulary}.", "Check the ids.")
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **_session_options(ort_config)},
        "filename": "model.onnx",
        "head_size": size,
        "hidden_size": known.get("hidden_size", _query_heads(model, known, heads) * size),
        "inputs": {
            **{name: name for name in facts.tokens},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": _query_heads(model, known, heads),
        "num_hidden_layers": len(facts.cache) // 2,
        "num_key_value_heads": heads,
    }
    return {
        "model": {
            "type": "decoder",  # genai's name for any decoder, so that no architecture has to be known
            **{name: token for name, token in special.items() if token is not None},
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "context_length": context,
            "vocab_size": facts.vocabulary,
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": facts.in_place},
    }


def _uniform_cache(facts: CausalLM) -> tuple[int, int]:
    """Heads and size of every cache tensor: genai allocates all of them alike, numbered from 0."""
    layers = len(facts.cache) // 2
    wanted = {f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")}
    if {tensor.past for tensor in facts.cache} != wanted:
        raise ModelError(
            f"onnxruntime-genai counts layers from 0, each with a key and a value; this graph has "
            f"{', '.join(tensor.past for tensor in facts.cache[:4])}...",
            "Rename the inputs and outputs.",
        )
    shapes = {(tensor.heads, tensor.size) for tensor in facts.cache}
    if len(shapes) != 1:
        raise ModelError(
            f"The layers' caches differ in heads or sizes ({sorted(shapes)}), which the configuration cannot say.",
            "Run the model with onnxlathe.Session.generate.",
        )
    return shapes.pop()


def _query_heads(model: ir.Model, known: Mapping[str, Any], kv_heads: int) -> int:
    """Heads of the queries, from an attention operator or the config; without either as many as keys have."""
    for node in model.graph:
        for name in ("num_heads", "q_num_heads"):
            if node.op_type in ("GroupQueryAttention", "MultiHeadAttention", "Attention") and name in node.attributes:
                return node.attributes[name].as_int()
    return int(known.get("num_attention_heads", kv_heads))


def _session_options(ort_config: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = dict(ort_config.get("config_entries", {}))
    if "graph_optimization_level" in ort_config:
        options["graph_optimization_level"] = _LEVELS[ort_config["graph_optimization_level"]]
    return options


def _read_huggingface(folder: Path) -> dict[str, Any]:
    """``config.json`` with the special tokens of ``generation_config.json``, which chat models end with."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"There is no config.json in {folder}.", "Give the folder that save_pretrained wrote.")
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        generation = folder / "generation_config.json"
        more: dict[str, Any] = json.loads(generation.read_text()) if generation.is_file() else {}
    except (ValueError, OSError) as error:
        raise ModelError(f"The config in {folder} cannot be read: {error}.", "Download it again.") from error
    tokens = {name: value for name, value in more.items() if name.endswith("_token_id") and value is not None}
    return {**config, **tokens}


def _copy_tokenizer(source: Path | None, draft: Path, required: bool) -> None:
    files = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()] if source is not None else []
    if required and not files:
        raise ModelError(f"There are no tokenizer files in {source}.", f"Such as {', '.join(_TOKENIZER_FILES[:3])}.")
    for file in files:
        shutil.copyfile(file, draft / file.name)
