"""analyze: figures against NumPy, the broken layer found, weights and activations apart, JSON, plot, bad input."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console

import onnxlathe as lathe
from onnxlathe import cli
from onnxlathe.compiler.analyze import analyze
from onnxlathe.compiler.graph import constant
from onnxlathe.runtime.artifact import save
from onnxlathe.runtime.errors import ModelError
from rewriting import from_text

RNG = np.random.default_rng(0)
W1 = (RNG.standard_normal((8, 16)) / 3).astype(np.float32)
W2 = (RNG.standard_normal((16, 4)) / 4).astype(np.float32)
FEEDS = [{"x": np.random.default_rng(seed).standard_normal((5, 8)).astype(np.float32)} for seed in range(3)]
FLOAT = """<ir_version: 10, opset_import: ["" : 20]> f
(float[n, 8] x, float[8, 16] w1, float[16, 4] w2) => (float[n, 4] y) {
  h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }"""
QUANTIZED = """<ir_version: 10, opset_import: ["" : 20]> q
(float[n, 8] x, int8[8, 16] w1_quantized, float[16] s1, int8[16] z1, int8[16, 4] w2_quantized, float[4] s2, int8[4] z2,
 float sx, uint8 zx, float sr, uint8 zr) => (float[n, 4] y) {
  xq = QuantizeLinear(x, sx, zx) xd = DequantizeLinear(xq, sx, zx) w1d = DequantizeLinear<axis=1>(w1_quantized, s1, z1)
  h = MatMul(xd, w1d) r = Relu(h)
  rq = QuantizeLinear(r, sr, zr) rd = DequantizeLinear(rq, sr, zr) w2d = DequantizeLinear<axis=1>(w2_quantized, s2, z2)
  y = MatMul(rd, w2d) }"""


def models(**changes: object) -> tuple[ir.Model, ir.Model]:
    """The float model, and its QDQ form with scales that fit, unless changed."""
    s1, s2 = np.abs(W1).max(0) / 127, np.abs(W2).max(0) / 127
    values = {
        "s1": s1, "z1": np.zeros(16, np.int8), "w1_quantized": np.rint(W1 / s1).astype(np.int8),
        "s2": s2, "z2": np.zeros(4, np.int8), "w2_quantized": np.rint(W2 / s2).astype(np.int8),
        "sx": np.float32(8 / 255), "zx": np.uint8(128), "sr": np.float32(4 / 255), "zr": np.uint8(0),
    }  # fmt: skip
    return from_text(FLOAT, w1=W1, w2=W2), from_text(QUANTIZED, **{**values, **changes})


def round_trip(x: np.ndarray, scale: float, zero: int) -> np.ndarray:
    return ((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)


def decibel(exact: np.ndarray, got: np.ndarray) -> float:
    return float(
        10 * np.log10(np.square(exact, dtype=np.float64).sum() / np.square(exact - got, dtype=np.float64).sum())
    )


def test_figures_against_numpy() -> None:
    found = analyze(*models(), FEEDS)
    layers = {layer.value: layer for layer in found.layers}
    assert set(layers) == {"h", "y"} and found.samples == 3
    x = np.concatenate([sample["x"] for sample in FEEDS])
    s1, s2 = np.abs(W1).max(0) / 127, np.abs(W2).max(0) / 127
    w1, w2 = np.rint(W1 / s1) * s1, np.rint(W2 / s2) * s2
    h = x @ W1
    r, y = np.maximum(h, 0), np.maximum(h, 0) @ W2
    xd, rd = round_trip(x, 8 / 255, 128), round_trip(r, 4 / 255, 0)
    prefix = round_trip(np.maximum(xd @ w1, 0), 4 / 255, 0)
    assert layers["h"].local_sqnr == pytest.approx(decibel(h, xd @ w1), abs=0.05)
    assert layers["y"].local_sqnr == pytest.approx(decibel(y, rd @ w2), abs=0.05)
    assert layers["y"].cumulative_sqnr == pytest.approx(decibel(y, prefix @ w2), abs=0.05)
    assert layers["y"].weights_sqnr == pytest.approx(decibel(y, r @ w2), abs=0.05)
    assert layers["y"].activations_sqnr == pytest.approx(decibel(y, rd @ W2), abs=0.05)
    output = found.outputs[0]
    assert output.sqnr == pytest.approx(decibel(y, prefix @ w2), abs=0.05)
    assert output.weights_sqnr == pytest.approx(decibel(y, np.maximum(x @ w1, 0) @ w2), abs=0.05)
    assert output.activations_sqnr == pytest.approx(decibel(y, np.maximum(xd @ W1, 0).clip(0, 4) @ W2), abs=3)
    assert output.relative_error == pytest.approx(np.abs(y - prefix @ w2).max() / np.abs(y).max(), rel=1e-2)
    assert layers["y"].saturation == pytest.approx(100 * np.mean(np.maximum(xd @ w1, 0) > 4 + 2 / 255), abs=0.01)


def test_contribution_is_the_error_with_only_that_layer_quantized() -> None:
    found = {layer.value: layer for layer in analyze(*models(), FEEDS, effects=3).layers}
    x = np.concatenate([sample["x"] for sample in FEEDS])
    s1 = np.abs(W1).max(0) / 127
    y = np.maximum(x @ W1, 0) @ W2
    only_first = np.maximum(round_trip(x, 8 / 255, 128) @ (np.rint(W1 / s1) * s1), 0) @ W2
    assert found["h"].contribution == pytest.approx(10 ** (-decibel(y, only_first) / 10), rel=0.02)
    assert found["y"].contribution == pytest.approx(10 ** (-found["y"].local_sqnr / 10), rel=0.02)


@pytest.mark.parametrize(
    ("change", "worst", "part"),
    [
        ({"s1": np.abs(W1).max(0) / 40}, "h", "weights"),
        ({"s2": np.abs(W2).max(0) / 40}, "y", "weights"),
        ({"sx": np.float32(0.5 / 255)}, "h", "activations"),
        ({"sr": np.float32(60 / 255)}, "y", "activations"),
    ],
)
def test_a_layer_broken_on_purpose_is_the_worst(change: dict, worst: str, part: str) -> None:
    found = analyze(*models(**change), FEEDS)
    assert found.layers[0].value == worst
    layer = found.layers[0]
    assert layer.weights_sqnr is not None and layer.activations_sqnr is not None
    assert (layer.weights_sqnr < layer.activations_sqnr) == (part == "weights")
    if "sx" in change:
        assert layer.saturation is not None and layer.saturation > 50


def test_integer_operators_are_compared_too() -> None:
    """Dynamic quantization: no Q/DQ pairs, so weights and activations cannot be separated, and the note says so."""
    text = """<ir_version: 10, opset_import: ["" : 20]> d
    (float[n, 8] x, int8[8, 16] w1q, float s1, int8 z1, float[16, 4] w2) => (float[n, 4] y) {
      xq, sx, zx = DynamicQuantizeLinear(x) i = MatMulInteger(xq, w1q, zx, z1) c = Cast<to=1>(i) s = Mul(sx, s1)
      h = Mul(c, s) r = Relu(h) y = MatMul(r, w2) }"""
    scale = np.float32(np.abs(W1).max() / 127)
    codes = np.rint(W1 / scale).astype(np.int8)
    dynamic = from_text(text, w1q=codes, s1=scale, z1=np.int8(0), w2=W2)
    found = analyze(models()[0], dynamic, FEEDS)
    assert [layer.value for layer in found.layers] == ["h"]
    assert found.layers[0].weights_sqnr is None and 25 < found.layers[0].local_sqnr < 60
    assert any("cannot be separated" in note for note in found.notes)


def test_a_mix_of_forms() -> None:
    """One layer in integer operators, one in Q/DQ: each is compared as far as it can be."""
    text = """<ir_version: 10, opset_import: ["" : 20]> d
    (float[n, 8] x, int8[8, 16] w1q, float s1, int8 z1, int8[16, 4] w2_quantized, float[4] s2, int8[4] z2, float sr,
     uint8 zr) => (float[n, 4] y) {
      xq, sx, zx = DynamicQuantizeLinear(x) i = MatMulInteger(xq, w1q, zx, z1) c = Cast<to=1>(i) s = Mul(sx, s1)
      h = Mul(c, s) r = Relu(h) rq = QuantizeLinear(r, sr, zr) rd = DequantizeLinear(rq, sr, zr)
      w2d = DequantizeLinear<axis=1>(w2_quantized, s2, z2) y = MatMul(rd, w2d) }"""
    scale, s2 = np.float32(np.abs(W1).max() / 127), np.abs(W2).max(0) / 127
    values = {"w1q": np.rint(W1 / scale).astype(np.int8), "s1": scale, "z1": np.int8(0), "s2": s2}
    values |= {"z2": np.zeros(4, np.int8), "w2_quantized": np.rint(W2 / s2).astype(np.int8)}
    mixed = from_text(text, **values, sr=np.float32(4 / 255), zr=np.uint8(0))
    found = {layer.value: layer for layer in analyze(models()[0], mixed, FEEDS).layers}
    assert found["h"].weights_sqnr is None and found["y"].weights_sqnr is not None


def test_a_relu_that_saturation_stands_for() -> None:
    """Relu taken over by the range of QuantizeLinear: it comes back where activations are not quantized."""
    without = QUANTIZED.replace("h = MatMul(xd, w1d) r = Relu(h)", "h = MatMul(xd, w1d)")
    without = without.replace("rq = QuantizeLinear(r, sr, zr)", "rq = QuantizeLinear(h, sr, zr)")
    exact, usual = models()
    values = {name: constant(value) for name, value in usual.graph.initializers.items()}
    found = analyze(exact, from_text(without, **values), FEEDS)
    expected = analyze(exact, usual, FEEDS)
    for got, wanted in zip(found.outputs, expected.outputs, strict=True):
        assert got.weights_sqnr == pytest.approx(wanted.weights_sqnr, abs=0.01)
    layers = [{layer.value: layer.saturation for layer in item.layers} for item in (found, expected)]
    assert layers[0]["y"] == pytest.approx(layers[1]["y"], abs=1e-6)


def test_print_json_and_plot(tmp_path: Path) -> None:
    found = lathe.analyze(*models(), FEEDS)
    console = Console(width=80, record=True, file=(tmp_path / "out.txt").open("w"))
    found.print(console)
    assert "share" in console.export_text()
    found.save_json(tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    assert [layer["value"] for layer in data["layers"]] == [layer.value for layer in found.layers]
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_bad_input() -> None:
    exact, quantized = models()
    with pytest.raises(ModelError, match="No layer of the second model is quantized"):
        analyze(exact, exact, FEEDS)
    with pytest.raises(ModelError, match="no samples"):
        analyze(exact, quantized, [])
    with pytest.raises(ModelError, match="missing"):
        lathe.analyze(exact, quantized, [{"z": FEEDS[0]["x"]}])


def test_exact_layers_are_said_to_be_exact() -> None:
    """Codes that hold the weights without a rest, and inputs on the grid."""
    whole = np.rint(RNG.standard_normal((8, 16)) * 30).astype(np.float32)
    feeds = [{"x": np.rint(FEEDS[0]["x"] * 20).astype(np.float32)}]
    _, quantized = models(w1_quantized=whole.astype(np.int8), s1=np.ones(16, np.float32), sx=np.float32(1))
    found = analyze(from_text(FLOAT, w1=whole, w2=W2), quantized, feeds)
    layer = next(layer for layer in found.layers if layer.value == "h")
    assert math.isinf(layer.local_sqnr) and layer.local_cosine == 1.0


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    exact, quantized = models(s1=np.abs(W1).max(0) / 40)
    paths = [save(exact, tmp_path / "float.onnx"), save(quantized, tmp_path / "int8.onnx")]
    np.savez(tmp_path / "x.npz", **FEEDS[0])

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["onnxlathe", "analyze", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    report = tmp_path / "a.json"
    code, text, _ = run(*paths, "--samples", tmp_path / "x.npz", "--json", report, "--rows", 1)
    assert code == 0 and "error of the outputs" in text and "1 more layers" in text
    assert json.loads(report.read_text())["layers"][0]["value"] == "h"
    code, text, _ = run(*paths)
    assert code == 0 and "made from the input types" in text.replace("\n", " ")
    code, _, error = run(paths[1], paths[1])
    assert code == 2 and "quantized itself" in error
    code, _, error = run(paths[0], paths[0])
    assert code == 2 and "is quantized" in error
    code, _, error = run(*paths, "--json", paths[0])
    assert code == 2 and "the input itself" in error
