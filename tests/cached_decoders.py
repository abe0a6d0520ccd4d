"""Small Llamas as the kinds of graphs that ``generate`` runs."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriting import from_text

_HEAD = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
llama (int64[batch, sequence] input_ids, int64[batch, total] attention_mask, {ids}{past}, {weights})
  => (float[batch, {positions}, {vocabulary}] logits, {present}) <int64[1] one = {{1}}, int64 first = {{1}}> {{
  count = ReduceSum<keepdims=0>(attention_mask, one)
  last = Sub(count, one)
  seqlens = Cast<to=6>(last)
  mask_shape = Shape(attention_mask)
  width = Gather(mask_shape, first)
  total_length = Cast<to=6>(width)
  h0 = Gather(embed, input_ids)
  {layers}
  {kept}
  x = SimplifiedLayerNormalization<axis=-1, epsilon=1e-5>(kept, norm)  logits = MatMul(x, head)
}}"""
_LAYER = """
  n{i} = SimplifiedLayerNormalization<axis=-1, epsilon=1e-5>(h{i}, g{i})
  q{i} = MatMul(n{i}, wq{i})  k{i} = MatMul(n{i}, wk{i})  v{i} = MatMul(n{i}, wv{i})
  {attention}
  o{i} = MatMul(a{i}, wo{i})  r{i} = Add(h{i}, o{i})
  m{i} = SimplifiedLayerNormalization<axis=-1, epsilon=1e-5>(r{i}, f{i})
  gate{i} = MatMul(m{i}, wg{i})  up{i} = MatMul(m{i}, wu{i})  s{i} = Sigmoid(gate{i})  t{i} = Mul(gate{i}, s{i})
  u{i} = Mul(t{i}, up{i})  d{i} = MatMul(u{i}, wd{i})  h{j} = Add(r{i}, d{i})
"""
_INSIDE = """
  a{i}, present_{i}_key, present_{i}_value = com.microsoft.GroupQueryAttention<
    num_heads={heads}, kv_num_heads={kv_heads}, do_rotary=1>
    (q{i}, k{i}, v{i}, past_{i}_key, past_{i}_value, seqlens, total_length, cosines, sines)
"""
_OUTSIDE = """
  rq{i} = com.microsoft.RotaryEmbedding(q{i}, position_ids, cosines, sines)
  rk{i} = com.microsoft.RotaryEmbedding(k{i}, position_ids, cosines, sines)
  a{i}, present_{i}_key, present_{i}_value = com.microsoft.GroupQueryAttention<
    num_heads={heads}, kv_num_heads={kv_heads}>
    (rq{i}, rk{i}, v{i}, past_{i}_key, past_{i}_value, seqlens, total_length)
"""
_NAMES = {
    "g": "input_layernorm",
    "f": "post_attention_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "wg": "mlp.gate_proj",
    "wu": "mlp.up_proj",
    "wd": "mlp.down_proj",
}


@functools.cache
def stories() -> Any:
    """The real one: 5 layers, 4 KV heads of size 8, which is too small for GroupQueryAttention's own rotation."""
    from onnxlathe.models.stories import stories260k

    return stories260k()


@functools.cache
def tiny() -> Any:
    """Random weights: 2 layers, 2 KV heads of size 16; its likeliest tokens are seldom near-ties."""
    from onnxlathe.models.decoder import decoder

    return decoder("tiny", initializer_range=0.4, max_position_embeddings=2048)


def grouped(module: Any, *, rotary: bool, last_only: bool = False) -> ir.Model:
    """``module`` as onnxruntime-genai's builder would write it, with GroupQueryAttention.

    Args:
        module: a Llama.
        rotary: GroupQueryAttention rotates, and there are no position_ids; else a node before it.
        last_only: logits of the last position only.
    """
    config = module.config
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    weights = {"embed": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"]}
    weights["head"] = np.ascontiguousarray(weights["embed"].T)
    size = config.hidden_size // config.num_attention_heads
    angles = np.outer(np.arange(config.max_position_embeddings), 10000.0 ** (-np.arange(0, size, 2) / size))
    weights |= {"cosines": np.cos(angles).astype(np.float32), "sines": np.sin(angles).astype(np.float32)}
    layers = range(config.num_hidden_layers)
    for short, name in _NAMES.items():
        for i in layers:
            weights[f"{short}{i}"] = np.ascontiguousarray(state[f"model.layers.{i}.{name}.weight"].T)
    caches = [f"{i}_{kind}" for i in layers for kind in ("key", "value")]
    layer = _LAYER.replace("{attention}", _INSIDE if rotary else _OUTSIDE)
    heads = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}
    last = f"h{len(layers)}"
    text = _HEAD.format(
        ids="" if rotary else "int64[batch, sequence] position_ids, ",
        past=", ".join(f"float[batch, {heads['kv_heads']}, past, {size}] past_{name}" for name in caches),
        present=", ".join(f"float[batch, {heads['kv_heads']}, kept, {size}] present_{name}" for name in caches),
        weights=", ".join(f"float[{', '.join(map(str, array.shape))}] {name}" for name, array in weights.items()),
        positions="1" if last_only else "sequence",
        vocabulary=config.vocab_size,
        layers="".join(layer.format(i=i, j=i + 1, **heads) for i in layers),
        kept=f"end = Constant<value_ints=[-1]>()  kept = Gather<axis=1>({last}, end)"
        if last_only
        else f"kept = Identity({last})",
    )
    model = from_text(text, **weights)
    for value in [*model.graph.inputs, *model.graph.outputs]:  # the parser takes no such names
        if match := re.fullmatch(r"(past|present)_(\d+)_(key|value)", value.name or ""):
            kind = "past_key_values" if match[1] == "past" else "present"
            value.name = f"{kind}.{match[2]}.{match[3]}"
    return model
