"""Llama-like decoders in published sizes, with seeded random weights: right for speed and memory, not for quality."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    },
    # HuggingFaceTB/SmolLM-135M
    "llama_135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 2048,
    },
}


def decoder(config: str = "tiny", *, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A ``transformers.LlamaForCausalLM`` with tied embeddings and random weights, in eval mode.

    Args:
        config: a key of ``CONFIGS``.
        seed: seed of the weights.
        changes: fields of ``LlamaConfig`` to change, e.g. ``num_hidden_layers=4``.

    Raises:
        KeyError: no such config.
        ImportError: transformers is not installed.
    """
    if config not in CONFIGS:
        raise KeyError(f"There is no decoder {config!r}; choose one of {', '.join(CONFIGS)}.")
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ImportError('The decoders need transformers: pip install "onnxlathe[hf]".') from error
    common: dict[str, Any] = {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**common, **CONFIGS[config], **changes})).eval()
