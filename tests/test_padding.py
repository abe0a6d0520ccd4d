"""What counts of a language model's results where a sample has padding."""

from __future__ import annotations

import numpy as np
from grouped_decoders import Spec, decoder, step

from onnxlathe.compiler.padding import cache_names, results_of_tokens, without_padding
from onnxlathe.compiler.verify import compare, run_reference

SPEC = Spec()


def test_cache_names() -> None:
    model = decoder(SPEC)
    pairs = {f"past_key_values.{i}.{kind}": f"present.{i}.{kind}" for i in (0, 1) for kind in ("key", "value")}
    assert cache_names(model) == pairs
    model.graph.inputs[1].name = "padding"
    assert cache_names(model) == {}, "without the mask nothing is known of padding"


def test_without_padding_results_are_what_they_are() -> None:
    results = run_reference(decoder(SPEC), [step(SPEC, np.ones((2, 5), np.int64), 2)])[0]
    assert set(results) == {"logits", *cache_names(decoder(SPEC)).values()}


def test_with_padding_tokens_count_and_the_step_after() -> None:
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
    model, feeds = decoder(SPEC), step(SPEC, mask, 4)
    results = run_reference(model, [feeds])[0]
    assert set(results) == {"logits", "logits of the next step"}
    assert not results["logits"][1, :2].any() and results["logits"][1, 2:].any()
    other = {**feeds, "input_ids": np.where(mask, feeds["input_ids"], 1 - feeds["input_ids"] % 2)}
    assert compare([results], run_reference(model, [other]))[0] < 1e-6, "what padding holds is nobody's business"
    wrong = {**feeds, "input_ids": (feeds["input_ids"] + mask) % 40}
    assert compare([results], run_reference(model, [wrong]))[0] > 1e-2


def test_a_wrong_cache_shows_in_the_step_after() -> None:
    """The logits of the prompt are right, the cache that goes on is not."""
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
    feeds = step(SPEC, mask, 4)
    swapped = (
        ("present_1_value = Concat<axis=2>(past_1_value, vt1)",
         "kept = Concat<axis=2>(past_1_value, vt1) present_1_value = Mul(kept, half)"),
        ("vfive1 = Unsqueeze(present_1_value", "vfive1 = Unsqueeze(kept"),
    )  # fmt: skip
    wrong = decoder(Spec(replaced=swapped, extra={"half": np.array(0.5, np.float32)}))
    error, name = compare(run_reference(decoder(SPEC), [feeds]), run_reference(wrong, [feeds]))
    assert error > 1e-2 and name == "logits of the next step"


def test_of_an_encoder_only_tokens_count() -> None:
    mask = np.array([[1, 1, 1], [1, 0, 0]])
    results = {"hidden": np.ones((2, 3, 4), np.float32), "pooled": np.ones((2, 4), np.float32)}
    found = results_of_tokens({"attention_mask": mask}, results)
    assert found["hidden"].sum() == 4 * 4 and np.array_equal(found["pooled"], results["pooled"])
    for sample in ({}, {"attention_mask": mask[0]}, {"attention_mask": mask.astype(np.float32)}):
        assert results_of_tokens(sample, results)["hidden"].all(), "nothing is known of padding"


def test_the_longest_row_without_its_padding() -> None:
    mask = np.array([[1, 1, 0, 0], [0, 1, 1, 1]])
    ids = np.arange(8).reshape(2, 4)
    kept = without_padding({"input_ids": ids, "attention_mask": mask})
    assert kept["input_ids"].tolist() == [[5, 6, 7]] and kept["attention_mask"].tolist() == [[1, 1, 1]]
    assert kept["input_ids"].flags.c_contiguous
    for sample in ({"x": ids}, {"input_ids": ids, "attention_mask": mask, "cache": np.zeros((2, 3, 4))}):
        assert all(without_padding(sample)[name] is array for name, array in sample.items()), "not one number a token"
