"""Every operator of the training table against ONNX Runtime without its optimizations, and its derivatives."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch_cases import CASES, F4, Case, X, cos, f, grouped, i8, k3, q3, sin, v3

from onnxlathe.compiler.graph import MICROSOFT
from onnxlathe.compiler.training.fake_quant import straight_through
from onnxlathe.compiler.training.torch_graph import TorchGraph
from onnxlathe.compiler.training.torch_ops import TABLE, unsupported
from onnxlathe.runtime.errors import ModelError
from onnxlathe.runtime.inference import open_session, run_session, session_options

TOLERANCE = {"float16": 4e-3, "float32": 2e-5, "float64": 1e-5}


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{n}-{case.op}" for n, case in enumerate(CASES)])
def test_as_in_onnxruntime(number: int) -> None:
    case = CASES[number]
    for dtype in case.dtypes:
        model, feeds = case.model(dtype)
        try:
            session = open_session(model, session_options(optimize=False))
        except ModelError:
            assert dtype != "float32", "ONNX Runtime cannot run the case"
            continue
        expected = run_session(session, feeds)
        graph = TorchGraph(model)
        got = graph(
            {
                name: torch.tensor(array.astype(np.int32) if array.dtype == np.uint16 else array)
                for name, array in feeds.items()
            }
        )
        assert list(got) == list(expected)
        for name, want in expected.items():
            found = got[name].detach().numpy()
            assert found.shape == want.shape, name
            assert found.dtype == want.dtype or want.dtype == np.uint16 or model.graph.outputs[0].dtype is None
            if want.dtype.kind == "f":
                np.testing.assert_allclose(
                    found, want, rtol=TOLERANCE[want.dtype.name], atol=TOLERANCE[want.dtype.name]
                )
            else:
                np.testing.assert_array_equal(found.astype(want.dtype), want)


@pytest.mark.parametrize(("new", "past"), [(6, 0), (1, 4)])
def test_rows_of_different_lengths(new: int, past: int) -> None:
    """Of a shorter row its tokens and their slots count; what lies behind is arbitrary."""
    last = np.array([past + new - 2, past + new - 1], np.int32)
    cache = [f(2, 2, past, 16), f(2, 2, past, 16)]
    inputs = [grouped[:, :new], None, None, *cache, last, np.array(past + new, np.int32), cos, sin]
    attributes = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}
    model, feeds = Case("GroupQueryAttention", inputs, attributes, MICROSOFT, outputs=3).model("float32")
    want = run_session(open_session(model, session_options(optimize=False)), feeds)
    got = TorchGraph(model)({name: torch.tensor(array) for name, array in feeds.items()})
    for row, end in enumerate(last + 1):
        tokens = end if past == 0 else new
        np.testing.assert_allclose(got["y0"][row, :tokens].numpy(), want["y0"][row, :tokens], atol=2e-5)
        for name in ("y1", "y2"):
            np.testing.assert_allclose(got[name][row, :, :end].numpy(), want[name][row, :, :end], atol=2e-5)


def test_every_operator_has_a_case() -> None:
    """Products with packed weights are tested in test_torch_graph.py, as their weights are constants."""
    tested = {(case.domain, case.op) for case in CASES}
    assert set(TABLE) - tested == {(MICROSOFT, "MatMulNBits"), (MICROSOFT, "GatherBlockQuantized")}


OWN = {
    *("MultiHeadAttention", "Attention", "GroupQueryAttention", "RotaryEmbedding", "SkipLayerNormalization", "Softmax"),
    *("SkipSimplifiedLayerNormalization", "RMSNormalization", "LayerNormalization", "QuickGelu", "Selu", "GatherND"),
    *("BiasGelu", "GroupNormalization", "Conv", "AveragePool", "HardSigmoid", "PRelu", "ConvTranspose", "Gather"),
}
"""Operators that are more than a call of torch."""
DIFFERENTIABLE = [number for number, case in enumerate(CASES) if case.op in OWN]


@pytest.mark.parametrize("number", DIFFERENTIABLE, ids=[f"{n}-{CASES[n].op}" for n in DIFFERENTIABLE])
def test_derivatives(number: int) -> None:
    """torch's own against central differences in float64, along random directions."""
    model, feeds = CASES[number].model("float64")
    graph = TorchGraph(model)
    inputs = {name: torch.tensor(array) for name, array in feeds.items()}
    floats = [
        name for name, item in inputs.items() if item.is_floating_point() and item.numel() and item.isfinite().all()
    ]
    if not floats:
        return
    for name in floats:
        inputs[name].requires_grad_(True)
    seed = torch.Generator().manual_seed(0)

    def loss(of: dict[str, torch.Tensor]) -> torch.Tensor:
        results = [item for item in graph(of).values() if item.is_floating_point()]
        weights = torch.Generator().manual_seed(1)
        return sum(
            ((item * torch.randn(item.shape, generator=weights, dtype=torch.float64)).sum() for item in results),
            torch.zeros((), dtype=torch.float64),
        )

    gradients = torch.autograd.grad(loss(inputs), [inputs[name] for name in floats], allow_unused=True)
    for name, gradient in zip(floats, gradients, strict=True):
        direction = torch.randn(inputs[name].shape, generator=seed, dtype=torch.float64)
        along = 0.0 if gradient is None else float((gradient * direction).sum())
        step = 1e-6
        with torch.no_grad():
            ahead, behind = ({**inputs, name: inputs[name] + sign * step * direction} for sign in (1, -1))
            difference = float((loss(ahead) - loss(behind)) / (2 * step))
        assert along == pytest.approx(difference, rel=1e-4, abs=1e-5), name


def test_a_row_masked_away_has_no_derivative() -> None:
    """0 after the NaN of such a row, as exporters write it: torch's own softmax would give NaN to every weight."""
    x = torch.zeros(2, 3)
    x[1] = float("-inf")
    x.requires_grad_(True)
    model, _ = Case("Softmax", [x.detach().numpy()]).model("float32")
    y = TorchGraph(model)({"x0": x})["y0"]
    torch.where(y.isnan(), 0.0, y)[:, 0].sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and bool((x.grad[0] != 0).any())


def test_rounding_is_passed_straight_through() -> None:
    x = torch.tensor([0.3, 0.9, -7.0, 500.0], requires_grad=True)
    y = straight_through(x.clamp(0, 255), torch.round(x).clamp(0, 255))
    assert y.tolist() == [0, 1, 0, 255]
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 0, 0]


def test_a_quantized_pair_derives_as_identity_inside_the_range() -> None:
    """QuantizeLinear to DequantizeLinear: derivative 1 inside the range, 0 outside."""
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n] x, float s, uint8 z) => (float[n] y)'
    model = ir.from_onnx_text(f"{text} {{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }}")
    x = torch.tensor([0.34, -1.01, 3.0, -3.0], requires_grad=True)
    feeds = {"x": x, "s": torch.tensor(0.01), "z": torch.tensor(128, dtype=torch.uint8)}
    y = TorchGraph(model)(feeds)["y"]
    expected = run_session(
        open_session(model, session_options(optimize=False)),
        {name: item.detach().numpy() for name, item in feeds.items()},
    )
    np.testing.assert_allclose(y.detach().numpy(), expected["y"], rtol=1e-6)
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 0, 0]


PAST = f(2, 4, 5, 8)
SMOOTH = {"num_heads": 4, "kv_num_heads": 4, "smooth_softmax": 1}


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (Case("Resize", [X, None, np.ones(4, F4)]), "Resize (node)"),
        (Case("Pad", [X, i8(0, 0, 1, 1, 0, 0, 1, 1)], {"mode": "reflect"}), "mode='reflect'"),
        (Case("FusedMatMul", [X, X], {"transBatchA": 1}, MICROSOFT), "com.microsoft.FusedMatMul (node): transBatchA=1"),
        (Case("BatchNormalization", [X, f(3), f(3), f(3), f(3)], {"training_mode": 1}), "training_mode=1"),
        (Case("MultiHeadAttention", [q3, k3, v3, *[None] * 3, PAST, PAST], {"num_heads": 4}, MICROSOFT), "past_key"),
        (Case("GroupQueryAttention", [q3, k3, v3, None, None, i8(4), i8(5)], SMOOTH, MICROSOFT), "smooth_softmax"),
    ],
)  # fmt: skip
def test_what_is_not_executed_is_named(case: Case, says: str) -> None:
    model, _ = case.model("float32")
    assert any(says in line for line in unsupported(list(model.graph)))
