"""Depth pruning: against torch without the blocks, against masked branches, caches, the fit, near misses."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.graph import constant, weight_bytes
from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.compiler.verify import check_structure, compare, run_reference
from onnxlathe.passes import PruneDepth
from onnxlathe.passes.pruning.blocks import blocks_of, residual_stream
from onnxlathe.passes.pruning.bypass import bypass
from onnxlathe.passes.quantization.quantized_layers import store
from onnxlathe.runtime.errors import PassError
from onnxlathe.runtime.feeds import make_feeds
from rewriting import from_text

RNG = np.random.default_rng(0)


@functools.cache
def torch_encoder() -> Any:
    from onnxlathe.models.encoder import Encoder, EncoderConfig

    return Encoder(EncoderConfig(hidden=32, intermediate=64, layers=4)).eval()


@functools.cache
def encoder(fused: bool = False) -> ir.Model:
    from onnxlathe.models.zoo import build

    entry = build("encoder")
    model = lathe.export(torch_encoder(), entry.args, dynamic_shapes=entry.dynamic_shapes, check=False)
    return lathe.compile(model, "cpu-fp32" if fused else "basic", speed_gate=False, progress=False).model


@functools.cache
def decoder(fused: bool = False) -> ir.Model:
    from onnxlathe.models.decoder import decoder as build

    sizes = {"vocab_size": 64, "max_position_embeddings": 64, "num_hidden_layers": 3}
    model = lathe.export_causal_lm(build("tiny", **sizes, initializer_range=0.3), check=False)
    return lathe.compile(model, "cpu-fp32" if fused else "basic", speed_gate=False, progress=False).model


def pre_norm(layers: int = 3) -> ir.Model:
    """Residual layers with normalization in front."""
    body = "\n".join(
        f"n{i} = LayerNormalization(h{i}, s)  a{i} = MatMul(n{i}, w{i})  g{i} = Gelu(a{i})  d{i} = MatMul(g{i}, v{i})"
        f"  e{i} = Add(d{i}, b{i})  h{i + 1} = Add(h{i}, e{i})"
        for i in range(layers)
    )
    weights = {"s": np.ones(8, np.float32), "p": (RNG.standard_normal((8, 8)) / 2).astype(np.float32)}
    for i in range(layers):
        scale = 0.02 if i == 1 else 0.5
        weights |= {f"w{i}": RNG.standard_normal((8, 16)), f"v{i}": RNG.standard_normal((16, 8)) * scale}
        weights |= {f"b{i}": RNG.standard_normal(8) * scale}
    arrays = {name: array.astype(np.float32) for name, array in weights.items()}
    declared = ", ".join(f"float{list(array.shape)} {name}" for name, array in arrays.items())
    text = f"""<ir_version: 10, opset_import: ["" : 20]> g (float[n, 5, 8] x, {declared}) => (float[n, 5, 8] y) {{
        h0 = MatMul(x, p)  {body}  y = Neg(h{layers}) }}"""
    return from_text(text, **arrays)


def samples(model: ir.Model, count: int = 10, start: int = 0) -> list[dict[str, np.ndarray]]:
    sizes = {"n": 8, "batch": 4, "sequence": 12, "past_sequence": 0}
    return [make_feeds(model, seed=seed, count=1, sizes=sizes)[0] for seed in range(start, start + count)]


def pruned(model: ir.Model, step: PruneDepth) -> tuple[ir.Model, Any]:
    """The model after the pass, structure checked, and the outcome."""
    after = load_model(model)
    infer_shapes(after)
    outcome = step(after, PassContext(feeds=samples(model)))
    check_structure(after)
    assert not step(after.clone(), PassContext(feeds=samples(model))).changed, "a second run cut again"
    return after, outcome


@pytest.mark.parametrize("fused", [False, True], ids=["raw", "fused"])
def test_blocks_of_an_encoder(fused: bool) -> None:
    halves = residual_stream(encoder(fused))
    assert [half.kind for half in halves] == ["attention", "ffn"] * 4
    assert [len(block) for block in blocks_of(halves)] == [2] * 4
    assert all(half.norm is not None and half.layer is not None for half in halves)


@pytest.mark.parametrize("fused", [False, True], ids=["raw", "fused"])
def test_an_encoder_without_a_block_is_torch_without_it(fused: bool) -> None:
    model = encoder(fused)
    after, outcome = pruned(model, PruneDepth(layers=2, method="influence"))
    gone = [int(text) for text in outcome.notes[0].split(": ")[1].split(", ")]
    module = torch_encoder()
    layers = module.layers
    feeds = samples(model, 2, start=50)
    try:
        module.layers = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i not in gone)
        with torch.no_grad():
            expected = [module(**{k: torch.from_numpy(v) for k, v in f.items()}).numpy() for f in feeds]
    finally:
        module.layers = layers
    for got, wanted, feed in zip(run_reference(after, feeds), expected, feeds, strict=True):
        difference = np.abs(next(iter(got.values())) - wanted) * feed["attention_mask"][..., None]
        assert difference.max() <= 1e-5 * np.abs(wanted).max()
    assert outcome.counts == {"blocks left out": 2}


@pytest.mark.parametrize("what", ["blocks", "attention", "ffn"])
@pytest.mark.parametrize("fused", [False, True], ids=["raw", "fused"])
def test_a_decoder_without_a_layer_is_one_whose_branches_give_zero(fused: bool, what: Any) -> None:
    model = decoder(fused)
    masked = model.clone()
    halves = residual_stream(masked)
    assert [half.kind for half in halves] == ["attention", "ffn"] * 3
    after, outcome = pruned(model, PruneDepth(layers=1, method="greedy", what=what))
    gone = int(outcome.notes[0].split(": ")[1])
    for half in blocks_of(halves)[gone]:
        if what in ("blocks", half.kind):
            assert half.layer is not None
            store(half.layer.weight, np.zeros_like(constant(half.layer.weight)))  # type: ignore[arg-type]
    feeds = samples(model, 2, start=50)
    names = {value.name for value in after.graph.inputs}
    small = [{name: array for name, array in feed.items() if name in names} for feed in feeds]
    full, got = run_reference(masked, feeds), run_reference(after, small)
    error, _ = compare([{"logits": item["logits"]} for item in full], [{"logits": item["logits"]} for item in got])
    assert error <= 1e-5
    caches = sorted(name for name in names if name and name.startswith("past"))
    left = 3 if what == "ffn" else 2
    assert caches == sorted(f"past_key_values.{i}.{kind}" for i in range(left) for kind in ("key", "value"))
    presents = {value.name for value in after.graph.outputs}
    assert presents == {"logits", *(name.replace("past_key_values", "present") for name in caches)}


def test_the_least_block_goes_and_the_one_before_makes_up_for_it() -> None:
    model = pre_norm()
    errors: dict[str, float] = {}
    for method in ("influence", "greedy", "replace"):
        after, outcome = pruned(model, PruneDepth(layers=1, method=method))  # type: ignore[arg-type]
        assert outcome.notes[0].endswith(": 1")
        feeds = samples(model, 4, start=50)
        pairs = zip(run_reference(model, feeds), run_reference(after, feeds), strict=True)
        errors[method] = float(sum(np.square(a["y"] - b["y"]).sum() for a, b in pairs))
        assert weight_bytes(after) < weight_bytes(model)
    assert errors["replace"] < 0.8 * errors["greedy"] == pytest.approx(0.8 * errors["influence"])


@pytest.mark.parametrize("fused", [False, True], ids=["raw", "fused"])
def test_the_fit_brings_an_encoder_nearer(fused: bool) -> None:
    model = encoder(fused)
    feeds = samples(model, 6, start=50)
    errors: dict[str, float] = {}
    for method in ("greedy", "replace"):
        after, _ = pruned(model, PruneDepth(layers=1, method=method))  # type: ignore[arg-type]
        pairs = zip(run_reference(model, feeds), run_reference(after, feeds), feeds, strict=True)
        errors[method] = sum(
            float((np.square(a["output"] - b["output"]) * feed["attention_mask"][..., None]).sum())
            for a, b, feed in pairs
        )
    assert errors["replace"] < errors["greedy"]


def test_a_decoder_in_compile_still_generates() -> None:
    model = decoder()
    result = lathe.compile(
        model, [PruneDepth(layers=1), "cpu-fp32"], calibration=samples(model), speed_gate=False, progress=False
    )
    assert result.report.passes[0].counts == {"blocks left out": 1}
    assert np.isfinite(result.report.error)
    assert "onnxlathe.kept_caches" not in result.model.metadata_props
    ids = result.session().generate([[1, 5, 9]], max_new_tokens=4)
    assert len(ids[0]) >= 1


def test_near_misses() -> None:
    model = pre_norm()
    value = next(node.outputs[0] for node in model.graph if node.outputs[0].name == "e1")
    model.graph.outputs.append(value)  # the branch of layer 1 is also an output: the chain ends there
    assert len(residual_stream(model)) < 3
    plain = from_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 8] x, float[8, 8] w) => (y) { a = MatMul(x, w) y = Relu(a) }""",
        w=np.ones((8, 8), np.float32),
    )
    outcome = PruneDepth(layers=1)(plain, PassContext(feeds=samples(plain)))
    assert not outcome.changed and "no chain" in outcome.refusals[0].reason


def test_others_that_read_the_stream_between_see_that_nothing_was_added() -> None:
    """Hidden states as outputs: those of blocks that went are those before them, which then cost nothing."""
    smaller, masked = pre_norm(4), pre_norm(4)
    for model in (smaller, masked):
        infer_shapes(model)
        middle = next(node.outputs[0] for node in model.graph if node.outputs[0].name == "h2")
        model.graph.outputs.append(middle)
    arrays = {name: constant(value) for name, value in masked.graph.initializers.items()}
    for name in ("v1", "b1", "v2", "b2"):
        store(masked.graph.initializers[name], arrays[name] * 0)
    for name in arrays:  # both models have the weights of one
        store(smaller.graph.initializers[name], arrays[name])
    bypass(smaller, residual_stream(smaller)[1:3], "test")
    check_structure(smaller)
    feeds = samples(masked, 2)
    assert compare(run_reference(masked, feeds), run_reference(smaller, feeds))[0] < 1e-5
    assert sum(node.op_type == "Gelu" for node in smaller.graph) == 2


def test_a_weight_that_callers_may_override_stays_an_input_with_a_default() -> None:
    model = pre_norm()
    model.graph.inputs.append(model.graph.initializers["b1"])
    after, outcome = pruned(model, PruneDepth(layers=1, method="influence"))
    assert outcome.notes[0].endswith(": 1")
    assert run_reference(after, [{"x": np.ones((1, 5, 8), np.float32)}])


def test_bad_input() -> None:
    with pytest.raises(PassError, match="leaves none"):
        pruned(pre_norm(), PruneDepth(layers=3))
    with pytest.raises(PassError, match="needs calibration samples"):
        PruneDepth(layers=1)(pre_norm(), PassContext())
    for options in ({"layers": 0}, {"ratio": 1.0}):
        with pytest.raises(ValueError, match="not"):
            PruneDepth(**options)  # type: ignore[arg-type]
