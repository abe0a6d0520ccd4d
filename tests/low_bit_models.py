"""What the tests of low-bit passes share: a small residual network with gate and up, and the real stories260k."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from onnxlathe.compiler.exporting.export_lm import export_causal_lm
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.models.stories import BOS, heldout_stories, stories260k, stories_tokenizer
from onnxlathe.runtime.inference import open_session, run_session, session_options
from rewriting import from_text

HIDDEN, INNER, VOCABULARY = 64, 80, 96

BLOCK = f"""<ir_version: 10, opset_import: ["" : 23]>
net (int64[b, s] ids, float[{VOCABULARY},{HIDDEN}] table, float[{HIDDEN}] gain, float[{HIDDEN},{INNER}] gate_w,
     float[{HIDDEN},{INNER}] up_w, float[{INNER},{HIDDEN}] down_w, float[{HIDDEN},{VOCABULARY}] head_w)
    => (float[b, s, {VOCABULARY}] logits) {{
  e = Gather(table, ids)  n = RMSNormalization<axis=-1>(e, gain)
  g = MatMul(n, gate_w)  u = MatMul(n, up_w)  t = Sigmoid(g)  a = Mul(g, t)  m = Mul(a, u)
  d = MatMul(m, down_w)  r = Add(e, d)  logits = MatMul(r, head_w)
}}"""


def block() -> ir.Model:
    """Table, normalization, gate/up/down, residual, head; inputs of very different sizes, as AWQ and GPTQ like them."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)

    gain = np.exp(rng.standard_normal(HIDDEN)).astype(np.float32)
    model = from_text(
        BLOCK,
        table=rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32) @ matrix(HIDDEN, HIDDEN),
        gain=gain,
        gate_w=matrix(HIDDEN, INNER),
        up_w=matrix(HIDDEN, INNER),
        down_w=matrix(INNER, HIDDEN),
        head_w=matrix(HIDDEN, VOCABULARY),
    )
    infer_shapes(model)
    return model


def block_feeds(count: int = 12, length: int = 24) -> list[dict[str, np.ndarray]]:
    """Random tokens."""
    rng = np.random.default_rng(1)
    return [{"ids": rng.integers(0, VOCABULARY, (2, length))} for _ in range(count)]


@functools.cache
def stories() -> ir.Model:
    """stories260k, exported."""
    return export_causal_lm(stories260k(), check=False)


@functools.cache
def story_feeds() -> list[dict[str, np.ndarray]]:
    """A sample for each story, with an empty cache: even ones to calibrate, odd ones to judge."""
    tokenizer = stories_tokenizer()
    samples: list[dict[str, np.ndarray]] = []
    for story in heldout_stories():
        ids = np.array([[BOS, *tokenizer.encode(story).ids][:512]], np.int64)
        positions = np.arange(ids.shape[1], dtype=np.int64)[None]
        sample = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
        for layer in range(5):
            for kind in ("key", "value"):
                sample[f"past_key_values.{layer}.{kind}"] = np.zeros((1, 4, 0, 8), np.float32)
        samples.append(sample)
    return samples


def nats(model: ir.Model, samples: list[dict[str, np.ndarray]]) -> float:
    """Mean negative log-likelihood of the tokens of ``samples``."""
    session = open_session(model, session_options(threads=1))
    total, count = 0.0, 0
    for sample in samples:
        logits = run_session(session, sample, ["logits"])["logits"][0, :-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        normalized = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        following = sample["input_ids"][0, 1:]
        total -= normalized[np.arange(len(following)), following].sum()
        count += len(following)
    return total / count
