"""The real stories260k: a language model of 260K parameters trained on TinyStories, with its tokenizer."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

FOLDER = Path(__file__).parent / "data" / "stories260k"
BOS = 1
"""The token every story starts with, and so the one that comes after its end."""
_BYTE_PIECES = range(3, 259)
_OPENINGS = ("Once upon a time", "One day", "Once there was", "There was once", "Once, ")


def stories260k(attention: str = "sdpa") -> LlamaForCausalLM:
    """The trained model as ``transformers.LlamaForCausalLM``, in eval mode: 5 layers, 8 heads, 4 KV heads, tied.

    Args:
        attention: ``"sdpa"`` or ``"eager"``.

    Raises:
        FileNotFoundError: the checkpoint is not where the package keeps it.
        ImportError: transformers is not installed.
    """
    return load_checkpoint(_data("stories260K.bin"), attention)


def heldout_text() -> str:
    """99 kB of the TinyStories validation split, which the model has not seen."""
    return _data("heldout.txt").read_text(encoding="utf-8")


def heldout_stories() -> list[str]:
    """The same text as single stories, told apart by their opening words.

    The model starts each at ``BOS`` and reaches about 1.30 nats a token on them.
    """
    return split_stories(heldout_text())


def split_stories(text: str) -> list[str]:
    """The stories of a text of TinyStories, told apart by their opening words."""
    stories: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        if not stories or paragraph.startswith(_OPENINGS):
            stories.append(paragraph)
        else:
            stories[-1] += f"\n\n{paragraph}"
    return stories


def load_checkpoint(path: Path, attention: str = "sdpa") -> LlamaForCausalLM:
    """Reads a llama2.c version-0 checkpoint: 7 int32 (dim, hidden, layers, heads, KV heads, vocabulary, positions; a
    positive vocabulary means tied embeddings), then float32 weights, type by type.

    Raises:
        ValueError: the file is not such a checkpoint.
        ImportError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ImportError('stories260k needs transformers: pip install "onnxlathe[hf]".') from error
    content = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = struct.unpack_from("<7i", content)
    tied, vocabulary = vocabulary > 0, abs(vocabulary)
    kv_dim = dim // heads * kv_heads
    shapes = {
        "embed_tokens": (vocabulary, dim),
        "input_layernorm": (layers, dim),
        "self_attn.q_proj": (layers, dim, dim),
        "self_attn.k_proj": (layers, kv_dim, dim),
        "self_attn.v_proj": (layers, kv_dim, dim),
        "self_attn.o_proj": (layers, dim, dim),
        "post_attention_layernorm": (layers, dim),
        "mlp.gate_proj": (layers, hidden, dim),
        "mlp.down_proj": (layers, dim, hidden),
        "mlp.up_proj": (layers, hidden, dim),
        "norm": (dim,),
        "rotary": (positions, dim // heads),  # cosines, then sines: LlamaForCausalLM computes its own
    }
    if not tied:
        shapes["lm_head"] = (vocabulary, dim)
    weights = np.frombuffer(content, "<f4", offset=28)
    if weights.size != sum(int(np.prod(shape)) for shape in shapes.values()):
        raise ValueError(f"{path} is not a llama2.c version-0 checkpoint: its size does not fit its header.")
    state: dict[str, torch.Tensor] = {}
    start = 0
    for name, shape in shapes.items():
        array = torch.from_numpy(weights[start : start + int(np.prod(shape))].reshape(shape).copy())
        start += array.numel()
        if name in ("self_attn.q_proj", "self_attn.k_proj"):
            array = _half_rotated(array, dim // heads)
        if name == "lm_head":
            state["lm_head.weight"] = array
        elif len(shape) > 1 and name not in ("embed_tokens", "rotary"):
            state.update({f"model.layers.{i}.{name}.weight": layer for i, layer in enumerate(array)})
        elif name != "rotary":
            state[f"model.{name}.weight"] = array
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=BOS,
        eos_token_id=BOS,  # a story ends where the next begins; the model was never shown token 2
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(attention)
    model.load_state_dict(state, strict=not tied)
    model.tie_weights()
    return model.eval()


def _half_rotated(weight: torch.Tensor, head: int) -> torch.Tensor:
    """Reorders the rows of each head of [layers, rows, dim] from llama2.c's rotary pairs (2i, 2i + 1) to transformers'
    pairs (i, i + head / 2)."""
    layers, rows, dim = weight.shape
    return weight.view(layers, rows // head, head // 2, 2, dim).transpose(2, 3).reshape(layers, rows, dim)


def stories_tokenizer() -> Tokenizer:
    """The model's tokenizer, 512 pieces, equal to llama2.c's: greedy merging by score, bytes for unknown characters.

    It does not add ``BOS``; start a text with ``[BOS, *tokenizer.encode(text).ids]``.

    Raises:
        FileNotFoundError: the file is not where the package keeps it.
        ImportError: tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, normalizers
    except ImportError as error:
        raise ImportError('The tokenizer needs tokenizers: pip install "onnxlathe[hf]".') from error
    pieces = _read_pieces(_data("tok512.bin"))
    ids = {piece: i for i, piece in enumerate(pieces)}
    # Scores fall with the id, so "best score first" is "lowest id first". The byte pieces are never merged into.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[_BYTE_PIECES.stop :]
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    model: Any = models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(pieces[BOS:3])  # begin and end of a story: decode leaves them out
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def tokenizer_json() -> str:
    """``stories_tokenizer`` as the content of a ``tokenizer.json`` that starts each text with ``BOS``."""
    from tokenizers import processors

    tokenizer: Any = stories_tokenizer()
    begin = tokenizer.id_to_token(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=[begin, "$A"], special_tokens=[(begin, BOS)])
    return tokenizer.to_str()


def _read_pieces(path: Path) -> list[str]:
    """The pieces of a llama2.c tokenizer file: int32 longest length, then (float32 score, int32 length, bytes) each."""
    content = path.read_bytes()
    pieces: list[str] = []
    position = 4
    while position < len(content):
        (length,) = struct.unpack_from("<i", content, position + 4)
        position += 8
        pieces.append(content[position : position + length].decode())
        position += length
    return pieces


def _data(name: str) -> Path:
    path = FOLDER / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: reinstall onnxlathe, whose package data it is.")
    return path
