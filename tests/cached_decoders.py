"""stories260k as the two kinds of graphs that ``generate`` runs: builders for tests, by name."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

import onnxlathe as lathe
from rewriting import from_text

HEADS, KV_HEADS, HEAD, DIM, LAYERS, VOCABULARY, POSITIONS = 8, 4, 8, 64, 5, 512, 512

_HEAD = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
stories (int64[batch, sequence] input_ids, int64[batch, total] attention_mask, {past}, {weights})
  => (float[batch, {positions}, 512] logits, {present}) <int64[1] one = {{1}}, int64 first = {{1}}> {{
  count = ReduceSum<keepdims=0>(attention_mask, one)
  last = Sub(count, one)
  seqlens = Cast<to=6>(last)
  mask_shape = Shape(attention_mask)
  width = Gather(mask_shape, first)
  total = Cast<to=6>(width)
  h0 = Gather(embed, input_ids)
  {layers}
  {tail}
}}"""
_LAYER = """
  n{i} = SimplifiedLayerNormalization<axis=-1, epsilon=1e-5>(h{i}, g{i})
  q{i} = MatMul(n{i}, wq{i})  k{i} = MatMul(n{i}, wk{i})  v{i} = MatMul(n{i}, wv{i})
  a{i}, present_{i}_key, present_{i}_value = com.microsoft.GroupQueryAttention<num_heads=8, kv_num_heads=4, do_rotary=1>
    (q{i}, k{i}, v{i}, past_{i}_key, past_{i}_value, seqlens, total, cosines, sines)
  o{i} = MatMul(a{i}, wo{i})  r{i} = Add(h{i}, o{i})
  m{i} = SimplifiedLayerNormalization<axis=-1, epsilon=1e-5>(r{i}, f{i})
  gate{i} = MatMul(m{i}, wg{i})  up{i} = MatMul(m{i}, wu{i})  s{i} = Sigmoid(gate{i})  t{i} = Mul(gate{i}, s{i})
  u{i} = Mul(t{i}, up{i})  d{i} = MatMul(u{i}, wd{i})  h{j} = Add(r{i}, d{i})
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
def stories():
    from onnxlathe.models.stories import stories260k

    return stories260k()


@functools.cache
def plain() -> ir.Model:
    """As exported: present is Concat(past, new)."""
    return lathe.export_causal_lm(stories())


@functools.cache
def grouped(last_only: bool = False) -> ir.Model:
    """As onnxruntime-genai's builder would write it: GroupQueryAttention with rotary tables, no position_ids.

    Args:
        last_only: logits of the last position only.
    """
    state = {name: tensor.numpy() for name, tensor in stories().state_dict().items()}
    weights = {"embed": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"]}
    weights["head"] = np.ascontiguousarray(weights["embed"].T)
    angles = np.outer(np.arange(POSITIONS), 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD))
    weights |= {"cosines": np.cos(angles).astype(np.float32), "sines": np.sin(angles).astype(np.float32)}
    for short, name in _NAMES.items():
        for i in range(LAYERS):
            weights[f"{short}{i}"] = np.ascontiguousarray(state[f"model.layers.{i}.{name}.weight"].T)
    caches = [f"{i}_{kind}" for i in range(LAYERS) for kind in ("key", "value")]
    tail = "kept = Identity(h5)"
    if last_only:
        tail = "ends = Constant<value_ints=[-1]>()  kept = Gather<axis=1>(h5, ends)"
    tail += "  x = SimplifiedLayerNormalization<axis=-1, epsilon=1e-5>(kept, norm)  logits = MatMul(x, head)"
    text = _HEAD.format(
        past=", ".join(f"float[batch, 4, past, 8] past_{name}" for name in caches),
        present=", ".join(f"float[batch, 4, present_length, 8] present_{name}" for name in caches),
        weights=", ".join(f"float[{', '.join(map(str, array.shape))}] {name}" for name, array in weights.items()),
        positions="1" if last_only else "sequence",
        layers="".join(_LAYER.format(i=i, j=i + 1) for i in range(LAYERS)),
        tail=tail,
    )
    model = from_text(text, **weights)
    for value in [*model.graph.inputs, *model.graph.outputs]:  # the parser takes no such names
        if match := re.fullmatch(r"(past|present)_(\d)_(key|value)", value.name or ""):
            kind = "past_key_values" if match[1] == "past" else "present"
            value.name = f"{kind}.{match[2]}.{match[3]}"
    return model


BUILDERS: dict[str, Callable[[], ir.Model]] = {
    "plain": plain,
    "grouped": grouped,
    "grouped-last-only": functools.partial(grouped, last_only=True),
}
