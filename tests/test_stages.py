"""Stages in files: the whole model's numbers and texts, the pipeline, files that do not belong together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from cached_decoders import grouped, stories
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.save_parts import build_hash
from onnxlathe.passes.partition.partition_stages import PartitionStages
from onnxlathe.runtime.errors import ModelError, PlanError
from onnxlathe.runtime.feeds import make_feeds
from onnxlathe.runtime.inference import open_session, run_session, session_options
from rewriting import from_text

TEXT = """<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 16] x, float[16, 16] a, float[16, 16] b,
  bool[1] add) => (float[batch, 16] y, float[batch, 16] skip) {
    p = MatMul(x, a)  skip = Relu(p)  q = MatMul(skip, b)
    c = If (add) <then_branch = yes () => (float[batch, 16] r) { r = Add(q, p) },
                  else_branch = no () => (float[batch, 16] r) { r = MatMul(q, a) }>
    s = Tanh(c)  t = MatMul(s, b)  y = Add(t, x) }"""


def small() -> ir.Model:
    rng = np.random.default_rng(0)
    model = from_text(TEXT, **{name: rng.standard_normal((16, 16)).astype(np.float32) * 0.3 for name in "ab"})
    infer_shapes(model)
    return model


def staged(model: ir.Model, folder: Path, k: int) -> Path:
    model = model.clone()
    PartitionStages(k=k, cost="roofline")(model, PassContext())
    return lathe.save_stages(model, folder)


def feeds(rows: int, add: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    return {"x": rng.standard_normal((rows, 16)).astype(np.float32), "add": np.array([add])}


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("add", [True, False])
def test_stages_compute_what_the_whole_does(k: int, add: bool, tmp_path: Path) -> None:
    """With a body that reads earlier stages, a skip connection, a shared weight, and an output in the middle."""
    session = lathe.StagedSession(staged(small(), tmp_path / "s", k))
    whole = run_session(open_session(small(), session_options(optimize=False)), feeds(5, add))
    parts = session.run(feeds(5, add))
    assert list(parts) == list(whole)
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5, atol=1e-6)


def test_the_manifest_says_what_crosses(tmp_path: Path) -> None:
    folder = staged(small(), tmp_path / "s", 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    made: set[str] = set()
    for part in manifest["parts"]:
        model = ir.load(folder / part["file"])
        assert [i["name"] for i in part["inputs"]] == [v.name for v in model.graph.inputs]
        assert set(part["received"]) <= made
        assert set(part["received"]) == {v.name for v in model.graph.inputs} - {"x", "add"}
        assert part["weight_bytes"] == sum(v.const_value.nbytes for v in model.graph.initializers.values())  # type: ignore[union-attr]
        made |= {o["name"] for o in part["outputs"]}
    assert {"y", "skip"} <= made


def test_the_pipeline_keeps_the_order(tmp_path: Path) -> None:
    session = lathe.StagedSession(staged(small(), tmp_path / "s", 3), threads=1)
    samples = [feeds(rows, rows % 2 == 0) for rows in range(1, 30)]
    for sample, result in zip(samples, session.run_many(samples), strict=True):
        np.testing.assert_array_equal(result["y"], session.run(sample)["y"])
    report = session.report
    assert report is not None and report.micro_batches == 29 and report.expected_bubble == 2 / 31
    assert 0 < report.balance <= 1 and report.bubble < 1 and len(report.busy) == 3


def test_a_batch_in_micro_batches(tmp_path: Path) -> None:
    session = lathe.StagedSession(staged(small(), tmp_path / "s", 2))
    whole = session.run(feeds(10))
    for count in (1, 3, 10, 64):
        np.testing.assert_allclose(session.run_batch(feeds(10), count)["y"], whole["y"], rtol=1e-6, atol=1e-6)
    with pytest.raises(ModelError, match="dtype"):
        session.run_batch({**feeds(10), "x": np.zeros((10, 16))}, 2)


def test_samples_are_read_as_they_are_needed(tmp_path: Path) -> None:
    """An endless source: a bad sample ends the run instead of a full memory."""
    session = lathe.StagedSession(staged(small(), tmp_path / "s", 2))

    def endless() -> Iterator[dict[str, np.ndarray]]:
        for number in range(10_000):
            yield feeds(2) if number < 20 else {"x": np.zeros((2, 3), np.float32), "add": np.array([True])}

    with pytest.raises(ModelError, match="shape"):
        session.run_many(endless())


@pytest.mark.parametrize("in_place", [True, False])
def test_stories_through_stages_are_the_same(in_place: bool, exported_stories: ir.Model, tmp_path: Path) -> None:
    """Both kinds of cache; rows of different lengths."""
    model = grouped(stories(), rotary=False) if in_place else exported_stories
    prompts = [[1, 403, 407, 261, 378], [1, 346, 388]]
    expected = lathe.Session(model, threads=1).generate(prompts, 40)
    for k in (2, 3):
        session = lathe.StagedSession(staged(model, tmp_path / f"{k}", k), threads=1)
        caches = [name for part in session.manifest.parts for name in part.cache]
        assert sorted(caches) == sorted(v.name for v in model.graph.inputs if "past" in v.name), "each in one stage"
        assert all(part.cache for part in session.manifest.parts[: k - 1]), "each stage keeps a cache of its own"
        for got, wanted in zip(session.generate(prompts, 40), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_files_of_different_builds_are_not_mixed(tmp_path: Path) -> None:
    first, other = staged(small(), tmp_path / "a", 2), small()
    tensor = other.graph.initializers["b"].const_value
    other.graph.initializers["b"].const_value = ir.tensor(tensor.numpy() + 1, name="b")  # type: ignore[union-attr]
    second = staged(other, tmp_path / "b", 2)
    shutil.copy(second / "stage1.onnx", first / "stage1.onnx")
    with pytest.raises(PlanError, match=r"stage1\.onnx is of build"):
        lathe.StagedSession(first)


def test_the_build_is_that_of_graph_weights_and_division() -> None:
    model = small()
    PartitionStages(k=2, cost="roofline")(model, PassContext())
    assert build_hash(model) == build_hash(model.clone())
    other = model.clone()
    next(iter(other.graph)).metadata_props["onnxlathe.stage"] = "1"
    assert build_hash(model) != build_hash(other)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no manifest\.json"):
        lathe.StagedSession(tmp_path)
    with pytest.raises(PlanError, match="partition-stages"):
        lathe.save_stages(small(), tmp_path / "s")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(ModelError, match="is not a divided model"):
        staged(small(), tmp_path / "mine", 2)
    folder = staged(small(), tmp_path / "s", 2)
    with pytest.raises(ModelError, match="cannot generate"):
        lathe.StagedSession(folder).generate([1])
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        lathe.StagedSession(folder)


def test_a_pass_afterwards_that_adds_nodes_is_noticed(tmp_path: Path) -> None:
    model = small()
    PartitionStages(k=2, cost="roofline")(model, PassContext())
    node = next(iter(model.graph))
    del node.metadata_props["onnxlathe.stage"]
    with pytest.raises(PlanError, match="belongs to no stage"):
        lathe.save_stages(model, tmp_path / "s")


def test_compiled_models_save_their_stages(small_model: ir.Model, tmp_path: Path) -> None:
    out = lathe.compile(small_model, ["basic", PartitionStages(k=2)], progress=False)
    session = lathe.StagedSession(out.save_stages(tmp_path / "s"))
    sample = make_feeds(small_model)[0]
    np.testing.assert_allclose(session.run(sample)["y"], lathe.Session(small_model).run(sample)["y"], rtol=1e-5)
