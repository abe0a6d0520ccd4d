"""QuantizeStatic(quality=Budget(...)): the ladder stops when the budget holds, says each step, and never pretends."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from onnxlathe.compiler.base import Outcome, PassContext
from onnxlathe.compiler.budget import Budget, split
from onnxlathe.compiler.graph import count_ops
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.variants import is_quantized
from onnxlathe.compiler.verify import check_structure, run_reference
from onnxlathe.passes import QuantizeStatic
from onnxlathe.passes.presets import make_pass
from rewriting import from_text

RNG = np.random.default_rng(0)
LAYERS = 4
DATA = next((p / "shared" / "data" for p in Path(__file__).parents if (p / "shared" / "data").is_dir()), Path("shared"))


def network() -> tuple[ir.Model, list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Pre-normalization blocks; the third one's activations have two channels 200 times larger."""
    weights: dict[str, np.ndarray] = {}
    declared, body, x = ["float[n, s, 32] x"], "", "x"
    for number in range(LAYERS):
        gain = np.ones(32, np.float32)
        weight = (RNG.standard_normal((32, 32)) / 6).astype(np.float32)
        if number == 2:
            gain[[5, 20]] = 200
            weight[[5, 20]] /= 200
        weights |= {f"g{number}": gain, f"w{number}": weight, f"b{number}": np.full(32, 0.1, np.float32)}
        declared += [f"float[32] g{number}", f"float[32, 32] w{number}", f"float[32] b{number}"]
        body += f"h{number} = LayerNormalization(x{number}, g{number}) m{number} = MatMul(h{number}, w{number}) "
        body += f"a{number} = Add(m{number}, b{number}) r{number} = Relu(a{number}) "
        body += f"x{number + 1} = Add(x{number}, r{number}) "
    head = f'<ir_version: 10, opset_import: ["" : 21]> net ({", ".join(declared)}) => (float[n, s, 32] y)'
    model = from_text(f"{head} {{ x0 = Tanh({x}) {body} y = Tanh(x{LAYERS}) }}", **weights)
    infer_shapes(model)
    samples = [{"x": RNG.standard_normal((2, 16, 32)).astype(np.float32)} for _ in range(20)]
    return model, samples[:12], samples[12:]


def healed(budget: Budget, **options: object) -> tuple[ir.Model, Outcome, float]:
    """The model after the pass, what it reported, and the loss on samples that nothing has seen."""
    model, feeds, unseen = network()
    after = model.clone()
    outcome = QuantizeStatic(quality=budget, **options)(after, PassContext(feeds=feeds))  # type: ignore[arg-type]
    check_structure(after)
    exact, got = run_reference(model, unseen), run_reference(after, unseen)
    return after, outcome, budget.loss(unseen, exact, got)


def test_a_loose_budget_needs_no_step() -> None:
    after, outcome, _ = healed(Budget("relative_error", 3.0))
    assert is_quantized(after) and outcome.counts["MatMul on integers"] == LAYERS
    assert outcome.notes[0].startswith("as asked:") and "within the budget" in outcome.notes[1]


def test_smooth_quant_heals_outliers() -> None:
    """The budget lies between what plain int8 and what smoothed int8 loses: all layers stay quantized."""
    plain = healed(Budget("cosine", 1.0))[2]
    _, outcome, loss = healed(Budget("cosine", plain / 3))
    assert loss <= plain / 2 and outcome.counts["MatMul on integers"] == LAYERS
    assert any("SmoothQuant" in note and "not kept" not in note for note in outcome.notes)
    assert "within the budget" in " ".join(outcome.notes)
    assert not any("left float" in note for note in outcome.notes)


def test_tight_budgets_widen_and_then_leave_float() -> None:
    after, outcome, loss = healed(Budget("sqnr", 42.0, held_out=0.5))
    text = "\n".join(outcome.notes)
    assert loss <= -39.0, text
    assert "16-bit activations" in text and "within the budget" in text
    kinds = {value.dtype for node in after.graph for value in node.outputs}
    assert ir.DataType.UINT16 in kinds or "left float" in text


def test_what_no_quantization_keeps_stays_float() -> None:
    after, outcome, loss = healed(Budget("sqnr", 150.0))
    assert not is_quantized(after) and loss == -np.inf
    assert any("nothing is quantized: no less keeps the budget" in note for note in outcome.notes)


def test_the_worst_layer_goes_first() -> None:
    """Without SmoothQuant's help (the norm is also read elsewhere), the broken layer is the one widened or left out."""
    model, feeds, _ = network()
    extra = ir.node("Relu", [next(n for n in model.graph if n.outputs[0].name == "h2").outputs[0]], name="extra")
    extra.outputs[0].name, extra.outputs[0].type = "e", ir.TensorType(ir.DataType.FLOAT)
    extra.outputs[0].shape = ir.Shape(["n", "s", 32])
    model.graph.append(extra)
    model.graph.outputs.append(extra.outputs[0])
    plain = model.clone()
    QuantizeStatic()(plain, PassContext(feeds=feeds))
    exact = run_reference(model, feeds)
    base = Budget("cosine", 1.0).loss(feeds, exact, run_reference(plain, feeds))
    after = model.clone()
    outcome = QuantizeStatic(quality=Budget("cosine", base / 6))(after, PassContext(feeds=feeds))
    text = "\n".join(outcome.notes)
    assert "within the budget" in text, text
    wide = {
        node.inputs[0].name
        for node in after.graph
        if node.op_type == "QuantizeLinear" and node.outputs[0].dtype == ir.DataType.UINT16
    }
    assert wide == {"h2"}, text


def test_a_score_of_the_user() -> None:
    model, feeds, _ = network()
    labels = [result["y"].argmax(-1) for result in run_reference(model, feeds[:4])]

    def score(samples: object, outputs: list) -> float:
        return float(
            np.mean([np.mean(out["y"].argmax(-1) == label) for out, label in zip(outputs, labels, strict=True)])
        )

    step = QuantizeStatic(quality=Budget(score, 0.02, samples=feeds[:4]))
    out = lathe.compile(model, [step], calibration=feeds[4:], progress=False)
    assert any("score lost" in note and "within" in note for note in out.report.passes[-1].notes)
    assert score(feeds[:4], run_reference(out.model, feeds[:4])) >= 0.98


def test_metrics_against_numpy() -> None:
    rng = np.random.default_rng(3)
    exact = [{"y": rng.standard_normal((4, 7)).astype(np.float32)} for _ in range(3)]
    got = [{"y": item["y"] + 0.1 * rng.standard_normal((4, 7)).astype(np.float32)} for item in exact]
    a, b = (np.concatenate([item["y"] for item in side]).astype(np.float64) for side in (exact, got))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    expected = {
        "relative_error": np.abs(a - b).max() / np.abs(a).max(),
        "cosine": 1 - (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b),
        "sqnr": -10 * np.log10(np.square(a).sum() / np.square(a - b).sum()),
        "kl": (p * np.log(p / q)).sum(-1).mean(),
    }
    for metric, value in expected.items():
        assert Budget(metric, 0.1).loss([{}] * len(exact), exact, got) == pytest.approx(value, rel=1e-6)  # type: ignore[arg-type]


def test_the_split_is_seeded_and_disjoint() -> None:
    feeds = [{"x": np.full(1, number)} for number in range(10)]
    rest, held = split(feeds, 0.3, 7)
    numbers = [[int(sample["x"][0]) for sample in part] for part in (rest, held)]
    assert sorted(numbers[0] + numbers[1]) == list(range(10)) and len(numbers[1]) == 3
    assert [int(sample["x"][0]) for sample in split(feeds, 0.3, 7)[1]] == numbers[1]
    single = split(feeds[:1], 0.5, 0)
    assert [len(list(part)) for part in single] == [1, 1]


def test_budgets_from_text() -> None:
    assert Budget.parse("cosine <= 0.005") == Budget("cosine", 0.005)
    assert Budget.parse("sqnr>=30") == Budget("sqnr", 30.0)
    step = make_pass("quantize-static", quality="kl<=0.01")
    assert isinstance(step, QuantizeStatic) and step.quality == Budget("kl", 0.01)
    for text in ("cosine", "cosine>=0.1", "sqnr<=30", "speed<=1", "kl<=little"):
        with pytest.raises(lathe.PassError, match="quality"):
            make_pass("quantize-static", quality=text)


def test_bad_budgets_and_missing_samples() -> None:
    for options in ({"metric": "speed"}, {"held_out": 0.0}, {"max_drop": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Budget(**options)  # type: ignore[arg-type]
    model = network()[0]
    with pytest.raises(lathe.PassError, match="samples"):
        QuantizeStatic(quality=Budget())(model.clone(), PassContext())
    before = count_ops(model)
    assert count_ops(model) == before


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real models are not here ({DATA})")
def test_a_real_convolutional_network() -> None:
    """MNIST with one scale per weight tensor: a budget of 40 dB is kept on unseen images, give or take 2 dB."""
    with gzip.open(DATA / "mnist" / "t10k-images-idx3-ubyte.gz") as file:
        images = (
            np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 1, 28, 28)[:200].astype(np.float32) / 255
        )
    path = DATA / "mnist" / "mnist_conv.onnx"
    name = lathe.load(path).graph.inputs[0].name or ""
    feeds = [{name: image} for image in images]
    exact = lathe.compile(path, "cpu-fp32", calibration=feeds[:2], speed_gate=False, progress=False).model
    budget = Budget("sqnr", 40.0)
    plain, healed_ = (
        lathe.compile(exact, [step], calibration=feeds[:150], verify=False, progress=False).model
        for step in (QuantizeStatic(per_channel=False), QuantizeStatic(per_channel=False, quality=budget))
    )
    unseen = feeds[150:]
    losses = [budget.loss(unseen, run_reference(exact, unseen), run_reference(m, unseen)) for m in (plain, healed_)]
    assert losses[0] > -38.0 and losses[1] < -38.0 and is_quantized(healed_)
