"""Every attention of T5-, Whisper-, Llama- and GPT-2-shaped models without a cache, as torch exports them, is fused."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

import onnxlathe as lathe
from onnxlathe.compiler.verify import relative_error, run_reference
from onnxlathe.passes import FuseAttention, FuseRotary
from rewriting import ops, rewrite

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
CROSS = {"input_ids": ("batch", "target"), "encoder_hidden_states": {0: "batch", 1: "sequence"}}


def seeded(kind: Any, config: Any, implementation: str) -> Any:
    """A random model whose attentions look at some tokens more than at others."""
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def t5() -> tuple[Any, str, dict[str, Any], int]:
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, relative_attention_max_distance=16
    )
    decoder = seeded(transformers.T5Model, config, "sdpa").decoder
    return decoder, "last_hidden_state", CROSS | {"encoder_attention_mask": ("batch", "sequence")}, 23


def whisper() -> tuple[Any, str, dict[str, Any], int]:
    sizes = {
        f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 32))
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(vocab_size=50, d_model=32, max_source_positions=16, **sizes, **heads, **tokens)
    return seeded(transformers.WhisperModel, config, "eager").decoder, "last_hidden_state", CROSS, 20


def llama() -> tuple[Any, str, dict[str, Any], int]:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return seeded(transformers.LlamaForCausalLM, config, "sdpa"), "logits", TEXT, 20


def gpt2() -> tuple[Any, str, dict[str, Any], int]:
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, **tokens)
    return seeded(transformers.GPT2LMHeadModel, config, "sdpa"), "logits", TEXT, 23


def inputs(names: dict[str, Any], batch: int, target: int, sequence: int) -> dict[str, Any]:
    """Tokens, hidden states and masks with padding on the right."""
    torch.manual_seed(1)
    mask = torch.ones(batch, sequence, dtype=torch.int64)
    mask[-1, sequence - 2 :] = 0
    made = {
        "input_ids": torch.randint(0, 50, (batch, target if "encoder_hidden_states" in names else sequence)),
        "attention_mask": mask,
        "encoder_hidden_states": torch.randn(batch, sequence, 32),
        "encoder_attention_mask": mask,
    }
    return {name: made[name] for name in names}


class Uncached(torch.nn.Module):
    """``model`` by the names of its inputs, without a cache."""

    def __init__(self, model: Any, result: str, names: list[str]) -> None:
        super().__init__()
        self.model, self.result, self.names = model, result, names

    def forward(self, *tensors: Any) -> Any:
        given = dict(zip(self.names, tensors, strict=True))
        return getattr(self.model(**given, use_cache=False), self.result)


@pytest.mark.parametrize(("build", "attentions"), [(t5, 4), (whisper, 4), (llama, 2), (gpt2, 2)])
def test_every_attention_is_fused(build: Any, attentions: int) -> None:
    inner, result, shapes, opset = build()
    module = Uncached(inner, result, list(shapes)).eval()
    example = tuple(inputs(shapes, 2, 5, 7).values())
    exported = lathe.export(module, example, dynamic_shapes=(tuple(shapes.values()),), opset=opset, check=False)
    given = inputs(shapes, 3, 6, 9)
    names = [value.name or "" for value in exported.graph.inputs]
    feeds = [{name: tensor.numpy() for name, tensor in zip(names, given.values(), strict=True)}]
    with torch.no_grad():
        expected = module(*given.values()).numpy()
    clean = ["cleanup", "simplify-shapes", "fold-constants", "fuse-normalization"]
    for first, form in ((["upgrade-opset"], "Attention"), ([], "MultiHeadAttention")):
        prepared = lathe.compile(exported, [*first, *clean], calibration=feeds, progress=False).model
        rotated = rewrite(FuseRotary(), prepared, feeds=feeds, nested=False)[0] if build is llama else prepared
        step = FuseAttention(form=form)  # type: ignore[arg-type]
        after, outcome = rewrite(step, rotated, feeds=feeds, nested=False)
        check(after, outcome.counts.total(), attentions, grouped=build is llama)
        got = next(iter(run_reference(after, feeds)[0].values()))
        assert relative_error(expected, got) <= 1e-5


def check(after: ir.Model, fused: int, expected: int, *, grouped: bool) -> None:
    assert fused == expected
    assert "Softmax" not in ops(after)
    if grouped:
        assert ops(after)["com.microsoft.RotaryEmbedding"] == 2 * expected
    if grouped and "Attention" in ops(after):
        assert "Transpose" not in ops(after), "neither rotation nor attention takes the heads apart"
