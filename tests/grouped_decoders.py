"""Small random decoders with a key/value cache as ONNX text, whose parts can be exchanged one by one.

``decoder(Spec(...))`` builds the graph, ``reference`` computes the same logits in NumPy, text by text without any
padding, ``samples`` makes the steps on which two versions are compared.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from rewriting import from_text

Array = np.ndarray[Any, Any]
VOCABULARY, LOW = 40, float(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """How one layer turns Q and K."""

    width: int
    interleaved: bool = False
    angles: Literal["ids", "range", "table"] = "ids"
    theta: float = 100.0


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a decoder computes and how it is spelled; tuples hold one entry a layer.

    Attributes:
        replaced: pairs of text and replacement, applied to the finished ONNX text, for near misses.
        extra: constants that the replacements read.
        inputs: more graph inputs; likewise ``outputs``.
    """

    heads: int = 4
    kv_heads: int = 2
    size: int = 16
    rotary: tuple[Rotary | None, ...] = (Rotary(16), Rotary(16))
    windows: tuple[int, ...] = (0, 0)
    repeat: Literal["expand", "tile", "none"] = "expand"
    scale: Literal["scores", "divided", "q", "k", "both", "none"] = "scores"
    factor: float = 0.0
    softcap: float = 0.0
    norm: bool = False
    mask: Literal["where", "add", "fill", "attention"] = "add"
    packed: Literal["no", "slice", "split", "per head"] = "no"
    learned: bool = False
    mask_type: Literal["int64", "int32", "bool", "float"] = "int64"
    replaced: tuple[tuple[str, str], ...] = ()
    extra: dict[str, Array] = dataclasses.field(default_factory=dict[str, Array])
    inputs: str = ""
    outputs: str = ""

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return 24

    @property
    def used_scale(self) -> float:
        """The factor of the scores."""
        return 1.0 if self.scale == "none" else self.factor or self.size**-0.5

    @property
    def has_positions(self) -> bool:
        """Whether position_ids are an input."""
        return self.learned or any(item is not None and item.angles != "range" for item in self.rotary)


def weights(spec: Spec) -> dict[str, Array]:
    """The weights of ``spec``, always the same for one shape."""
    rng = np.random.default_rng(7)
    q, kv = spec.heads * spec.size, spec.kv_heads * spec.size
    found = {"embed": rng.standard_normal((VOCABULARY, spec.hidden)), "places": rng.standard_normal((64, spec.hidden))}
    found |= {"head": rng.standard_normal((spec.hidden, VOCABULARY)) * 0.3, "g": rng.uniform(0.5, 1.5, spec.hidden)}
    for i in range(len(spec.rotary)):
        for name, width in (("wq", q), ("wk", kv), ("wv", kv)):
            found[f"{name}{i}"] = rng.standard_normal((spec.hidden, width)) * 0.3
        found[f"wo{i}"] = rng.standard_normal((q, spec.hidden)) * 0.3
        found |= {f"gq{i}": rng.uniform(0.5, 1.5, spec.size), f"gk{i}": rng.uniform(0.5, 1.5, spec.size)}
    return {name: array.astype(np.float32) for name, array in found.items()}


def _frequencies(rotary: Rotary) -> Array:
    return (rotary.theta ** (-np.arange(0, rotary.width, 2) / rotary.width)).astype(np.float32)


class _Text:
    """Collects lines of ONNX text and the constants they read."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, Array] = {}

    def ints(self, *numbers: int) -> str:
        name = "i" + "_".join(str(number).replace("-", "m") for number in numbers)
        self.constants[name] = np.array(numbers, np.int64)
        return name

    def number(self, value: float | int) -> str:
        name = "s" + re.sub(r"\W", "_", repr(value)).replace("_", "p")
        self.constants[name] = np.array(value, np.int64 if isinstance(value, int) else np.float32)
        return name

    def add(self, text: str) -> None:
        self.lines.append("  " + text)


def decoder(spec: Spec) -> ir.Model:
    """The graph of ``spec``: input_ids, attention_mask, perhaps position_ids, caches -> logits, caches."""
    text = _Text()
    w = weights(spec)
    one, zero, two = text.ints(1), text.ints(0), text.ints(2)
    s0, s1 = text.number(0), text.number(1)
    text.add("t1 = Shape<start=1, end=2>(attention_mask) total = Squeeze(t1) n1 = Shape<start=1, end=2>(input_ids)")
    text.add(f"new = Squeeze(n1) past = Sub(total, new) keys = Range({s0}, total, {s1}) own = Range(past, total, {s1})")
    text.add(f"own2 = Unsqueeze(own, {one}) causal = LessOrEqual(keys, own2) away = Sub(own2, keys)")
    text.add(f"seen = Cast<to=9>(attention_mask) padding = Unsqueeze(seen, {text.ints(1, 2)})")
    text.add("h_0 = Gather(embed, input_ids)")
    if spec.learned:
        text.lines[-1] = (
            "  tokens = Gather(embed, input_ids) place = Gather(places, position_ids) h_0 = Add(tokens, place)"
        )
    for i, window in enumerate(spec.windows):
        if window:
            text.add(f"near{i} = Less(away, {text.number(window)}) here{i} = And(causal, near{i})")
        text.add(f"keep{i} = And(padding, {f'here{i}' if window else 'causal'})")
        _layer(text, spec, i, one, two, zero)
    layers = len(spec.rotary)
    text.add(f"last = RMSNormalization<axis=-1>(h_{layers}, g) logits = MatMul(last, head)")
    body = "\n".join(text.lines)
    for old, new in spec.replaced:
        body = body.replace(old, new)
    constants = {**w, **text.constants, **spec.extra}
    used = {name: array for name, array in constants.items() if re.search(rf"\b{name}\b", body)}
    kinds = {"float32": "float", "int64": "int64", "bool": "bool"}
    kinds_of = [f"{kinds[str(a.dtype)]}[{','.join(map(str, a.shape))}] {n}" for n, a in used.items()]
    caches = [f"{i}_{kind}" for i in range(layers) for kind in ("key", "value")]
    cache = f"float[batch, {spec.kv_heads}, {{}}, {spec.size}]"
    inputs = ["int64[batch, sequence] input_ids", f"{spec.mask_type}[batch, total] attention_mask"]
    inputs += ["int64[batch, sequence] position_ids"] * spec.has_positions + [spec.inputs] * bool(spec.inputs)
    inputs += [f"{cache.format('past')} past_{name}" for name in caches] + kinds_of
    outputs = [f"float[batch, sequence, {VOCABULARY}] logits"] + [spec.outputs] * bool(spec.outputs)
    outputs += [f"{cache.format('total')} present_{name}" for name in caches]
    header = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
    whole = f"{header} decoder ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{body}\n}}"
    for old, new in spec.replaced:
        assert old in whole or new in whole, f"{old!r} is not in the text"
        whole = whole.replace(old, new) if old in whole and new not in whole else whole
    model = from_text(whole, **used)
    for value in [*model.graph.inputs, *model.graph.outputs]:  # the parser takes no such names
        if match := re.fullmatch(r"(past|present)_(\d+)_(key|value)", value.name or ""):
            value.name = f"{'past_key_values' if match[1] == 'past' else 'present'}.{match[2]}.{match[3]}"
    return model


def _layer(text: _Text, spec: Spec, i: int, one: str, two: str, zero: str) -> None:
    heads, kv, size = spec.heads, spec.kv_heads, spec.size
    text.add(f"x{i} = RMSNormalization<axis=-1>(h_{i}, g)")
    _projections(text, spec, i)
    for name in "qkv":
        if spec.packed != "per head":
            shape = text.ints(0, 0, heads if name == "q" else kv, size)
            text.add(f"{name}s{i} = Reshape({name}p{i}, {shape})")
        if spec.norm and name != "v":
            text.add(f"{name}n{i} = RMSNormalization<axis=-1>({name}s{i}, g{name}{i})")
        split = f"{name}n{i}" if spec.norm and name != "v" else f"{name}s{i}"
        text.add(f"{name}t{i} = Transpose<perm=[0,2,1,3]>({split})")
    rotary = spec.rotary[i]
    q, k = f"qt{i}", f"kt{i}"
    if rotary is not None:
        _angles(text, rotary, i)
        q, k = (_rotate(text, rotary, name, i, size) for name in ("q", "k"))
    factor = spec.used_scale
    if spec.scale in ("q", "both"):
        text.add(f"qf{i} = Mul({q}, {text.number(factor if spec.scale == 'q' else factor**0.5)})")
        q = f"qf{i}"
    text.add(
        f"present_{i}_key = Concat<axis=2>(past_{i}_key, {k}) present_{i}_value = Concat<axis=2>(past_{i}_value, vt{i})"
    )
    k, v = _repeated(text, spec, i, two)
    if spec.scale in ("k", "both"):
        text.add(f"kf{i} = Mul({k}, {text.number(factor if spec.scale == 'k' else factor**0.5)})")
        k = f"kf{i}"
    _attention(text, spec, i, q, k, v)
    text.add(f"ct{i} = Transpose<perm=[0,2,1,3]>(c{i}) a{i} = Reshape(ct{i}, {text.ints(0, 0, heads * size)})")
    text.add(f"o{i} = MatMul(a{i}, wo{i}) h_{i + 1} = Add(h_{i}, o{i})")


def _projections(text: _Text, spec: Spec, i: int) -> None:
    heads, kv, size = spec.heads, spec.kv_heads, spec.size
    if spec.packed == "no":
        for name in "qkv":
            text.add(f"{name}p{i} = MatMul(x{i}, w{name}{i})")
        return
    w = weights(spec)
    parts = [w[f"w{name}{i}"] for name in "qkv"]
    if spec.packed == "per head":  # GPT-NeoX
        stacked = np.stack([part.reshape(-1, heads, size) for part in parts], axis=2)
        text.constants[f"wqkv{i}"] = stacked.reshape(spec.hidden, -1)
        text.add(f"qkv{i} = MatMul(x{i}, wqkv{i}) qkvs{i} = Reshape(qkv{i}, {text.ints(0, 0, heads, 3 * size)})")
        text.add(f"qs{i}, ks{i}, vs{i} = Split<axis=-1, num_outputs=3>(qkvs{i})")
        return
    text.constants[f"wqkv{i}"] = np.concatenate(parts, axis=1)
    text.add(f"qkv{i} = MatMul(x{i}, wqkv{i})")
    widths = [heads * size, kv * size, kv * size]
    if spec.packed == "split":
        text.add(f"qp{i}, kp{i}, vp{i} = Split<axis=-1>(qkv{i}, {text.ints(*widths)})")
        return
    start = 0
    for name, width in zip("qkv", widths, strict=True):
        text.add(f"{name}p{i} = Slice(qkv{i}, {text.ints(start)}, {text.ints(start + width)}, {text.ints(2)})")
        start += width


def _angles(text: _Text, rotary: Rotary, i: int) -> None:
    frequencies = _frequencies(rotary)
    text.constants[f"frequency{i}"] = frequencies
    one, last = text.ints(1), text.ints(-1)
    if rotary.angles == "table":
        angles = np.outer(np.arange(64, dtype=np.float32), frequencies)
        text.constants |= {f"coses{i}": np.cos(angles), f"sines{i}": np.sin(angles)}
        text.add(f"cg{i} = Gather(coses{i}, position_ids) sg{i} = Gather(sines{i}, position_ids)")
    else:
        source = "position_ids" if rotary.angles == "ids" else "own"
        text.add(f"float{i} = Cast<to=1>({source}) column{i} = Unsqueeze(float{i}, {last})")
        text.add(f"angle{i} = Mul(column{i}, frequency{i}) cg{i} = Cos(angle{i}) sg{i} = Sin(angle{i})")
    axes = one if rotary.angles != "range" else text.ints(0, 1)
    text.add(f"cos{i} = Unsqueeze(cg{i}, {axes}) sin{i} = Unsqueeze(sg{i}, {axes})")


def _rotate(text: _Text, rotary: Rotary, name: str, i: int, size: int) -> str:
    p, source, width = f"{name}{i}", f"{name}t{i}", rotary.width
    axis, zero, end, half = text.ints(3), text.ints(0), text.ints(width), text.ints(width // 2)
    if rotary.interleaved:
        step = text.ints(2)
        text.add(
            f"{p}a = Slice({source}, {zero}, {end}, {axis}, {step}) "
            f"{p}b = Slice({source}, {text.ints(1)}, {end}, {axis}, {step})"
        )
    else:
        text.add(f"{p}a = Slice({source}, {zero}, {half}, {axis}) {p}b = Slice({source}, {half}, {end}, {axis})")
    text.add(f"{p}ac = Mul({p}a, cos{i}) {p}bs = Mul({p}b, sin{i}) {p}y = Sub({p}ac, {p}bs)")
    text.add(f"{p}as = Mul({p}a, sin{i}) {p}bc = Mul({p}b, cos{i}) {p}z = Add({p}bc, {p}as)")
    if rotary.interleaved:
        text.add(f"{p}y5 = Unsqueeze({p}y, {text.ints(4)}) {p}z5 = Unsqueeze({p}z, {text.ints(4)})")
        text.add(f"{p}yz = Concat<axis=4>({p}y5, {p}z5) {p}r = Reshape({p}yz, {text.ints(0, 0, 0, width)})")
    else:
        text.add(f"{p}r = Concat<axis=3>({p}y, {p}z)")
    if width == size:
        return f"{p}r"
    text.add(f"{p}rest = Slice({source}, {end}, {text.ints(size)}, {axis}) {p}w = Concat<axis=3>({p}r, {p}rest)")
    return f"{p}w"


def _repeated(text: _Text, spec: Spec, i: int, two: str) -> tuple[str, str]:
    group = spec.heads // spec.kv_heads
    if spec.repeat == "none":
        return f"present_{i}_key", f"present_{i}_value"
    for name, kind in (("k", "key"), ("v", "value")):
        text.add(f"{name}five{i} = Unsqueeze(present_{i}_{kind}, {two})")
        if spec.repeat == "tile":
            text.add(f"{name}wide{i} = Tile({name}five{i}, {text.ints(1, 1, group, 1, 1)})")
        else:
            text.add(f"{name}wide{i} = Expand({name}five{i}, {text.ints(1, 1, group, 1, 1)})")
        shape = text.ints(0, spec.heads, -1, spec.size)
        text.add(f"{name}all{i} = Reshape({name}wide{i}, {shape})")
    return f"kall{i}", f"vall{i}"


def _attention(text: _Text, spec: Spec, i: int, q: str, k: str, v: str) -> None:
    low = text.number(LOW)
    if spec.mask == "attention":
        text.add(f"c{i} = Attention<scale={spec.used_scale:.9f}, softcap={spec.softcap:.3f}>({q}, {k}, {v}, keep{i})")
        return
    text.add(f"kT{i} = Transpose<perm=[0,1,3,2]>({k}) scores{i} = MatMul({q}, kT{i})")
    scores = f"scores{i}"
    if spec.scale in ("scores", "divided"):
        op, factor = ("Mul", spec.used_scale) if spec.scale == "scores" else ("Div", 1 / spec.used_scale)
        text.add(f"scaled{i} = {op}({scores}, {text.number(factor)})")
        scores = f"scaled{i}"
    if spec.softcap:
        cap = text.number(float(spec.softcap))
        text.add(f"less{i} = Div({scores}, {cap}) tanh{i} = Tanh(less{i}) capped{i} = Mul(tanh{i}, {cap})")
        scores = f"capped{i}"
    if spec.mask == "where":
        text.add(f"masked{i} = Where(keep{i}, {scores}, {low})")
    elif spec.mask == "fill":
        text.add(f"never{i} = Not(keep{i}) masked{i} = Where(never{i}, {low}, {scores})")
    else:
        text.add(f"bias{i} = Where(keep{i}, {text.number(0.0)}, {low}) masked{i} = Add({scores}, bias{i})")
    text.add(f"p{i} = Softmax<axis=-1>(masked{i}) c{i} = MatMul(p{i}, {v})")


def step(spec: Spec, mask: Array, new: int, seed: int = 0) -> dict[str, Array]:
    """The inputs of one step where ``mask`` [batch, past + new] says what is padding; the cache is random."""
    rng = np.random.default_rng(seed)
    batch, total = mask.shape
    kinds: dict[str, Any] = {"int64": np.int64, "int32": np.int32, "bool": np.bool_, "float": np.float32}
    feeds: dict[str, Array] = {
        "input_ids": rng.integers(0, VOCABULARY, (batch, new)),
        "attention_mask": mask.astype(kinds[spec.mask_type]),
    }
    if spec.has_positions:
        feeds["position_ids"] = np.maximum(mask.astype(np.int64).cumsum(1) - 1, 0)[:, total - new :]
    for i in range(len(spec.rotary)):
        for kind in ("key", "value"):
            cache = rng.standard_normal((batch, spec.kv_heads, total - new, spec.size))
            feeds[f"past_key_values.{i}.{kind}"] = cache.astype(np.float32)
    return feeds


def samples(spec: Spec) -> list[dict[str, Array]]:
    """Prompts with padding left, right and in between; steps from a full cache. A cache that has padding is made by
    the graph itself: ``run_reference`` runs the step after each padded sample."""
    prompt = np.ones((3, 7), np.int64)
    prompt[0, :3] = 0
    if not any(spec.windows) and all(item is None or item.angles != "range" for item in spec.rotary):
        prompt[1, 5:] = prompt[2, 3:5] = 0  # else the original counts slots in the step after
    return [
        step(spec, np.ones((1, 12), np.int64), 1),
        step(spec, np.ones((3, 9), np.int64), 1),
        step(spec, np.ones((1, 11), np.int64), 4),
        step(spec, np.ones((2, 6), np.int64), 6),
        step(spec, prompt, 7),
    ]


def reference(spec: Spec, ids: Array) -> Array:
    """Logits [sequence, vocabulary] of one text without padding, written from the equations (Su et al. 2021)."""
    w = {name: array.astype(np.float64) for name, array in weights(spec).items()}

    def norm(x: Array, g: Array) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * g

    count = ids.size
    h = w["embed"][ids] + (w["places"][:count] if spec.learned else 0)
    for i, rotary in enumerate(spec.rotary):
        x = norm(h, w["g"])
        q, k, v = ((x @ w[f"w{name}{i}"]).reshape(count, -1, spec.size) for name in "qkv")
        if spec.norm:
            q, k = norm(q, w[f"gq{i}"]), norm(k, w[f"gk{i}"])
        if rotary is not None:
            turn = np.exp(1j * np.outer(np.arange(count), _frequencies(rotary)))[:, None]
            q, k = (_turned(part, turn, rotary) for part in (q, k))
        k, v = (np.repeat(part, spec.heads // spec.kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) * spec.used_scale
        if spec.softcap:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        distance = np.arange(count)[:, None] - np.arange(count)
        allowed = (distance >= 0) & (distance < (spec.windows[i] or count))
        p = np.exp(np.where(allowed, scores, -np.inf))
        h = h + np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(count, -1) @ w[f"wo{i}"]
    return norm(h, w["g"]) @ w["head"]


def _turned(x: Array, turn: Array, rotary: Rotary) -> Array:
    pairs = x[..., : rotary.width]
    half = rotary.width // 2
    first, second = (
        (pairs[..., ::2], pairs[..., 1::2]) if rotary.interleaved else (pairs[..., :half], pairs[..., half:])
    )
    turned = (first + 1j * second) * turn
    parts = [turned.real, turned.imag]
    done = np.stack(parts, -1).reshape(pairs.shape) if rotary.interleaved else np.concatenate(parts, -1)
    return np.concatenate([done, x[..., rotary.width :]], -1)
