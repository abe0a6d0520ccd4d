"""``Session.generate`` against torch's own, on graphs of both kinds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import onnxlathe as lathe
from cached_decoders import grouped, stories, tiny
from onnxlathe.runtime import providers
from onnxlathe.runtime.generation import causal_lm, generate, kv_cache
from rewriting import from_text

pytest.importorskip("transformers")

torch.set_num_threads(1)  # tiny models


def compiled(*passes: str) -> Callable[[Any], ir.Model]:
    return lambda module: lathe.compile(exported(), passes, threads=1, speed_gate=False, progress=False).model


# What the graph of a decoder may be made by. Add compile presets here: all of them must give torch's text.
BUILDERS: dict[str, Callable[[Any], ir.Model]] = {
    "exported": lathe.export_causal_lm,
    "grouped": functools.partial(grouped, rotary=False),
    "grouped, last logits only": functools.partial(grouped, rotary=False, last_only=True),
    "cpu-fp32": compiled("cpu-fp32"),
    "cpu-fp32, last logits only": compiled("cpu-fp32", "keep-last-logits"),
}


@functools.cache
def exported() -> ir.Model:
    return lathe.export_causal_lm(stories())


@functools.cache
def session(builder: str) -> lathe.Session:
    graph = exported() if builder == "exported" else BUILDERS[builder](stories())
    return lathe.Session(graph, threads=1)


@functools.cache
def prompts() -> list[np.ndarray]:
    """20 openings of held-out stories, 5 of each of 4 lengths."""
    from onnxlathe.models.stories import BOS, heldout_stories, stories_tokenizer

    encoded = [[BOS, *ids.ids] for ids in stories_tokenizer().encode_batch(heldout_stories()[:20])]
    return [np.array(ids[: (3, 7, 16, 31)[number % 4]]) for number, ids in enumerate(encoded)]


def torch_generate(module: Any, prompt: np.ndarray, count: int) -> np.ndarray:
    ids = torch.tensor(prompt).reshape(-1, prompt.shape[-1])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return module.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :].numpy()


@functools.cache
def expected() -> list[np.ndarray]:
    rows: dict[int, np.ndarray] = {}
    for first in range(4):
        together = np.stack(prompts()[first::4])
        rows.update(zip(range(first, 20, 4), torch_generate(stories(), together, 200), strict=True))
    return [rows[number] for number in range(20)]


@pytest.mark.parametrize("builder", BUILDERS)
def test_text_equals_torch(builder: str) -> None:
    """20 prompts of four lengths in one batch, 200 tokens each; some of them alone."""
    got = session(builder).generate(prompts(), 200, eos=())
    assert [row.tolist() for row in got] == [row.tolist() for row in expected()]
    for number in range(4):
        alone = session(builder).generate(prompts()[number], 200, eos=())
        assert isinstance(alone, np.ndarray) and alone.dtype == np.int64
        assert alone.tolist() == expected()[number].tolist()


@pytest.mark.parametrize("chunk", [1, 5, 512])
@pytest.mark.parametrize("builder", BUILDERS)
def test_batch_chunks_and_growth(builder: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_ROOM", 3)  # the cache must grow four times
    got = session(builder).generate(prompts()[:4], 60, eos=(), prefill_chunk=chunk)
    assert [row.tolist() for row in got] == [row[:60].tolist() for row in expected()[:4]]


@pytest.mark.parametrize("builder", BUILDERS)
def test_rows_end_by_themselves(builder: str) -> None:
    """By eos, which stays, or full; the others go on, and nothing more is said of a row that is done."""
    said: list[tuple[int, int]] = []
    eos = int(expected()[1][20])
    wanted = []
    for prompt, row in zip(prompts()[:4], expected()[:4], strict=True):
        row = row[: 64 - len(prompt)]
        end = np.flatnonzero(row == eos)
        wanted.append(row[: end[0] + 1].tolist() if len(end) else row.tolist())
    assert len({len(row) for row in wanted}) > 2, "they end at different times"
    got = session(builder).generate(
        prompts()[:4], 200, eos=eos, max_length=64, on_token=lambda row, token: said.append((row, token))
    )
    assert [row.tolist() for row in got] == wanted
    assert [[token for row, token in said if row == number] for number in range(4)] == wanted


def test_rotation_inside_the_kernel() -> None:
    """GroupQueryAttention with rotary tables and no position_ids, a prompt in pieces, rows of different lengths."""
    model = lathe.Session(grouped(tiny(), rotary=True), threads=1)
    rows = [np.arange(3, 3 + count) * 7 % 512 for count in (2, 9, 23)]
    wanted = [torch_generate(tiny(), row, 40)[0].tolist() for row in rows]
    assert len({tuple(row) for row in wanted}) == 3
    assert [row.tolist() for row in model.generate(rows, 40, eos=(), prefill_chunk=4)] == wanted


def test_rows_that_cannot_run_together_run_one_by_one() -> None:
    """As for a model without position_ids, or with a batch of 1."""
    model = lathe.Session(exported(), threads=1)
    for change in ({"ragged": False}, {"batched": False}):
        model._causal_lm = dataclasses.replace(session("exported")._causal_lm, **change)  # type: ignore[type-var]
        got = model.generate(prompts()[:3], 20, eos=())
        assert [row.tolist() for row in got] == [row[:20].tolist() for row in expected()[:3]]


def watch_bindings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every binding of a cache tensor: its name, where the past lies, where the present."""
    seen: list[tuple[str, int, int]] = []
    bind = kv_cache._bind

    def watch(binding: Any, tensor: Any, device: Any, past: Any, present: Any) -> None:
        seen.append((tensor.past, past[1], present[1]))
        bind(binding, tensor, device, past, present)

    monkeypatch.setattr(kv_cache, "_bind", watch)
    return seen


def test_cache_in_place_is_bound_once_and_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[Any] = []
    make = kv_cache.make_cache
    monkeypatch.setattr(generate, "make_cache", lambda *args: caches.append(make(*args)) or caches[-1])
    seen = watch_bindings(monkeypatch)
    model = session("grouped")
    rows = prompts()[:2]
    new = model.generate(rows, 30, eos=(), max_length=40)
    assert len(seen) == 10 * 3, "10 tensors, for two prompts and once for all steps"
    assert all(past == present for _, past, present in seen)
    assert {past for _, past, _ in seen[:10]} == {past for _, past, _ in seen[20:]}, "row 0 lies in the common buffer"
    for number, (prompt, tokens) in enumerate(zip(rows, new, strict=True)):
        ids = np.concatenate([prompt, tokens[:-1]])[None]
        empty = {f"past_key_values.{i}.{kind}": np.zeros((1, 4, 0, 8), np.float32) for i in range(5) for kind in KINDS}
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.size)[None]}
        present = model.run({**feeds, **empty})
        for tensor, buffer in zip(caches[0]._tensors, caches[0]._buffers, strict=True):
            kept = buffer.read().view(np.float32).reshape(2, 4, caches[0].capacity, 8)[number]
            assert np.allclose(kept[:, : ids.size], present[tensor.present][0], atol=1e-5)
            assert not kept[:, ids.size + 1 :].any(), "nothing is written beyond a row's end"


def test_cache_of_plain_graphs_goes_back_and_forth(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch_bindings(monkeypatch)
    session("exported").generate(prompts()[0], 30, eos=())
    one = [(past, present) for name, past, present in seen if name == "past_key_values.0.key"]
    assert len(one) == 30 and len(set(one)) == 2
    assert all(before[1] == after[0] for before, after in itertools.pairwise(one)), "present becomes past"


@pytest.mark.parametrize("kind", ["exported", "grouped"])
def test_memory_is_flat_over_2000_tokens(kind: str) -> None:
    psutil = pytest.importorskip("psutil")
    graph = grouped(tiny(), rotary=True) if kind == "grouped" else exported()
    model = lathe.Session(graph, threads=1)
    resident: list[int] = []
    traced: list[int] = []

    def look(row: int, token: int) -> None:
        if len(resident) in (200, 2000):
            traced.append(tracemalloc.get_traced_memory()[0])
        resident.append(psutil.Process().memory_info().rss)

    tracemalloc.start()
    try:
        assert len(model.generate([1, 2, 3], 2001, eos=(), max_length=2048, on_token=look)) == 2001
    finally:
        tracemalloc.stop()
    if kind == "grouped":  # the tensors of a plain graph grow with the text
        tensors = model._causal_lm.cache  # type: ignore[union-attr]
        cache = sum(tensor.heads * 2048 * tensor.size * 4 for tensor in tensors)  # its pages are touched as it fills
        assert resident[2000] - resident[200] < cache + 500_000
    assert traced[1] - traced[0] < 250_000, "1,800 token ids, twice, and nothing else"
    most = max(resident)
    model.generate([1, 2, 3], 500, eos=(), max_length=2048, on_token=look)
    assert max(resident) < most + 1_000_000, "what was warm is used again"


def test_sampled_text_depends_on_the_seed_alone() -> None:
    model = session("grouped")
    options: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "eos": ()}
    rows = model.generate(prompts()[:4], 50, seed=7, **options)
    alone = model.generate(prompts()[2], 50, seed=7, **options)
    assert (
        rows[2].tolist() == alone.tolist() == session("exported").generate(prompts()[2], 50, seed=7, **options).tolist()
    )
    first, second, third = model.generate([prompts()[2]] * 3, 50, seed=[8, 7, 8], **options)
    assert first.tolist() == third.tolist() != second.tolist() == alone.tolist()
    assert model.generate(prompts()[2], 50, **options).tolist() != model.generate(prompts()[2], 50, **options).tolist()
    assert model.generate(prompts()[0], 50, temperature=1.0, top_k=1, eos=()).tolist() == expected()[0][:50].tolist()


def test_ends_as_the_artifact_says() -> None:
    model = session("exported")
    assert model._causal_lm.eos == (1,)  # type: ignore[union-attr]
    wanted = torch_generate(stories(), prompts()[0], 400)[0].tolist()
    assert 1 in wanted[:-1], "the story ends"
    assert model.generate(prompts()[0], 400).tolist() == wanted[: wanted.index(1) + 1]


def test_kinds_of_graphs_are_told_apart() -> None:
    kinds = {name: session(name)._causal_lm for name in BUILDERS}
    assert [kind.in_place for kind in kinds.values()] == [False, True, True, True, True]  # type: ignore[union-attr]
    assert [kind.last_only for kind in kinds.values()] == [False, False, True, False, True]  # type: ignore[union-attr]
    assert [kind.positions for kind in kinds.values()] == [None, 512, 512, 512, 512]  # type: ignore[union-attr]
    model = grouped(stories(), rotary=False)
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.3.value")
    extra = ir.node("Shape", [past])
    model.graph.append(extra)
    model.graph.outputs.append(extra.outputs[0])
    other = causal_lm.read_causal_lm(model)
    assert not other.in_place and not other.ragged, "another reader would see the buffer change"


KINDS = ("key", "value")
OK = np.array([1, 5, 6])


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ("Once upon", {}, "got a str, not token ids. Encode"),
        ([], {}, "no prompt"),
        ([OK, []], {}, "Prompt 1 is empty"),
        ([OK, np.array([1, 512])], {}, "Prompt 1 has the token id 512, the model knows 0 to 511"),
        ([-1], {}, "token id -1"),
        (OK.astype(np.float32), {}, "dtype float32"),
        (np.zeros((1, 2, 3), int), {}, r"shape \[2, 3\]"),
        ([1, [2, 3]], {}, "Prompt 0 has the shape"),
        (OK, {"max_length": 3}, "3 tokens and leaves no room for new ones: max_length is 3. Shorten it, or raise"),
        (np.ones(512, int), {}, "512 tokens and leaves no room for new ones: the model knows 512 positions"),
        (OK, {"max_length": 600}, "max_length is 600, but the model knows 512 positions"),
        (OK, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (OK, {"prefill_chunk": 0}, "prefill_chunk is 0"),
        (OK, {"temperature": -1.0}, "temperature is -1"),
        (OK, {"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        (OK, {"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        (OK, {"top_p": 0.5}, "without a temperature"),
        ([OK, OK], {"temperature": 1.0, "seed": [1, 2, 3]}, "2 prompts and 3 seeds"),
    ],
)
def test_bad_requests(given: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(lathe.ModelError, match=words):
        session("grouped").generate(given, **options)


def test_models_that_cannot_generate(small_model: ir.Model) -> None:
    with pytest.raises(lathe.ModelError, match=r"no input_ids, attention_mask, logits.*export_causal_lm"):
        lathe.Session(small_model).generate(OK)
    merged = exported().clone()
    extra = ir.Value(name="use_cache_branch", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    merged.graph.inputs.append(extra)
    with pytest.raises(lathe.ModelError, match="use_cache_branch: optimum's merged kind"):
        lathe.Session(merged).generate(OK)
    extra.name = "token_type_ids"
    with pytest.raises(lathe.ModelError, match=r"nobody says what its inputs \['token_type_ids'\] are"):
        lathe.Session(merged).generate(OK)
    fixed = exported().clone()
    fixed.graph.inputs[0].shape = ir.Shape([4, 16])
    with pytest.raises(lathe.ModelError, match=r"fixed shape \[4,16\]"):
        causal_lm.read_causal_lm(fixed)


def test_nan_is_an_error() -> None:
    model = from_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (int64[batch, sequence] input_ids, int64[batch, total] attention_mask, float[batch, 1, past, 2] p,
           float[3, 2] t)
          => (float[batch, sequence, 2] logits, float[batch, 1, total, 2] q) {
          rows = Gather(t, input_ids)  logits = Log(rows)
          axis = Constant<value_ints=[1]>()  new = Unsqueeze(rows, axis)  q = Concat<axis=2>(p, new)
        }""",
        t=np.array([[-1, 1], [1, 1], [1, 1]], np.float32),
    )
    for value, name in ((model.graph.inputs[2], "past_key_values.0.key"), (model.graph.outputs[1], "present.0.key")):
        value.name = name
    model = lathe.Session(model)
    with pytest.raises(lathe.ModelError, match="logits are NaN"):
        model.generate([1, 0], 3)


def test_cuda() -> None:
    if (problem := providers.cuda_problem()) is not None:
        pytest.skip(f"no CUDA here: {problem}")
    model = lathe.Session(exported(), device="cuda")
    got = model.generate(prompts()[:4], 40, eos=(), prefill_chunk=5)
    assert [row.tolist() for row in got] == [row[:40].tolist() for row in expected()[:4]]
