"""FuseGelu: every spelling against torch, and what only looks like it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.verify import relative_error, run_reference
from onnxlathe.passes import FuseGelu
from onnxlathe.runtime.capabilities import KernelCosts
from rewriting import from_text, ops, refused, rewrite, with_external_data

CONSTANTS = {
    "half": 0.5, "one": 1.0, "two": 2.0, "three": 3.0, "root2": math.sqrt(2), "inv2": math.sqrt(0.5),
    "c": math.sqrt(2 / math.pi), "k": 0.044715, "ck": math.sqrt(2 / math.pi) * 0.044715, "quick": 1.702,
    "short2": 1.4142, "shortc": 0.7979,
}  # fmt: skip


def build(body: str, outputs: str = "y", opset: int = 20, **extra: float) -> ir.Model:
    constants = {**CONSTANTS, **extra}
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    used = {name: np.float32(number) for name, number in constants.items() if name in words}
    declared = ", ".join(["float[n, 7] x", *(f"float {name}" for name in used)])
    return from_text(
        f'<ir_version: 10, opset_import: ["" : {opset}]> g ({declared}) => ({outputs}) {{ {body} }}', **used
    )


ERF = {
    "x * 0.5 * (1 + erf(x / sqrt 2))": "d = Div(x, root2) e = Erf(d) a = Add(e, one) h = Mul(x, half) y = Mul(h, a)",
    "(x * (1 + erf)) * 0.5": "d = Div(x, root2) e = Erf(d) a = Add(one, e) m = Mul(x, a) y = Mul(m, half)",
    "0.5 * ((1 + erf) * x)": "d = Mul(x, inv2) e = Erf(d) a = Add(e, one) m = Mul(a, x) y = Mul(half, m)",
    "((1 + erf) * 0.5) * x": "d = Mul(inv2, x) e = Erf(d) a = Add(e, one) m = Mul(a, half) y = Mul(x, m)",
    "x * (0.5 + 0.5 erf)": "d = Div(x, root2) e = Erf(d) m = Mul(half, e) a = Add(m, half) y = Mul(x, a)",
    "0.5 x + 0.5 x erf": "d = Div(x, root2) e = Erf(d) h = Mul(x, half) m = Mul(h, e) y = Add(m, h)",
    "1.4142": "d = Div(x, short2) e = Erf(d) a = Add(e, one) h = Mul(x, half) y = Mul(h, a)",
    "x * (1 + erf) / 2": "d = Div(x, root2) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Div(m, two)",
}
CUBE = "x2 = Mul(x, x) x3 = Mul(x2, x)"
TANH = {
    "Pow": "p = Pow(x, three) q = Mul(k, p) s = Add(x, q) u = Mul(c, s)",
    "Mul chain": f"{CUBE} q = Mul(x3, k) s = Add(q, x) u = Mul(s, c)",
    "0.7979": f"{CUBE} q = Mul(x3, k) s = Add(q, x) u = Mul(s, shortc)",
    "x (a + b x^2)": "x2 = Mul(x, x) q = Mul(x2, ck) s = Add(q, c) u = Mul(x, s)",
    "c x (1 + k x^2)": "x2 = Mul(x, x) q = Mul(k, x2) s = Add(one, q) v = Mul(x, c) u = Mul(v, s)",
}


@pytest.mark.parametrize("opset", [13, 20])
@pytest.mark.parametrize("name", ERF)
def test_erf_spellings(name: str, opset: int) -> None:
    torch = pytest.importorskip("torch")
    model = build(ERF[name], opset=opset)
    after, outcome = rewrite(FuseGelu(), model)
    assert outcome.counts == {"Gelu(erf)": 1}
    assert ops(after) == ({"Gelu": 1} if opset >= 20 else {"com.microsoft.Gelu": 1})
    x = np.linspace(-6, 6, 70, dtype=np.float32).reshape(10, 7)
    expected = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    assert relative_error(expected, run_reference(after, [{"x": x}])[0]["y"]) <= 1e-5


@pytest.mark.parametrize("opset", [13, 20])
@pytest.mark.parametrize("name", TANH)
def test_tanh_spellings(name: str, opset: int) -> None:
    torch = pytest.importorskip("torch")
    model = build(TANH[name] + " t = Tanh(u) a = Add(t, one) h = Mul(x, half) y = Mul(h, a)", opset=opset)
    after, outcome = rewrite(FuseGelu(), model)
    assert outcome.counts == {"Gelu(tanh)": 1}
    assert ops(after) == ({"Gelu": 1} if opset >= 20 else {"com.microsoft.FastGelu": 1})
    x = np.linspace(-6, 6, 70, dtype=np.float32).reshape(10, 7)
    expected = torch.nn.functional.gelu(torch.from_numpy(x), approximate="tanh").numpy()
    assert relative_error(expected, run_reference(after, [{"x": x}])[0]["y"]) <= 1e-5


@pytest.mark.parametrize(
    ("body", "rule", "alpha"),
    [
        ("s = Sigmoid(x) y = Mul(x, s)", "SiLU", 1.0),
        ("z = Mul(x, quick) s = Sigmoid(z) y = Mul(s, x)", "QuickGelu", 1.702),
    ],
)
def test_sigmoid_gates(body: str, rule: str, alpha: float) -> None:
    after, outcome = rewrite(FuseGelu(), build(body))
    assert outcome.counts == {rule: 1} and ops(after) == {"com.microsoft.QuickGelu": 1}
    assert next(iter(after.graph)).attributes["alpha"].value == pytest.approx(alpha)


def test_costs_decide_about_silu() -> None:
    costs = KernelCosts({"QuickGelu|128": 2.0, "Sigmoid+Mul|128": 1.0})
    model = build("s = Sigmoid(x) y = Mul(x, s)")
    refused(FuseGelu(), model, "measured faster", context=PassContext(costs=costs))


PLAIN = ERF["x * 0.5 * (1 + erf(x / sqrt 2))"]
NEAR_MISSES = {
    "other constant": (PLAIN.replace("root2", "two"), "y", "argument of erf"),
    "erf read elsewhere": (PLAIN, "y, a", "used elsewhere"),
    "product read elsewhere": (ERF["(x * (1 + erf)) * 0.5"], "y, m", "used elsewhere"),
    "cubic constant": (
        TANH["Pow"].replace("Mul(k,", "Mul(half,") + " t = Tanh(u) a = Add(t, one) h = Mul(x, half) y = Mul(h, a)",
        "y",
        "argument of tanh",
    ),
    "factor of another tensor": (
        PLAIN.replace("h = Mul(x, half)", "n = Neg(x) o = Exp(n) h = Mul(o, half)"),
        "y",
        "no part",
    ),
    "bias inside": (PLAIN.replace("Mul(h, a)", "Add(h, a)"), "y", "no part"),
    "gate itself is an output": ("z = Mul(x, quick) s = Sigmoid(z) y = Mul(s, x)", "y, s", "used elsewhere"),
    "negated gate": (PLAIN.replace("a = Add(e, one)", "o = Neg(e) a = Add(o, one)"), "y", "no part"),
    "plain erf": ("y = Erf(x)", "y", ""),
    "gate of another tensor": ("n = Exp(x) s = Sigmoid(n) y = Mul(x, s)", "y", ""),
    "x squared": ("s = Sigmoid(x) z = Mul(x, x) y = Mul(z, s)", "y", ""),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case: str) -> None:
    body, outputs, reason = NEAR_MISSES[case]
    refused(FuseGelu(), build(body, outputs), reason)


def test_argument_may_itself_be_scaled() -> None:
    """The tensor of the activation is found, not the one furthest up."""
    after, _ = rewrite(FuseGelu(), build("p = Mul(x, two) " + PLAIN.replace("x", "p")))
    assert ops(after) == {"Mul": 1, "Gelu": 1}


@pytest.mark.parametrize("body", [PLAIN, TANH["Pow"] + " t = Tanh(u) a = Add(t, one) h = Mul(x, half) y = Mul(h, a)"])
def test_constants_rounded_to_half_precision(body: str) -> None:
    used = {name: np.float16(number) for name, number in CONSTANTS.items() if name in re.findall(r"\w+", body)}
    declared = ", ".join(["float16[n, 7] x", *(f"float16 {name}" for name in used)])
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({declared}) => (float16[n, 7] y) {{ {body} }}'
    after, _ = rewrite(FuseGelu(), from_text(text, **used), tolerance=3e-3)
    assert ops(after) == {"Gelu": 1}


@pytest.mark.parametrize("body", [PLAIN, "z = Mul(x, half) s = Sigmoid(z) y = Mul(x, s)"])
def test_constant_that_adds_an_axis(body: str) -> None:
    used = {name: np.float32(number) for name, number in CONSTANTS.items() if name in re.findall(r"\w+", body)}
    used["half"] = np.full((1, 1, 1), 0.5, np.float32)
    declared = ", ".join(["float[n, 7] x", *(f"float{list(array.shape) or ''} {name}" for name, array in used.items())])
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({declared}) => (float[1, n, 7] y) {{ {body} }}'
    refused(FuseGelu(), from_text(text, **used), "more axes")


def test_not_across_the_border_of_a_subgraph() -> None:
    """What a branch or loop body reads from outside stays outside."""
    branch = "h = Mul(x, half) t = Mul(h, a)"
    model = from_text(
        f"""<ir_version: 10, opset_import: ["" : 20]> g (float[n, 7] x, bool c, float half, float one, float root2)
        => (y) {{ d = Div(x, root2) e = Erf(d) a = Add(e, one)
        y = If(c) <then_branch = p () => (float[n, 7] t) {{ {branch} }},
                   else_branch = q () => (float[n, 7] u) {{ u = Neg(x) }}> }}""",
        **{name: np.float32(CONSTANTS[name]) for name in ("half", "one", "root2")},
    )
    refused(FuseGelu(), model, "also used elsewhere", nested=False)


def test_present_ones_are_noted() -> None:
    outcome = refused(FuseGelu(), build("y = Gelu(x)"))
    assert outcome.notes == ["1 Gelu nodes were there already"]


def test_shared_input_and_cube() -> None:
    """x is read by others, and x^2 too: it stays for them."""
    body = TANH["Mul chain"] + " t = Tanh(u) a = Add(t, one) h = Mul(x, half) g = Mul(h, a) y = Add(g, x2)"
    after, _ = rewrite(FuseGelu(), build(body))
    assert ops(after) == {"Gelu": 1, "Mul": 1, "Add": 1}


def test_external_data(tmp_path: Path) -> None:
    text = PLAIN.replace("x", "p").replace("d = Div(p", "p = MatMul(x, w) d = Div(p")
    used = {name: np.float32(CONSTANTS[name]) for name in ("half", "one", "root2")}
    declared = ", ".join(["float[n, 7] x", "float[7, 300] w", *(f"float {name}" for name in used)])
    model = from_text(
        f'<ir_version: 10, opset_import: ["" : 20]> g ({declared}) => (y) {{ {text} }}',
        w=np.ones((7, 300), np.float32),
        **used,
    )
    after, _ = rewrite(FuseGelu(), with_external_data(model, tmp_path), nested=False)
    assert ops(after) == {"MatMul": 1, "Gelu": 1}
