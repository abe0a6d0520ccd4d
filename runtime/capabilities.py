"""What kernels cost on this machine, so that passes choose between equivalent forms without timing whole models.

Each form below is a tiny model; ``KernelCosts.of_machine`` times all of them once (a few seconds, ONNX Runtime's own
optimizations off) for few, some and many rows, and keeps the table in ``$XDG_CACHE_HOME/onnxlathe`` (default
``~/.cache/onnxlathe``), keyed by CPU, onnxruntime version, device, threads and the forms themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from .benchmark import fastest
from .environment import cpu_name
from .errors import LatheError
from .inference import session_options
from .providers import Device, providers_for

WIDTH = 384
ROWS = (1, 16, 128, 1024)
_HEADS = 12

# Equivalent forms stand together. x, r: [rows, WIDTH]; g, b: [WIDTH]; w: [WIDTH, WIDTH].
_ROW_FORMS = {
    "Add+LayerNormalization": "s = Add(x, r)  y = LayerNormalization<axis=-1>(s, g, b)",
    "Sum+LayerNormalization": "s = Sum(x, r)  y = LayerNormalization<axis=-1>(s, g, b)",
    "SkipLayerNormalization": "y = com.microsoft.SkipLayerNormalization(x, r, g, b)",
    "Add+SimplifiedLayerNormalization": "s = Add(x, r)  y = SimplifiedLayerNormalization<axis=-1>(s, g)",
    "Add+RMSNormalization": "s = Add(x, r)  y = RMSNormalization<axis=-1>(s, g)",
    "SkipSimplifiedLayerNormalization": "y = com.microsoft.SkipSimplifiedLayerNormalization(x, r, g)",
    "Gelu": "y = Gelu(x)",
    "com.microsoft.Gelu": "y = com.microsoft.Gelu(x)",
    "Add+Gelu": "s = Add(x, b)  y = Gelu(s)",
    "BiasGelu": "y = com.microsoft.BiasGelu(x, b)",
    "Gelu(tanh)": 'y = Gelu<approximate="tanh">(x)',
    "FastGelu": "y = com.microsoft.FastGelu(x)",
    "Sigmoid+Mul": "s = Sigmoid(x)  y = Mul(x, s)",
    "QuickGelu": "y = com.microsoft.QuickGelu<alpha=1.0>(x)",
    "MatMul+Add": "s = MatMul(x, w)  y = Add(s, b)",
    "Gemm": "y = Gemm(x, w, b)",
}
# q, k, v: [1, rows, WIDTH] with 12 heads; m: [1, 1, rows, rows] added to the scores.
_ATTENTION_FORMS = {
    "Attention": "y = Attention<q_num_heads=12, kv_num_heads=12>(q, k, v, m)",
    "MultiHeadAttention": "y = com.microsoft.MultiHeadAttention<num_heads=12>(q, k, v, , , m)",
    "MatMul+Softmax+MatMul": """
        qr = Reshape(q, split)  kr = Reshape(k, split)  vr = Reshape(v, split)
        qt = Transpose<perm=[0,2,1,3]>(qr)  kt = Transpose<perm=[0,2,3,1]>(kr)  vt = Transpose<perm=[0,2,1,3]>(vr)
        s = MatMul(qt, kt)  sc = Mul(s, scale)  sm = Add(sc, m)  p = Softmax<axis=-1>(sm)
        c = MatMul(p, vt)  ct = Transpose<perm=[0,2,1,3]>(c)  y = Reshape(ct, merge)""",
}
_HEADER = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> form '
_ROW_SIGNATURE = f"""(float[n, {WIDTH}] x, float[n, {WIDTH}] r) => (float[n, {WIDTH}] y)
    <float[{WIDTH}] g, float[{WIDTH}] b, float[{WIDTH}, {WIDTH}] w>"""
_ATTENTION_SIGNATURE = f"""(float[1, n, {WIDTH}] q, float[1, n, {WIDTH}] k, float[1, n, {WIDTH}] v, float[1, 1, n, n] m)
    => (float[1, n, {WIDTH}] y)
    <int64[4] split = {{0, 0, {_HEADS}, {WIDTH // _HEADS}}}, int64[3] merge = {{0, 0, {WIDTH}}},
     float scale = {{0.17677669}}>"""


@dataclasses.dataclass(frozen=True)
class KernelCosts:
    """Measured nanoseconds per element of equivalent forms.

    Attributes:
        table: ``{"form|rows": nanoseconds per element}``; empty: nothing is known.
    """

    table: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict[str, float]())

    def faster(self, form: str, other: str, rows: int = 128) -> bool | None:
        """Whether ``form`` costs less than ``other`` at the nearest measured number of rows; None if unknown."""
        ratio = self.ratio(form, other, rows)
        return None if ratio is None else ratio < 1.0

    def ratio(self, form: str, other: str, rows: int = 128) -> float | None:
        """Cost of ``form`` over cost of ``other``, or None if either was not measured."""
        nearest = min(ROWS, key=lambda size: abs(np.log(size / max(rows, 1))))
        a, b = self.table.get(f"{form}|{nearest}"), self.table.get(f"{other}|{nearest}")
        return None if a is None or b is None else a / b

    @classmethod
    def of_machine(
        cls, device: Device = "cpu", threads: int = 0, progress: Callable[[str], None] = lambda message: None
    ) -> KernelCosts:
        """The table of this machine: from the cache, or measured now and cached."""
        path = _cache_file(device, threads)
        if path.is_file():
            try:
                return cls(json.loads(path.read_text())["costs"])
            except (ValueError, KeyError):  # a damaged cache is measured again
                pass
        progress("measuring kernel costs of this machine (once)")
        table = measure(device, threads)
        _write_cache(path, {"cpu": cpu_name(), "onnxruntime": ort.__version__, "costs": table})
        return cls(table)


def measure(device: Device = "cpu", threads: int = 0, budget: float = 0.02) -> dict[str, float]:
    """Times every form at every number of rows; forms this onnxruntime cannot run are left out.

    Args:
        device: execution provider.
        threads: intra-op threads, 0 for ORT's default.
        budget: seconds per form and size; the fastest run counts, as other work on the machine only adds time.

    Returns:
        ``{"form|rows": nanoseconds per element of the output}``.
    """
    table: dict[str, float] = {}
    for form in (*_ROW_FORMS, *_ATTENTION_FORMS):
        try:
            session = _open(form, device, threads)
        except Exception:  # ORT raises untyped errors for operators it does not know
            continue
        for rows in ROWS:
            feeds = _feeds(session, rows)
            seconds = fastest(functools.partial(session.run, None, feeds), budget)
            table[f"{form}|{rows}"] = seconds * 1e9 / (rows * WIDTH)
    return table


def form_model(form: str) -> onnx.ModelProto:
    """The tiny model that stands for ``form``."""
    if form in _ROW_FORMS:
        model = onnx.parser.parse_model(_HEADER + _ROW_SIGNATURE + "{ " + _ROW_FORMS[form] + " }")
        rng = np.random.default_rng(0)
        for name, shape in (("g", (WIDTH,)), ("b", (WIDTH,)), ("w", (WIDTH, WIDTH))):
            array = rng.standard_normal(shape).astype(np.float32) * 0.05
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return model
    if form in _ATTENTION_FORMS:
        return onnx.parser.parse_model(_HEADER + _ATTENTION_SIGNATURE + "{ " + _ATTENTION_FORMS[form] + " }")
    raise LatheError(f"There is no kernel form {form!r}.", f"Forms: {', '.join((*_ROW_FORMS, *_ATTENTION_FORMS))}.")


def _open(form: str, device: Device, threads: int) -> ort.InferenceSession:
    options = session_options(threads=threads, optimize=False)
    options.log_severity_level = 4
    return ort.InferenceSession(form_model(form).SerializeToString(), options, providers=providers_for(device))


def _feeds(session: ort.InferenceSession, rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {value.name: [rows if dim == "n" else dim for dim in value.shape] for value in session.get_inputs()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@functools.cache
def _cache_file(device: Device, threads: int) -> Path:
    machine = [cpu_name(), ort.__version__, device, threads, os.cpu_count()]
    key = json.dumps([*machine, ROWS, _ROW_FORMS, _ATTENTION_FORMS])
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "onnxlathe" / f"kernel-costs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _write_cache(path: Path, content: dict[str, Any]) -> None:
    """Caches if it can; a read-only home only costs the measurement again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(content, file, indent=1)
        Path(file.name).replace(path)
    except OSError:
        pass
