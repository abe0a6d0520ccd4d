"""The prefix cache: prompts that begin alike are computed once, with the same texts, in bounded memory."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from test_generate import expected, exported, prompts

import onnxlathe as lathe
from onnxlathe.runtime.generation.prefix_cache import PrefixCache

pytest.importorskip("transformers")


def arrays(length: int, value: float = 1.0) -> list[np.ndarray]:
    return [np.full((2, length, 4), value, np.float32) for _ in range(2)]


def test_longest_beginning_is_found() -> None:
    cache = PrefixCache(1 << 20)
    cache.keep(np.array([1, 2, 3, 4]), arrays(4, 1.0))
    cache.keep(np.array([1, 2, 9]), arrays(3, 2.0))
    length, found = cache.find(np.array([1, 2, 3, 7, 7]))
    assert length == 3 and found[0][0, 0, 0] == 1.0
    assert cache.find(np.array([1, 2, 9, 5]))[0] == 3
    assert cache.find(np.array([1, 2, 3, 4]))[0] == 3, "the last token must run"
    assert cache.find(np.array([8, 2])) == (0, ())
    use = cache.use
    assert (use.hits, use.misses, use.reused, use.asked) == (3, 1, 9, 15) and use.hit_ratio == 9 / 15


def test_a_longer_text_takes_the_place_of_its_beginnings() -> None:
    cache = PrefixCache(1 << 20)
    for length in (2, 3, 5):
        cache.keep(np.arange(length), arrays(length))
    assert cache.use.held == 2 * 2 * 5 * 4 * 4
    assert cache.find(np.arange(9))[0] == 5


def test_the_least_recently_used_goes_first() -> None:
    size = sum(array.nbytes for array in arrays(3))
    cache = PrefixCache(2 * size)
    for start in (10, 20):
        cache.keep(np.arange(start, start + 3), arrays(3))
    assert cache.find(np.array([10, 11, 12, 0]))[0] == 3
    cache.keep(np.arange(30, 33), arrays(3))
    assert [cache.find(np.array([s, s + 1, s + 2, 0]))[0] for s in (10, 20, 30)] == [3, 0, 3]
    assert cache.use.held == 2 * size
    cache.keep(np.arange(40, 60), arrays(20))
    assert cache.use.held == 2 * size, "what is larger than the whole cache is not kept"


@pytest.mark.parametrize("kind", ["exported", "grouped"])
@pytest.mark.parametrize("chunk", [512, 3])
def test_same_texts_as_without(kind: str, chunk: int) -> None:
    """For both kinds of caches, alone and in a batch, prompts seen before and extended."""
    model = _session(kind)
    rows = prompts()[:3]
    wanted = [row[:20].tolist() for row in expected()[:3]]
    for _ in range(2):
        got = model.generate(rows, 20, eos=(), prefill_chunk=chunk)
        assert [row.tolist() for row in got] == wanted
    continued = np.concatenate([rows[0], wanted[0][:10]])
    assert model.generate(continued, 10, eos=(), prefill_chunk=chunk).tolist() == wanted[0][10:]
    use = model.prefixes.use
    assert use.hits >= 4 and use.reused >= sum(len(row) - 1 for row in rows) + len(continued) - 1


def test_only_what_is_new_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _session("grouped")
    prompt = np.random.default_rng(0).integers(3, 500, 40)
    model.generate(prompt, 1, eos=())
    runs: list[int] = []
    from onnxlathe.runtime.generation import generate

    step = generate._Stepper.step

    def watch(self: Any, tokens: Any, mask: Any, positions: Any) -> Any:
        runs.append(tokens.shape[1])
        return step(self, tokens, mask, positions)

    monkeypatch.setattr(generate._Stepper, "step", watch)
    other = np.concatenate([prompt[:36], [7, 8, 9, 10]])
    got = model.generate(other, 1, eos=())
    assert runs == [4]
    assert got.tolist() == lathe.Session(model_of("grouped"), threads=1).generate(other, 1, eos=()).tolist()


def test_several_threads() -> None:
    model = _session("grouped")
    rows = prompts()[:3]
    wanted = [row[:12].tolist() for row in expected()[:3]]
    wrong: list[Any] = []

    def work(index: int) -> None:
        for turn in range(4):
            got = model.generate(rows[(index + turn) % 3], 12, eos=()).tolist()
            if got != wanted[(index + turn) % 3]:
                wrong.append((index, turn))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_caches_come_from_the_pool() -> None:
    model = _session("grouped", prefix_cache=0)
    for _ in range(3):
        model.generate(prompts()[0], 8, eos=(), max_length=64)
    use = model.memory()
    assert use.hits == 2 * use.misses and use.live == 0


def model_of(kind: str) -> Any:
    return (
        lathe.compile(exported(), "cpu-fp32", speed_gate=False, progress=False).model
        if kind == "grouped"
        else exported()
    )


def _session(kind: str, prefix_cache: int = 1 << 24) -> Any:
    return lathe.Session(model_of(kind), threads=1, prefix_cache=prefix_cache)
