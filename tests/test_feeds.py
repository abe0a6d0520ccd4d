"""Made and loaded samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from grouped_decoders import Spec, decoder

from onnxlathe.compiler.verify import run_reference
from onnxlathe.runtime.errors import ModelError
from onnxlathe.runtime.feeds import check_feeds, load_feeds, make_feeds
from rewriting import from_text

ENCODER = """<ir_version: 10, opset_import: ["" : 20]>
g (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask, int64[batch, sequence] position_ids,
   float[37, 4] table, float[50, 4] positions) => (y) {
  e = Gather(table, input_ids)  p = Gather(positions, position_ids)  s = Add(e, p)
  f = Cast<to=1>(attention_mask)  u = Unsqueeze(f, axis)  y = Mul(s, u) }"""


def encoder() -> object:
    text = ENCODER.replace("float[50, 4] positions", "float[50, 4] positions, int64[1] axis")
    return from_text(
        text, table=np.ones((37, 4), np.float32), positions=np.ones((50, 4), np.float32), axis=np.array([2])
    )


def test_indices_stay_in_their_tables_and_dims_agree() -> None:
    model = encoder()
    feeds = make_feeds(model, seed=0, count=4)  # type: ignore[arg-type]
    shapes = {sample["input_ids"].shape for sample in feeds}
    assert len(shapes) > 1, "later samples have other sizes"
    for sample in feeds:
        assert len({array.shape for array in sample.values()}) == 1
        assert sample["input_ids"].max() < 37 and sample["position_ids"][0, 1] == 1
        check_feeds(model.graph.inputs, sample)  # type: ignore[attr-defined]
    assert feeds[0]["attention_mask"].all() and not feeds[1]["attention_mask"].all(), "padding from the second on"
    run_reference(model, feeds)  # type: ignore[arg-type]


def test_same_seed_same_samples() -> None:
    first, second, third = (make_feeds(encoder(), seed=seed)[0]["input_ids"] for seed in (1, 1, 2))  # type: ignore[arg-type]
    assert np.array_equal(first, second) and not np.array_equal(first, third)


def test_sizes_can_be_given() -> None:
    sample = make_feeds(encoder(), sizes={"batch": 3, "sequence": 21})[0]  # type: ignore[arg-type]
    assert sample["input_ids"].shape == (3, 21)


CACHE = """<ir_version: 10, opset_import: ["" : 20]>
g (int64[batch, sequence] input_ids, int64[batch, {total}] attention_mask,
   float[batch, 2, {past}, 4] past_key) => (y) {{ y = Identity(input_ids) }}"""


@pytest.mark.parametrize(
    ("past", "total"),
    [("past_sequence", "total_sequence"), ("past_sequence_length", "past_sequence_length + sequence_length")],
)
def test_total_length_is_past_and_new(past: str, total: str) -> None:
    text = CACHE.format(past="P", total="T")
    model = from_text(text)
    model.graph.inputs[1].shape[1] = total  # type: ignore[index]
    model.graph.inputs[2].shape[2] = past  # type: ignore[index]
    for sample in make_feeds(model, count=3):
        cached = sample["past_key"].shape[2]
        assert sample["attention_mask"].shape[1] == sample["input_ids"].shape[1] + cached
    sizes = {"batch": 1, "sequence": 1, "past_sequence": 128}
    sample = make_feeds(model, count=1, sizes=sizes)[0]
    assert sample["past_key"].shape[2] == 128 and sample["attention_mask"].shape[1] == 129, "given sizes count too"


def test_strings_cannot_be_made() -> None:
    model = from_text('<ir_version: 10, opset_import: ["" : 20]> g (string[n] words) => (y) { y = Identity(words) }')
    with pytest.raises(ModelError, match="words"):
        make_feeds(model)


def test_npz_files_and_folders(tmp_path: Path) -> None:
    for number in range(2):
        np.savez(tmp_path / f"{number}.npz", x=np.full(2, number))
    assert [sample["x"][0] for sample in load_feeds(tmp_path)] == [0, 1]
    assert load_feeds(tmp_path / "1.npz")[0]["x"].tolist() == [1, 1]
    assert load_feeds(iter([{"x": np.ones(1)}]))[0]["x"].tolist() == [1.0]


def test_damaged_npz_files_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", x=np.arange(1000))
    content = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    (tmp_path / "half.npz").write_bytes(content[:4000])
    (tmp_path / "flipped.npz").write_bytes(content[:3000] + b"????" + content[3004:])
    np.savez(tmp_path / "objects.npz", x=np.array([{}], object))
    np.save(tmp_path / "array.npy", np.ones(2))
    for name, words in (
        ("no.npz", "No samples found"),
        ("bad.npz", "is not an .npz"),
        ("half.npz", "is not an .npz file, or is truncated"),
        ("flipped.npz", "cannot be read: Bad CRC"),
        ("objects.npz", "cannot be read"),
        ("array.npy", "is not an .npz"),
    ):
        with pytest.raises(ModelError, match=name) as caught:
            load_feeds(tmp_path / name)
        assert words in str(caught.value)


def test_weights_that_may_be_overridden_need_not_be_given() -> None:
    model = encoder()
    model.graph.inputs.append(model.graph.initializers["table"])  # type: ignore[attr-defined]
    sample = make_feeds(model)[0]  # type: ignore[arg-type]
    assert "table" not in sample
    check_feeds(model.graph.inputs, sample)  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="'table'"):
        check_feeds(model.graph.inputs, {**sample, "table": np.ones((37, 4))})  # type: ignore[attr-defined]


def test_samples_of_a_decoder_are_steps_of_generation() -> None:
    """One row that goes on from a cache, then two rows from the start, the last padded on the left."""
    spec = Spec()
    model = decoder(spec)
    first, second = make_feeds(model, seed=0)
    assert first["input_ids"].shape[0] == 1 and first["past_key_values.0.key"].shape[2] == 5
    assert first["attention_mask"].all()
    assert first["attention_mask"].shape[1] == first["input_ids"].shape[1] + 5
    assert np.array_equal(first["position_ids"][0], 5 + np.arange(first["input_ids"].shape[1]))
    mask = second["attention_mask"]
    assert mask.shape[0] == 2 and second["past_key_values.0.key"].shape[2] == 0
    assert mask[0].all() and mask[1, -1] == 1 and not mask[1, 0]
    padding = int((mask[1] == 0).sum())
    assert (mask[1, padding:] == 1).all(), "contiguous"
    assert np.array_equal(second["position_ids"][1, padding:], np.arange(mask.shape[1] - padding)), "counts tokens"
    assert (second["position_ids"][1, :padding] == 0).all()
    for sample in (first, second):
        check_feeds(model.graph.inputs, sample)
    run_reference(model, [first, second])
