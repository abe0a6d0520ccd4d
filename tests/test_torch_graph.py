"""Whole graphs as torch modules: what they compute, which weights they train, and what is written back."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from low_bit_models import block, block_feeds

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.training.torch_graph import TorchGraph
from onnxlathe.compiler.training.weights import CodedWeight, FloatWeight
from onnxlathe.compiler.verify import compare, run_reference
from onnxlathe.models.zoo import build
from onnxlathe.passes import FewLevelWeights, QuantizeWeights
from onnxlathe.runtime.errors import PassError
from onnxlathe.runtime.feeds import make_feeds
from rewriting import from_text, inside_if

RNG = np.random.default_rng(0)


@functools.cache
def exported(name: str) -> ir.Model:
    entry = build(name)
    if entry.kind == "causal-lm":
        return lathe.export_causal_lm(entry.module, check=False)
    return lathe.export(entry.module, entry.args, dynamic_shapes=entry.dynamic_shapes, check=False)


@functools.cache
def compiled(name: str, passes: str) -> ir.Model:
    calibration = make_feeds(exported(name), 0, 2) if "static" in passes else None
    steps: Any = passes if passes.startswith("cpu") else passes.split(",")
    options: Any = {"calibration": calibration, "speed_gate": False, "progress": False}
    return lathe.compile(exported(name), steps, **options).model


def run(graph: TorchGraph, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        found = graph({name: torch.tensor(array) for name, array in sample.items()})
    return {name: item.numpy() for name, item in found.items()}


MODELS = [
    ("mlp-784", "cleanup"),
    ("convnet", "cleanup"),
    ("convnet", "cpu-fp32"),
    ("encoder", "cleanup"),
    ("encoder", "cpu-fp32"),
    ("decoder-tiny", "cleanup"),
    ("decoder-tiny", "cpu-fp32"),
]


@pytest.mark.parametrize(("name", "passes"), MODELS)
def test_computes_what_the_graph_computes(name: str, passes: str) -> None:
    model = compiled(name, passes).clone()
    graph = TorchGraph(model).eval()
    samples = make_feeds(model, 3, 2)
    reference = run_reference(model, samples)
    for sample, wanted in zip(samples, reference, strict=True):
        got = run(graph, sample)
        if "past_key_values.0.key" in sample and not sample["attention_mask"].all():
            continue  # results at padded tokens are arbitrary: see the next test
        assert list(got) == list(wanted)
        error, output = compare([wanted], [got])
        assert error < 1e-4, output
    assert graph.write() == len(list(graph.trained())) > 0
    assert compare(reference, run_reference(model, samples))[0] == 0.0, "weights written back unchanged"


@pytest.mark.parametrize("passes", ["cleanup", "cpu-fp32"])
def test_padding_on_the_left(passes: str) -> None:
    """Tokens give the same logits; every weight gets a finite derivative, though padded rows see nothing."""
    model = compiled("decoder-tiny", passes).clone()
    sample = make_feeds(model, 3, 2)[1]
    mask = sample["attention_mask"].astype(bool)
    assert not mask.all()
    wanted = run_reference(model, [sample])[0]["logits"]
    graph = TorchGraph(model, ["logits"])
    got = graph({name: torch.tensor(array) for name, array in sample.items()})["logits"]
    np.testing.assert_allclose(got.detach().numpy()[mask], wanted[mask], atol=1e-4)
    got[torch.tensor(mask)].square().sum().backward()
    for weight in graph.trained():
        gradient = weight.latent.grad
        assert gradient is not None and bool(gradient.isfinite().all()), weight


def test_quantized_activations() -> None:
    """Static int8, as QuantizeLinear and DequantizeLinear: a few roundings fall the other way, no more."""
    model = compiled("encoder", "upgrade-opset,cleanup,fuse-linear,quantize-static").clone()
    samples = make_feeds(model, 5, 1)
    wanted, got = run_reference(model, samples)[0]["output"], run(TorchGraph(model).eval(), samples[0])["output"]
    assert np.abs(wanted - got).mean() < 1e-3 and np.abs(wanted).mean() > 0.1


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("form", ["operator", "qdq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_low_bit_weights(bits: Any, form: Any, symmetric: bool) -> None:
    model = block()
    model.opset_imports[""] = 25
    step = QuantizeWeights(
        bits=bits, block_size=32, symmetric=symmetric, form=form, accuracy_level=0, embedding_bits=8, head_bits=bits
    )
    step(model, PassContext())
    graph = TorchGraph(model, origin=block())
    samples = block_feeds(1)
    wanted = run_reference(model, samples)
    assert compare(wanted, [run(graph.eval(), samples[0])])[0] < 1e-5, "training starts from exactly the model"
    assert sum(isinstance(weight, CodedWeight) for weight in graph.trained()) == 5
    graph.write()
    assert compare(wanted, run_reference(model, samples))[0] == 0.0


@pytest.mark.parametrize("same", [True, False])
def test_codes_with_two_readers(same: bool) -> None:
    """One DequantizeLinear for each product, as some exporters write it: one weight; with other scales: not trained."""
    inputs = "float[n, 4] x, int8[4, 4] q, float s, float t"
    body = (
        f"w = DequantizeLinear(q, s) v = DequantizeLinear(q, {'s' if same else 't'}) m = MatMul(x, w) y = MatMul(m, v)"
    )
    model = from_text(
        f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => (float[n, 4] y) {{ {body} }}',
        q=RNG.integers(-99, 99, (4, 4)).astype(np.int8),
        s=np.float32(0.1),
        t=np.float32(0.2),
    )
    graph = TorchGraph(model)
    weights = list(graph.trained())
    assert len(weights) == (1 if same else 0)
    sample = {"x": np.ones((2, 4), np.float32)}
    assert compare(run_reference(model, [sample]), [run(graph, sample)])[0] < 1e-6


def test_a_table_that_products_share_is_one_weight() -> None:
    text = '<ir_version: 10, opset_import: ["" : 23]> g (int64[b, s] ids, float[96, 64] w) => (float[b, s, 96] y)'
    model = from_text(
        f"{text} {{ e = Gather(w, ids) t = Transpose<perm=[1, 0]>(w) y = MatMul(e, t) }}",
        w=RNG.standard_normal((96, 64)).astype(np.float32),
    )
    infer_shapes(model)
    QuantizeWeights(bits=8, block_size=32, embedding_bits=8, head_bits=8, accuracy_level=0)(model, PassContext())
    graph = TorchGraph(model)
    assert len(list(graph.trained())) == 1
    samples = [{"ids": np.array([[3, 5, 95]])}]
    assert compare(run_reference(model, samples), [run(graph, samples[0])])[0] < 1e-5


@pytest.mark.parametrize("levels", ["binary", "ternary", "midrise"])
def test_few_levels_stay_few_and_scales_follow(levels: Any) -> None:
    model = block()
    FewLevelWeights(levels=levels, block_size=32, accuracy_level=0)(model, PassContext())
    before = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]
    graph = TorchGraph(model, origin=block())
    coded = [weight for weight in graph.trained() if isinstance(weight, CodedWeight)]
    assert len(coded) == 3
    sets = [set(np.unique(weight.stored.codes)) for weight in coded]
    optimizer = torch.optim.Adam(graph.parameters(), lr=0.05)
    sample = {name: torch.tensor(array) for name, array in block_feeds(1)[0].items()}
    for _ in range(5):
        optimizer.zero_grad()
        (graph(sample)["logits"] - 1).square().mean().backward()
        optimizer.step()
    graph(sample)
    graph.write()
    wanted = run(graph.eval(), block_feeds(1)[0])
    assert compare(run_reference(model, block_feeds(1)), [wanted])[0] < 1e-5
    again = [weight for weight in TorchGraph(model).trained() if isinstance(weight, CodedWeight)]
    for weight, found, allowed in zip(coded, again, sets, strict=True):
        codes, scales = (value.name or "" for value in weight.stored.values)
        assert set(np.unique(found.stored.codes)) <= allowed
        assert (before[codes] != model.graph.initializers[codes].const_value.numpy()).any()  # type: ignore[union-attr]
        assert (before[scales] != model.graph.initializers[scales].const_value.numpy()).any()  # type: ignore[union-attr]
        latent = (
            weight.latent.detach().reshape(weight.latent.shape[0], -1, 32) if weight.latent.shape[1] % 32 == 0 else None
        )
        if levels == "binary" and latent is not None:  # the least squares of one bit
            np.testing.assert_allclose(weight.scale.numpy(), latent.abs().mean(-1).numpy(), rtol=1e-4)


def test_zeros_of_matrices_stay_zero_and_those_of_vectors_do_not() -> None:
    weight = RNG.standard_normal((8, 4)).astype(np.float32) * (RNG.random((8, 4)) > 0.5)
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[n, 8] x, float[8, 4] w, float[4] b) => (float[n, 4] y)'
    model = from_text(f"{text} {{ m = MatMul(x, w) y = Add(m, b) }}", w=weight, b=np.zeros(4, np.float32))
    graph = TorchGraph(model)
    optimizer = torch.optim.Adam(graph.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        graph({"x": torch.ones(2, 8)})["y"].sum().backward()
        optimizer.step()
    graph.write()
    after = model.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    assert ((after == 0) == (weight == 0)).all() and (after != weight).any()
    assert (model.graph.initializers["b"].const_value.numpy() != 0).all()  # type: ignore[union-attr]


def test_pruned_codes_stay_zero() -> None:
    """A weight pruned and then rounded to eight bits has more zeros than rounding makes."""
    weight = RNG.standard_normal((64, 32)).astype(np.float32) * (RNG.random((64, 32)) > 0.5)
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n, 64] x, float[64, 32] w) => (float[n, 32] y)'
    model = from_text(f"{text} {{ m = MatMul(x, w) y = Relu(m) }}", w=weight)
    infer_shapes(model)
    QuantizeWeights(bits=8, block_size=32, symmetric=True, head_bits=8, accuracy_level=0)(model, PassContext())
    graph = TorchGraph(model)
    coded = next(iter(graph.trained()))
    assert isinstance(coded, CodedWeight) and coded.mask is not None
    with torch.no_grad():
        coded.latent += 0.3
    zero = coded.stored.codes == 128
    assert (coded().detach().numpy()[zero] == 0).all() and (coded().detach().numpy()[~zero] != 0).any()
    assert zero.mean() > 0.4


def test_what_is_trained_in_a_decoder() -> None:
    """Tables, products and gains; not the angles, nor masks, nor single numbers."""
    graph = TorchGraph(exported("decoder-tiny"), ["logits"])
    names = [weight.value.name or "" for weight in graph.trained() if isinstance(weight, FloatWeight)]
    assert names and all(
        "embed" in name or "layers" in name or "norm" in name or "lm_head" in name for name in names
    ), names
    graph = TorchGraph(exported("decoder-tiny"), ["logits"], exclude=["*embed*", "*norm*"])
    kept = [weight.value.name for weight in graph.trained() if isinstance(weight, FloatWeight)]
    assert 0 < len(kept) < len(names) and not any("norm" in (name or "") for name in kept)


def test_values_inside_can_be_asked_for() -> None:
    model = block()
    names = [value.name or "" for node in model.graph for value in node.outputs]
    found = run(TorchGraph(model, names), block_feeds(1)[0])
    assert list(found) == names


def test_bodies_are_refused_by_name() -> None:
    with pytest.raises(PassError, match=r"If \(choose\): has bodies of its own"):
        TorchGraph(inside_if(block()))


def test_unknown_operators_are_refused_by_name() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[n, 8] x) => (float[n, 8] y) { d = Det(x) y = Add(x, d) }'
    model = ir.from_onnx_text(text)
    model.graph[0].name = "determinant"
    with pytest.raises(PassError, match=r"cannot execute Det \(determinant\)"):
        TorchGraph(model)


def test_the_default_of_an_input() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[n, 4] x, float[4, 3] w, float[3] b) => (float[n, 3] y)
    { a = MatMul(x, w) y = Add(a, b) }"""
    model = from_text(text, w=RNG.standard_normal((4, 3)).astype(np.float32), b=np.ones(3, np.float32))
    model.graph.inputs.append(model.graph.initializers["b"])
    graph = TorchGraph(model)
    x = RNG.standard_normal((2, 4)).astype(np.float32)
    for sample in ({"x": x}, {"x": x, "b": np.full(3, 5, np.float32)}):
        assert compare(run_reference(model, [sample]), [run(graph, sample)])[0] < 1e-5
    assert [weight.value.name for weight in graph.trained() if isinstance(weight, FloatWeight)] == ["w"]
