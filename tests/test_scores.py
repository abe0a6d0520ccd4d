"""What outputs are worth: against torch and NumPy row by row; padding and labels that do not count, do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import onnxlathe as lathe
from onnxlathe.compiler.budget import Budget
from onnxlathe.compiler.scores import accuracy, divergence, nats, pooled_cosine

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def sample() -> dict[str, np.ndarray]:
    return {"input_ids": RNG.integers(0, 9, MASK.shape), "attention_mask": MASK}


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def with_noise_in_padding(exact: np.ndarray) -> np.ndarray:
    got = exact.copy()
    got[MASK == 0] += 100
    return got


def test_pooled_cosine_is_that_of_sentence_embeddings() -> None:
    exact, got = array(3, 5, 8), array(3, 5, 8)
    means = [
        torch.stack([torch.from_numpy(side[row][MASK[row] == 1]).double().mean(0) for row in range(3)])
        for side in (exact, got)
    ]
    expected = float(torch.nn.functional.cosine_similarity(*means).mean())
    assert pooled_cosine("h", [sample()], [{"h": exact}], [{"h": got}]) == pytest.approx(expected, abs=1e-12)
    budget = Budget("pooled_cosine", 0.01)
    assert budget.loss([sample()], [{"h": exact}], [{"h": with_noise_in_padding(exact)}]) == pytest.approx(0, abs=1e-9)
    shifted = [{"h": exact + with_noise_in_padding(0 * exact)[::-1]}]  # noise where tokens are
    assert budget.loss([sample()], [{"h": exact}], shifted) > 0.1


def test_pooled_cosine_of_other_outputs_takes_all_numbers_of_a_row() -> None:
    exact, got = array(4, 3, 2), array(4, 3, 2)
    rows = [side.reshape(4, -1).astype(float) for side in (exact, got)]
    expected = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*rows, strict=True)])
    assert pooled_cosine("y", [{}], [{"y": exact}], [{"y": got}]) == pytest.approx(expected, abs=1e-12)
    zero = np.zeros((2, 3), np.float32)
    assert pooled_cosine("y", [{}], [{"y": zero}], [{"y": zero}]) == 1.0
    assert pooled_cosine("y", [{}], [{"y": zero}], [{"y": zero + 1}]) == 0.0
    assert pooled_cosine("y", [{}], [{"y": exact}], [{"y": exact * np.nan}]) == 0.0
    assert pooled_cosine("y", [{}], [{"y": exact}], [{"y": exact[:, :2]}]) == 0.0
    # Of several outputs the worst counts.
    results = [{"a": exact, "b": exact}], [{"a": exact, "b": got}]
    assert Budget("pooled_cosine", 0.01).loss([{}], *results) == pytest.approx(1 - expected)


def test_divergence_is_torch_kl_over_tokens() -> None:
    exact, got = array(3, 5, 9), array(3, 5, 9)
    p, q = (torch.log_softmax(torch.from_numpy(side[MASK == 1]).double(), -1) for side in (exact, got))
    expected = float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))
    assert divergence("logits", [sample()], [{"logits": exact}], [{"logits": got}]) == pytest.approx(expected, rel=1e-9)
    padded = [{"logits": with_noise_in_padding(exact)}]
    assert Budget("kl", 0.1).loss([sample()], [{"logits": exact}], padded) == pytest.approx(0, abs=1e-9)


def test_nats_are_torch_cross_entropy_of_the_next_tokens() -> None:
    feeds, logits = sample(), array(3, 5, 9)
    targets = torch.from_numpy(feeds["input_ids"][:, 1:].copy())
    targets[torch.from_numpy((MASK[:, 1:] == 0) | (MASK[:, :-1] == 0))] = -100
    scores = torch.from_numpy(logits[:, :-1]).double().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(scores, targets.flatten())
    assert nats([feeds], [{"logits": logits}]) == pytest.approx(float(expected), rel=1e-9)
    better = logits.copy()
    np.put_along_axis(better[:, :-1], feeds["input_ids"][:, 1:, None], 20.0, -1)
    gain = Budget("nats", 0.1).loss([feeds], [{"logits": logits}], [{"logits": better}])
    assert gain == pytest.approx(nats([feeds], [{"logits": better}]) - float(expected)) and gain < -1
    with pytest.raises(lathe.ModelError, match="needs input_ids"):
        nats([feeds], [{"logits": logits[:, -1:]}])


def test_a_mask_that_counts_a_cache_ends_at_the_new_tokens() -> None:
    feeds = {"input_ids": np.zeros((2, 2), int), "attention_mask": np.array([[0, 1, 1, 1], [0, 0, 0, 1]])}
    exact, got = array(2, 2, 9), array(2, 2, 9)
    got[0], got[1, 1] = exact[0], exact[1, 1]  # only the one padded position of the second row differs
    assert divergence("logits", [feeds], [{"logits": exact}], [{"logits": got}]) == 0.0


def test_accuracy_counts_labels_that_are_not_negative() -> None:
    scores = np.eye(4, dtype=np.float32)[None].repeat(2, 0)  # answers 0, 1, 2, 3 twice
    labels = np.array([[0, 1, 0, -100], [-1, 1, 2, 3]])
    assert accuracy([{"labels": labels}], [{"n": np.arange(3), "y": scores}]) == pytest.approx(5 / 6)
    wrong = [{"y": scores[..., ::-1]}]
    assert Budget("accuracy", 0.1).loss([{"labels": labels}], [{"y": scores}], wrong) == pytest.approx(5 / 6)
    with pytest.raises(lathe.ModelError, match="0 labels for 8 answers"):
        accuracy([{}], [{"y": scores}])
    with pytest.raises(lathe.ModelError, match="no answers"):
        accuracy([{"labels": labels}], [{"n": np.arange(3)}])


def test_the_new_metrics_can_be_written_as_text() -> None:
    assert Budget.parse("pooled_cosine<=0.01") == Budget("pooled_cosine", 0.01)
    assert Budget.parse("accuracy<=0.005").say(0.002) == "accuracy lost 0.002"
    assert Budget.parse("nats<=0.02").limit == 0.02
