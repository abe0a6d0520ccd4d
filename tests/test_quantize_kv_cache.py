"""QuantizeKVCache: codes and scales against a NumPy attention, old entries untouched, refusals."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from low_bit_models import nats, stories, story_feeds

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.verify import check_structure, compare, run_reference
from onnxlathe.passes import QuantizeKVCache
from onnxlathe.runtime.errors import PassError
from onnxlathe.runtime.generation.quantized_cache import cache_scales, dequantize_caches, quantize_caches
from onnxlathe.runtime.inference import open_session, run_session, session_options
from rewriting import from_text

HEADS, KV_HEADS, SIZE = 4, 2, 16
TEXT = f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
g (float[b, s, {HEADS * SIZE}] q, float[b, s, {KV_HEADS * SIZE}] k, float[b, s, {KV_HEADS * SIZE}] v,
   float[b, {KV_HEADS}, p, {SIZE}] past_key, float[b, {KV_HEADS}, p, {SIZE}] past_value, int32[b] lengths, int32 total)
  => (float[b, s, {HEADS * SIZE}] y, float[b, {KV_HEADS}, t, {SIZE}] present_key,
      float[b, {KV_HEADS}, t, {SIZE}] present_value) {{
  y, present_key, present_value = com.microsoft.GroupQueryAttention<num_heads={HEADS}, kv_num_heads={KV_HEADS}>(
    q, k, v, past_key, past_value, lengths, total)
}}"""
RNG = np.random.default_rng(0)
SPREAD = np.exp(RNG.standard_normal(KV_HEADS * SIZE)).astype(np.float32)  # of the keys' channels


def model() -> ir.Model:
    made = from_text(TEXT)
    infer_shapes(made)
    return made


def sample(length: int, past: int = 0) -> dict[str, np.ndarray]:
    arrays = {
        "q": RNG.standard_normal((1, length, HEADS * SIZE)).astype(np.float32),
        "k": RNG.standard_normal((1, length, KV_HEADS * SIZE)).astype(np.float32) * SPREAD,
        "v": RNG.standard_normal((1, length, KV_HEADS * SIZE)).astype(np.float32),
    }
    for name, spread in (("past_key", SPREAD.reshape(KV_HEADS, 1, SIZE)), ("past_value", np.float32(1))):
        arrays[name] = RNG.standard_normal((1, KV_HEADS, past, SIZE)).astype(np.float32) * spread
    return {**arrays, "lengths": np.array([past + length - 1], np.int32), "total": np.array(past + length, np.int32)}


def attention(feeds: dict[str, np.ndarray], keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Causal attention over whole caches [1, kv heads, total, size]."""
    length = feeds["q"].shape[1]
    q = feeds["q"].reshape(1, length, HEADS, SIZE).swapaxes(1, 2)
    keys, values = (np.repeat(array, HEADS // KV_HEADS, axis=1) for array in (keys, values))
    scores = q @ keys.swapaxes(2, 3) / np.sqrt(SIZE)
    total = keys.shape[2]
    scores = np.where(np.tril(np.ones((length, total)), total - length) > 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ values).swapaxes(1, 2).reshape(1, length, -1)


def quantized(feeds: list[dict[str, np.ndarray]] | None = None) -> ir.Model:
    made = model()
    outcome = QuantizeKVCache()(made, PassContext(feeds=feeds or [sample(40), sample(30, 10)]))
    assert outcome.counts == {"caches in int8": 2}
    check_structure(made)
    return made


@pytest.mark.parametrize("past", [0, 9])
def test_like_numpy_on_the_rounded_cache(past: int) -> None:
    made = quantized()
    scales = cache_scales(made)
    assert set(scales) == {"past_key", "past_value", "present_key", "present_value"}
    assert scales["past_key"].shape == (1, KV_HEADS, 1, SIZE)
    feeds = sample(7, past)
    codes = quantize_caches(feeds, scales)
    found = run_session(open_session(made, session_options()), codes)
    assert found["present_key"].dtype == np.int8
    assert np.array_equal(found["present_key"][:, :, :past], codes["past_key"]), "old entries are not rounded again"
    new = feeds["k"].reshape(1, 7, KV_HEADS, SIZE).swapaxes(1, 2)
    wanted = quantize_caches({"past_key": new}, scales)["past_key"]
    assert np.abs(found["present_key"][:, :, past:].astype(int) - wanted).max() <= 1  # ties in float32
    values = dequantize_caches(found, scales)
    assert np.allclose(found["y"], attention(feeds, values["present_key"], values["present_value"]), atol=1e-4)


def test_close_to_the_float_cache_and_compared_in_its_units() -> None:
    feeds = [sample(12), sample(5, 8)]
    reference, results = run_reference(model(), feeds), run_reference(quantized(feeds), feeds)
    error, _ = compare(reference, results)
    assert error < 0.02
    assert results[0]["present_key"].dtype == np.float32


def test_a_quarter_of_the_bytes_and_a_second_run_does_nothing() -> None:
    made = quantized()
    inputs = {value.name: value.dtype for value in made.graph.inputs}
    assert inputs["past_key"] == inputs["past_value"] == ir.DataType.INT8
    assert not QuantizeKVCache()(made, PassContext(feeds=[sample(4)])).changed


def test_needs_samples() -> None:
    with pytest.raises(PassError, match="needs calibration samples"):
        QuantizeKVCache()(model(), PassContext())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("y, present_key", "twice = Add(past_key, past_key)  y, present_key"), "only it reads"),
        (("total)\n}", "total)  other = Neg(present_value)\n}"), "not only a graph output"),
    ],
)
def test_refused_as_a_whole(change: tuple[str, str], reason: str) -> None:
    text = TEXT.replace(*change)
    extra = "twice" if "twice" in text else "other"
    made = from_text(text.replace("present_value) {", f"present_value, float[b, {KV_HEADS}, n, {SIZE}] {extra}) {{"))
    infer_shapes(made)
    outcome = QuantizeKVCache()(made, PassContext(feeds=[sample(4)]))
    assert not outcome.changed
    assert any(reason in refusal.reason for refusal in outcome.refusals)


def test_stories260k_generates_from_it() -> None:
    """Real model: at most 0.1 % of the loss on stories not calibrated on, and generation goes on as before."""
    samples = story_feeds()
    fused = lathe.compile(
        stories(),
        ["upgrade-opset", "cleanup", "simplify-shapes", "fold-constants", "fuse-group-query-attention", "cleanup"],
        calibration=samples[:1],
        speed_gate=False,
        progress=False,
    )
    made = fused.model.clone()
    outcome = QuantizeKVCache()(made, PassContext(feeds=samples[:60:2], threads=1))
    assert outcome.counts == {"caches in int8": 10}
    scales = cache_scales(made)
    judged = samples[1:60:2]
    before, after = nats(fused.model, judged), nats(made, [quantize_caches(sample, scales) for sample in judged])
    assert abs(after - before) <= 0.0015 * before
    prompt = samples[3]["input_ids"][0, :24]
    texts = [lathe.Session(model, threads=1).generate(prompt, max_new_tokens=24) for model in (fused.model, made)]
    assert (np.asarray(texts[0]) == np.asarray(texts[1])).mean() > 0.7
