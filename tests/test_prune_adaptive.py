"""Adaptive pruning: the choice against brute force, parts left out whole, quality, caches, the student."""

from __future__ import annotations

import itertools
from typing import Any

import grouped_decoders
import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.budget import Budget
from onnxlathe.compiler.graph import weight_bytes
from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.compiler.verify import check_structure, compare, run_reference
from onnxlathe.passes import PruneAdaptive
from onnxlathe.passes.low_bit.mixed_precision import solve
from onnxlathe.passes.pruning import prune_adaptive
from onnxlathe.passes.pruning.blocks import residual_stream
from onnxlathe.passes.pruning.choices import leave_bias, modules_of, shrunk
from onnxlathe.passes.pruning.coupling_rules import coupling_of
from onnxlathe.passes.pruning.fit import mask
from onnxlathe.passes.pruning.part_costs import part_bytes, part_times
from onnxlathe.runtime.errors import PassError
from onnxlathe.runtime.feeds import make_feeds
from rewriting import from_text

RNG = np.random.default_rng(0)


def layers(count: int = 3, width: int = 64, idle: int = 1) -> ir.Model:
    """Residual feed-forward layers; that of number ``idle`` adds nearly nothing but its bias."""
    body = "\n".join(
        f"n{i} = LayerNormalization(h{i}, s)  a{i} = MatMul(n{i}, w{i})  c{i} = Add(a{i}, q{i})  g{i} = Gelu(c{i})"
        f"  d{i} = MatMul(g{i}, v{i})  e{i} = Add(d{i}, b{i})  h{i + 1} = Add(h{i}, e{i})"
        for i in range(count)
    )
    weights = {"s": np.ones(8), "p": RNG.standard_normal((8, 8)) / 2, "head": RNG.standard_normal((8, 4)) / 2}
    for i in range(count):
        scale = 0.002 if i == idle else 0.5
        weights |= {f"w{i}": RNG.standard_normal((8, width)), f"v{i}": RNG.standard_normal((width, 8)) * scale}
        weights |= {f"q{i}": RNG.standard_normal(width) / 4, f"b{i}": RNG.standard_normal(8)}
    arrays = {name: np.asarray(array, np.float32) for name, array in weights.items()}
    declared = ", ".join(f"float{list(array.shape)} {name}" for name, array in arrays.items())
    text = f"""<ir_version: 10, opset_import: ["" : 20]> g (float[n, 5, 8] x, {declared}) => (float[n, 5, 4] y) {{
        h0 = MatMul(x, p)  {body}  y = MatMul(h{count}, head) }}"""
    return from_text(text, **arrays)


def samples(model: ir.Model, count: int = 8, start: int = 0) -> list[dict[str, np.ndarray]]:
    sizes = {"n": 32, "batch": 4, "sequence": 12, "past_sequence": 0}
    return [make_feeds(model, seed=seed, count=1, sizes=sizes)[0] for seed in range(start, start + count)]


def pruned(model: ir.Model, step: PruneAdaptive) -> tuple[ir.Model, Any]:
    after = load_model(model)
    infer_shapes(after)
    outcome = step(after, PassContext(feeds=samples(model), threads=1))
    check_structure(after)
    return after, outcome


def lost(model: ir.Model, after: ir.Model) -> float:
    feeds = samples(model, 4, 50)
    pairs = zip(run_reference(model, feeds), run_reference(after, feeds), strict=True)
    parts = [(np.square(a["y"] - b["y"]).sum(), np.square(a["y"]).sum()) for a, b in pairs]
    return float(sum(part[0] for part in parts) / sum(part[1] for part in parts))


def test_the_branch_that_does_nothing_goes_first() -> None:
    model = layers()
    after, outcome = pruned(model, PruneAdaptive(bytes=0.7, multiple=8))
    assert weight_bytes(after) <= 0.7 * weight_bytes(model)
    assert outcome.counts["branches left out"] == 1
    names = {value.name for value in after.graph.initializers.values()}
    assert not {"w1", "v1"} & names and {"w0", "v0", "w2", "v2"} <= names
    assert lost(model, after) < 1e-3


def test_the_sum_of_effects_is_the_least_there_is() -> None:
    effects, costs = RNG.random((4, 3)), RNG.random((4, 3)) + 0.1
    budget = float(costs.min(axis=1).sum() * 1.3)
    tried = {
        picked: sum(effects[row, column] for row, column in enumerate(picked))
        for picked in itertools.product(range(3), repeat=4)
        if sum(costs[row, column] for row, column in enumerate(picked)) <= budget
    }
    assert tuple(solve(effects, costs, budget)) == min(tried, key=tried.__getitem__)


def test_what_is_shrunk_is_what_is_masked() -> None:
    model = load_model(layers())
    infer_shapes(model)
    coupling = coupling_of(model)
    found = coupling.dimensions()
    modules = modules_of([d for d in found if len(d.units) == 64], residual_stream(model), 8)
    assert all(module.half is not None for module in modules)
    counts = {modules[0].name: 64, modules[2].name: 24}
    small = shrunk(model, counts, {modules[0].name: modules[0].half}, "test")  # type: ignore[dict-item]
    gone = np.concatenate([modules[0].dimension.units, modules[2].dimension.units[:24]])
    mask([consumer for module in modules for consumer in module.dimension.consumers], gone)
    feeds = samples(model, 2)
    assert compare(run_reference(model, feeds), run_reference(small, feeds))[0] <= 1e-5


def test_parts_are_measured() -> None:
    model = load_model(layers(2, 512))
    infer_shapes(model)
    found = [d for d in coupling_of(model).dimensions() if len(d.units) == 512]
    modules = modules_of(found, residual_stream(model), 16)
    sample = make_feeds(model, 0, 1, {"n": 64})[0]
    seconds, whole = part_times(model, modules, sample, PassContext(threads=1), "test")
    assert all((np.diff(row) <= 0).all() and 0 < row[-1] < 0.7 * row[0] for row in seconds)
    assert 0.2 * whole < sum(row[0] for row in seconds) < 5 * whole
    sizes, total = part_bytes(model, modules, "test")
    for module, row in zip(modules, sizes, strict=True):
        small = shrunk(model, {module.name: module.counts[3]}, {}, "test")
        assert total - weight_bytes(small) == row[0] - row[3]


def test_speed_is_predicted_and_real() -> None:
    model = layers(2, 1024, idle=5)
    sizes = {"n": 64}
    after, outcome = pruned(model, PruneAdaptive(speedup=1.3, sizes=sizes))
    assert weight_bytes(after) < weight_bytes(model)
    assert any("predicted" in note and "real" in note for note in outcome.notes if note.startswith("speed"))


@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_the_bound_moves_until_the_speed_is_what_was_asked_for(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With times that save more, or less, than the parts alone say."""

    def relative(model: ir.Model, smaller: ir.Model, *_: Any) -> float:
        return 1 - factor * (1 - weight_bytes(smaller) / weight_bytes(model))

    monkeypatch.setattr(prune_adaptive, "part_times", lambda model, modules, *_: part_bytes(model, modules, "test"))
    monkeypatch.setattr(prune_adaptive, "relative_time", relative)
    model = layers(3, 512, idle=5)
    after, _ = pruned(model, PruneAdaptive(speedup=1.6, multiple=4))
    assert 0.95 / 1.6 < relative(model, after) < 1.02 / 1.6


def test_quality_keeps_more() -> None:
    model = layers(idle=5)
    free, _ = pruned(model, PruneAdaptive(bytes=0.3, multiple=8))
    careful, outcome = pruned(model, PruneAdaptive(bytes=0.3, multiple=8, quality=Budget("relative_error", 0.2)))
    assert weight_bytes(careful) > weight_bytes(free)
    assert lost(model, careful) < lost(model, free)
    assert any("too much" in note for note in outcome.notes)
    same, outcome = pruned(model, PruneAdaptive(bytes=0.3, multiple=8, quality=Budget("relative_error", 0.0)))
    assert not outcome.changed or weight_bytes(same) == weight_bytes(model)


def test_a_decoder_loses_heads_and_its_caches_follow() -> None:
    from onnxlathe.models.decoder import decoder

    sizes = {"vocab_size": 64, "max_position_embeddings": 64, "num_hidden_layers": 3}
    model = lathe.compile(
        lathe.export_causal_lm(decoder("tiny", **sizes), check=False), "cpu-fp32", speed_gate=False, progress=False
    ).model
    result = lathe.compile(model, [PruneAdaptive(bytes=0.5)], calibration=samples(model), progress=False)
    assert weight_bytes(result.model) <= 0.5 * weight_bytes(model)
    assert np.isfinite(result.report.error)
    student = lathe.make_student(model, depth=1 / 3, width=0.5, calibration=samples(model), progress=False)
    assert {v.name for v in student.graph.inputs if "past" in (v.name or "")} == {
        f"past_key_values.{i}.{kind}" for i in (0, 1) for kind in ("key", "value")
    }
    cache = next(value for value in student.graph.inputs if value.name == "past_key_values.0.key")
    assert cache.shape is not None and cache.shape[1] == 1
    assert len(lathe.Session(student).generate([[1, 2, 3]], max_new_tokens=3)[0]) >= 1


def test_all_caches_may_go() -> None:
    spec = grouped_decoders.Spec(packed="slice")
    model, feeds = grouped_decoders.decoder(spec), grouped_decoders.samples(spec)
    result = lathe.compile(model, [PruneAdaptive(bytes=0.25)], calibration=feeds, progress=False)
    assert [value.name for value in result.model.graph.outputs] == ["logits"]
    assert not any("past" in (value.name or "") for value in result.model.graph.inputs)
    assert np.isfinite(result.report.error)


def test_a_branch_without_a_bias_whose_sum_is_the_output() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[n, 8] x, float[8, 8] p, float[8, 16] w, float[16, 8] v)
        => (float[n, 8] y) { h = MatMul(x, p)  a = MatMul(h, w)  g = Gelu(a)  d = MatMul(g, v)  y = Add(h, d) }"""
    arrays = {name: RNG.standard_normal(shape) for name, shape in {"p": (8, 8), "w": (8, 16), "v": (16, 8)}.items()}
    model = from_text(text, **{name: array.astype(np.float32) for name, array in arrays.items()})
    infer_shapes(model)
    leave_bias(model, residual_stream(model), "test")
    check_structure(model)
    feeds = [{"x": np.ones((2, 8), np.float32)}]
    assert np.allclose(run_reference(model, feeds)[0]["y"], feeds[0]["x"] @ arrays["p"], atol=1e-5)


def test_bytes_are_met_where_two_cuts_meet_in_one_weight() -> None:
    """A quarter of the rows and a quarter of the columns are not half of a matrix."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 8] x, float[8, 32] u, float[32, 32] v, float[32, 8] w)
        => (float[n, 8] y) { a = MatMul(x, u)  b = Relu(a)  c = MatMul(b, v)  d = Relu(c)  y = MatMul(d, w) }"""
    shapes = {"u": (8, 32), "v": (32, 32), "w": (32, 8)}
    model = from_text(text, **{n: RNG.standard_normal(s).astype(np.float32) / 4 for n, s in shapes.items()})
    for share in (0.8, 0.5, 0.3):
        after, outcome = pruned(model, PruneAdaptive(bytes=share, multiple=1))
        assert outcome.changed and 0.9 * share < weight_bytes(after) / weight_bytes(model) <= share


def test_bad_input() -> None:
    with pytest.raises(PassError, match="can bring the model to"):
        pruned(layers(), PruneAdaptive(bytes=0.01))
    with pytest.raises(PassError, match="needs calibration samples"):
        PruneAdaptive()(load_model(layers()), PassContext())
    for options in ({"speedup": 1.0}, {"bytes": 1.5}, {"what": ()}):
        with pytest.raises(ValueError, match="not"):
            PruneAdaptive(**options)  # type: ignore[arg-type]
    with pytest.raises(PassError, match="is the teacher"):
        lathe.make_student(layers(), calibration=samples(layers()))
    with pytest.raises(PassError, match="no share"):
        lathe.make_student(layers(), depth=2, calibration=samples(layers()))
