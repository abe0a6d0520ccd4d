"""``lathe.optimize``: what is asked for is kept, whatever the candidates do; and searches go on where they stopped.

Most tests compile in this process and take speeds from a table, as starting processes and timing them would take the
time; ``test_for_real`` and those of ``processes.py`` do it all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from grouped_decoders import VOCABULARY, Rotary, Spec, decoder
from low_bit_models import block

import onnxlathe as lathe
from onnxlathe import cli
from onnxlathe.compiler.graph import count_ops
from onnxlathe.optimizing import kept, search
from onnxlathe.optimizing.candidates import Candidate, Goal, Progress, Subject, first_candidates
from onnxlathe.optimizing.data import representatives
from onnxlathe.optimizing.optimize import read_budget, read_seconds
from onnxlathe.optimizing.processes import Child, OutOfTime, Race, compile_apart
from onnxlathe.optimizing.trials import Search, Trial
from onnxlathe.optimizing.worker import Request, Timer, compile_one
from onnxlathe.passes.presets import resolve_passes
from onnxlathe.runtime.artifact import REPORT_KEY, load, save
from onnxlathe.runtime.errors import LatheError
from rewriting import from_text

Speeds = Callable[..., None]
RNG = np.random.default_rng(0)
WIDTH = 96


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, but for the kernel costs of this machine, which take seconds to measure."""
    known = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxlathe"
    folder = tmp_path / "cache" / "onnxlathe"
    folder.mkdir(parents=True)
    for file in known.glob("kernel-costs-*.json"):
        shutil.copy(file, folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder / "optimize"


@pytest.fixture
def network() -> ir.Model:
    """Three products and two Gelu-like curves."""
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    net (float[batch, {WIDTH}] x, float[{WIDTH}, {WIDTH}] a, float[{WIDTH}, {WIDTH}] b, float[{WIDTH}, 8] c)
      => (float[batch, 8] y)
    {{ h = MatMul(x, a) t = Tanh(h) i = Identity(t) g = MatMul(i, b) u = Tanh(g) y = MatMul(u, c) }}"""
    arrays = {name: RNG.standard_normal((WIDTH, width)) / 8 for name, width in (("a", WIDTH), ("b", WIDTH), ("c", 8))}
    return from_text(text, **{name: array.astype(np.float32) for name, array in arrays.items()})


@pytest.fixture
def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": RNG.standard_normal((2, WIDTH)).astype(np.float32)} for _ in range(12)]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Speeds:
    """Compiles in this process; speeds by what a model is made of, ``again`` for later measurements."""

    def use(fused: float, int8: float = 1, low: float = 1, again: Sequence[float] = (), noise: float = 0.01) -> None:
        def run(self: Race, candidate: Path, samples: Sequence[Path], **_: Any) -> list[dict[str, tuple[float, float]]]:
            ops = " ".join(count_ops(load(candidate)))
            kind = 2 if "NBits" in ops else 1 if "Quantize" in ops or "Integer" in ops else 0
            calls[kind] += 1
            table = again if calls[kind] > 1 and again else (fused, int8, low)
            return [{"": (table[kind], noise)} for _ in samples]

        def apart(request: Request, seconds: float, progress: Callable[[str], None]) -> None:
            answers: list[dict[str, Any]] = []
            compile_one(dataclasses.replace(request, gate=False), answers.append)
            if "error" in answers[-1]:
                raise LatheError(*answers[-1]["error"])

        calls = [0, 0, 0]
        monkeypatch.setattr(Race, "run", run)
        monkeypatch.setattr(search, "compile_apart", apart)

    return use


def outputs(model: Any, feeds: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    session = lathe.Session(model)
    return [next(iter(session.run(item).values())) for item in feeds]


def test_the_fastest_within_the_limit_is_taken(
    scripted: Speeds, network: ir.Model, feeds: list[dict[str, np.ndarray]], tmp_path: Path
) -> None:
    scripted(fused=1.2, int8=2.5)
    out = lathe.optimize(network, "speed", "1%", samples=feeds, progress=False)
    assert out.search.chosen in ("cpu-int8", "cpu-int8-dynamic")
    chosen = next(trial for trial in out.search.trials if trial.name == out.search.chosen)
    assert chosen.speed == pytest.approx(2.5) and chosen.confirmed and 0 < (chosen.drop or 0) <= 0.01
    # What was judged: the samples that calibration did not see, against the original's own results.
    (folder,) = (tmp_path / "cache" / "onnxlathe" / "optimize").iterdir()
    calibrated = [np.load(file)["x"] for file in sorted((folder / "samples" / "calibration").glob("*.npz"))]
    assert len(calibrated) == 9 and out.search.judged == 3
    judged = [item for item in feeds if not any((item["x"] == other).all() for other in calibrated)]
    pairs = [np.concatenate(side).astype(float) for side in (outputs(network, judged), outputs(out.model, judged))]
    cosines = (pairs[0] * pairs[1]).sum(1) / np.linalg.norm(pairs[0], axis=1) / np.linalg.norm(pairs[1], axis=1)
    assert chosen.drop == pytest.approx(1 - cosines.mean(), rel=1e-3)
    # It is an ordinary artifact that carries the search.
    saved = load(out.save(tmp_path / "fast.onnx"))
    stored = json.loads(saved.metadata_props[REPORT_KEY])["search"]
    assert stored["chosen"] == out.search.chosen and len(stored["trials"]) == len(out.search.trials)
    assert lathe.Report.from_dict(json.loads(saved.metadata_props[REPORT_KEY])).search == stored
    assert {row["name"] for row in stored["trials"] if row["front"]} >= {"cpu-fp32"}


def test_nothing_beyond_the_limit_is_returned(
    scripted: Speeds, network: ir.Model, feeds: list[dict[str, np.ndarray]]
) -> None:
    scripted(fused=1.1, int8=9.0)
    out = lathe.optimize(network, "speed", 1e-9, samples=feeds, progress=False)
    assert out.search.chosen == "cpu-fp32" and "fused exactly" in " ".join(out.search.notes)
    lossy = [trial for trial in out.search.trials if trial.name in ("cpu-int8", "cpu-int8-dynamic")]
    assert [trial.status for trial in lossy] == ["loses too much"] * 2
    np.testing.assert_allclose(outputs(out.model, feeds)[0], outputs(network, feeds)[0], rtol=1e-4, atol=1e-6)
    alone = lathe.optimize(network, "speed", 0, samples=feeds, progress=False)
    assert [trial.name for trial in alone.search.trials] == ["cpu-fp32"], "without a drop only the exact one is tried"


def test_nothing_slower_is_returned(scripted: Speeds, network: ir.Model, feeds: list[dict[str, np.ndarray]]) -> None:
    scripted(fused=0.98, int8=0.7, noise=0.3)
    out = lathe.optimize(network, "speed", "5%", samples=feeds, progress=False)
    assert out.search.chosen == "original" and "as it was" in " ".join(out.search.notes)
    assert count_ops(out.model) == count_ops(network)
    assert outputs(out.model, feeds)[0].tolist() == outputs(network, feeds)[0].tolist()


def test_a_lucky_first_measurement_does_not_count(
    scripted: Speeds, network: ir.Model, feeds: list[dict[str, np.ndarray]]
) -> None:
    scripted(fused=1.3, int8=3.0, again=(1.25, 0.8, 0.8))
    out = lathe.optimize(network, "speed", "1%", samples=feeds, progress=False)
    assert out.search.chosen == "cpu-fp32"
    lucky = [trial for trial in out.search.trials if trial.confirmed and trial.name != "cpu-fp32"]
    assert lucky and all(trial.speed == pytest.approx(0.8) for trial in lucky)
    assert {trial.status for trial in lucky} == {"slower than the original"}


def test_size_takes_the_smallest_that_is_not_slower(
    scripted: Speeds, network: ir.Model, feeds: list[dict[str, np.ndarray]]
) -> None:
    scripted(fused=1.2, int8=3.0, low=0.97, noise=0.04)
    out = lathe.optimize(network, "size", "2%", samples=feeds, progress=False)
    taken = next(trial for trial in out.search.trials if trial.name == out.search.chosen)
    possible = [trial for trial in out.search.trials if trial.drop is not None and trial.drop <= 0.02]
    assert taken.bytes == min(trial.bytes for trial in possible) < out.search.bytes / 3
    assert any("NBits" in op for op in count_ops(out.model)), "0.97 is 1 within a noise of 0.04"
    scripted(fused=1.2, int8=3.0, low=0.5)
    again = lathe.optimize(network, "size", "2%", samples=[*feeds, feeds[0]], progress=False)
    assert not any("NBits" in op for op in count_ops(again.model))


def test_goals_are_scored_as_documented() -> None:
    subject = Subject(True, False, False, False, "cpu", 64)
    trial = Trial("t", drop=0.0, speeds={"a": 4.0, "b": 1.0}, weights={"a": 1.0, "b": 3.0}, bytes=250)
    assert trial.speed == pytest.approx(4 ** (1 / 4))
    goals: tuple[Goal, ...] = ("speed", "size", "balanced")
    scores = [Progress(subject, goal, lathe.Budget(), 1000).score(trial) for goal in goals]
    assert scores == pytest.approx([2**0.5, 4.0, (2**0.5 * 4) ** 0.5])


def test_candidates_follow_the_model_and_the_results() -> None:
    budget = lathe.Budget("pooled_cosine", 0.01)

    def names(goal: Any = "speed", **options: Any) -> list[str]:
        subject = dataclasses.replace(Subject(True, False, False, False, "cpu", 64), **options)
        return [item.name for item in first_candidates(subject, goal, budget)]

    assert names() == ["cpu-fp32", "cpu-int8", "cpu-int8-dynamic"]
    assert names(samples=0) == ["cpu-fp32", "cpu-int8-dynamic"]
    assert names(products=False, convolutions=True) == ["cpu-fp32", "cpu-int8"]
    assert names(products=False) == names(quantized=True) == ["cpu-fp32"]
    assert names(decoder=True) == ["cpu-fp32", "cpu-int8", "8-bit weights", "cpu-int4", "cpu-int4, gptq"]
    assert names("size", samples=0) == ["cpu-fp32", "cpu-int8-dynamic", "8-bit weights", "cpu-int4"]
    assert names(device="cuda") == ["fused", "cuda-fp16"]


def progress(**speeds: tuple[float, float]) -> Progress:
    """A search in which these presets have (speed, drop)."""
    found = Progress(Subject(True, False, False, False, "cpu", 64), "speed", lathe.Budget("pooled_cosine", 0.01), 1000)
    for name, (speed, drop) in speeds.items():
        name = name.replace("_", "-")
        found.tried[name] = Candidate(name, tuple(resolve_passes(name)[0]))
        found.done[name] = Trial(name, drop=drop, speeds={"": speed}, weights={"": 1.0}, exact=name == "cpu-fp32")
    return found


def test_what_is_suggested_next() -> None:
    healed = progress(cpu_fp32=(1.2, 0.0), cpu_int8=(3.0, 0.04)).next()
    assert healed is not None and healed.name == "cpu-int8, healed"
    (quality,) = [step.quality for step in healed.passes if isinstance(step, lathe.passes.QuantizeStatic)]
    assert quality is not None and quality.metric == "pooled_cosine" and quality.max_drop == pytest.approx(0.008)

    state = progress(cpu_fp32=(1.2, 0.0), cpu_int8=(3.0, 0.004))
    seen: list[str] = []
    for speed, drop in ((3.6, 0.008), (4.2, 0.02)):
        found = state.next()
        assert found is not None
        seen.append(found.name)
        kinds = [step.name for step in found.passes]
        assert kinds.index("fuse-linear") < kinds.index("prune-adaptive") < kinds.index("smooth-quant")
        state.tried[found.name] = found
        state.done[found.name] = Trial(found.name, drop=drop, speeds={"": speed}, weights={"": 1.0})
    assert seen == ["cpu-int8, pruned 1.25 x", "cpu-int8, pruned 1.5 x"]
    assert state.next() is None and state.ranked()[0].name == seen[0]

    state = progress(cpu_fp32=(1.2, 0.0))
    first = state.next()
    assert first is not None and first.name == "cpu-fp32, pruned 1.25 x"
    state.tried[first.name], state.done[first.name] = (
        first,
        Trial(first.name, drop=0.5, speeds={"": 2}, weights={"": 1}),
    )
    second = state.next()
    assert second is not None and second.name == "cpu-fp32, pruned 1.1 x"


def test_ctrl_c_returns_the_best_so_far_and_the_next_search_goes_on(
    scripted: Speeds, network: ir.Model, feeds: list[dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(fused=1.2, int8=2.5)
    apart = search.compile_apart
    compiled: list[str] = []

    def until_the_second(request: Request, seconds: float, tell: Callable[[str], None]) -> None:
        if compiled:
            raise KeyboardInterrupt
        compiled.append(request.target)
        apart(request, seconds, tell)

    monkeypatch.setattr(search, "compile_apart", until_the_second)
    out = lathe.optimize(network, "speed", "1%", samples=feeds, progress=False)
    assert out.search.chosen == "cpu-fp32" and "Ctrl-C" in " ".join(out.search.notes)
    assert [trial.status for trial in out.search.trials] == ["", "stopped"]

    def counted(request: Request, seconds: float, tell: Callable[[str], None]) -> None:
        compiled.append(request.target)
        apart(request, seconds, tell)

    monkeypatch.setattr(search, "compile_apart", counted)
    done = lathe.optimize(network, "speed", "1%", samples=feeds, progress=False)
    assert "int8" in done.search.chosen and len(compiled) == len(set(compiled)), "the first was not compiled again"
    count = len(compiled)
    other = lathe.optimize(network, "balanced", "3%", samples=feeds, progress=False)
    assert any(trial.kept for trial in other.search.trials) and compiled[0] not in compiled[1:]
    assert len(compiled) > count, "another goal tries more, and takes over what is known"


def test_out_of_time(
    scripted: Speeds, network: ir.Model, feeds: list[dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(fused=1.2, int8=2.5)

    def late(request: Request, seconds: float, tell: Callable[[str], None]) -> None:
        raise OutOfTime

    monkeypatch.setattr(search, "compile_apart", late)
    out = lathe.optimize(network, "speed", "1%", samples=feeds, time_budget=30, progress=False)
    assert out.search.chosen == "original" and {trial.status for trial in out.search.trials} == {"out of time"}
    soon = lathe.optimize(network, "speed", "1%", samples=feeds, time_budget=1e-6, progress=False)
    assert not soon.search.trials and "Out of time" in soon.search.notes[-1]


def test_a_candidate_that_fails_is_named_and_the_others_go_on(
    scripted: Speeds, network: ir.Model, feeds: list[dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(fused=1.2, int8=2.5)
    apart = search.compile_apart

    def broken(request: Request, seconds: float, tell: Callable[[str], None]) -> None:
        if any(step.name == "quantize-static" for step in request.passes if not isinstance(step, str)):
            raise LatheError("The kernel is on fire.", "")
        apart(request, seconds, tell)

    monkeypatch.setattr(search, "compile_apart", broken)
    for _ in range(2):  # also when the failure is remembered
        out = lathe.optimize(network, "speed", "1%", samples=feeds, progress=False)
        assert "cpu-int8 failed: The kernel is on fire." in out.search.notes
        assert out.search.chosen == "cpu-int8-dynamic"


def test_without_samples_it_says_so_and_calibrates_nothing(scripted: Speeds, network: ir.Model) -> None:
    scripted(fused=1.2, int8=2.5)
    out = lathe.optimize(network, progress=False)
    assert [trial.name for trial in out.search.trials] == ["cpu-fp32", "cpu-int8-dynamic"]
    assert out.search.made and "made-up inputs" in out.search.notes[0]


def test_metrics(scripted: Speeds, network: ir.Model, feeds: list[dict[str, np.ndarray]]) -> None:
    scripted(fused=1.2, int8=2.5)
    labelled = [{**item, "labels": outputs(network, [item])[0].argmax(-1)} for item in feeds]
    out = lathe.optimize(network, "speed", "50%", samples=labelled, progress=False)
    assert out.search.metric.startswith("accuracy") and all((trial.drop or 0) >= 0 for trial in out.search.trials)

    def small(samples: Any, results: Any) -> float:
        return -float(np.mean([np.abs(result["y"]).mean() for result in results]))

    own = lathe.optimize(network, "speed", 0.5, metric=small, samples=feeds, progress=False)
    assert own.search.metric == "the fall of small"
    exact, got = (small(None, [{"y": y} for y in outputs(m, feeds)]) for m in (network, own.model))
    assert abs(exact - got) < 0.05
    noisy = lathe.optimize(network, "speed", lathe.Budget("sqnr", 200.0), samples=feeds, progress=False)
    assert noisy.search.chosen == "cpu-fp32", "no int8 has 200 dB"
    with pytest.raises(LatheError, match="Both max_drop and metric"):
        lathe.optimize(network, "speed", lathe.Budget(), metric="kl", samples=feeds)


def test_one_sample_judges_itself_and_that_is_said(
    scripted: Speeds, network: ir.Model, feeds: list[dict[str, np.ndarray]]
) -> None:
    scripted(fused=1.2, int8=2.5)
    out = lathe.optimize(network, samples=feeds[:1], progress=False)
    assert "one sample only" in " ".join(out.search.notes)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"goal": "fast"}, "no goal 'fast'"),
        ({"max_drop": "much"}, "'much' is no share"),
        ({"max_drop": "150%"}, "'150%' is no share"),
        ({"max_drop": -0.1}, "-0.1 is no share"),
        ({"max_drop": "cosine>=1"}, "cannot be read"),
        ({"metric": "speed"}, "metric"),
        ({"time_budget": 0}, "is no time"),
        ({"time_budget": "soon"}, "is no time"),
        ({"time_budget": "1.2.3m"}, "is no time"),
        ({"target": "tpu"}, "tpu"),
        ({"samples": [{"z": np.zeros(3, np.float32)}]}, "'z'"),
        ({"samples": []}, "no training data|no samples"),
    ],
)
def test_bad_input(options: dict[str, Any], what: str, network: ir.Model, cache: Path) -> None:
    with pytest.raises(LatheError, match=what):
        lathe.optimize(network, **options, progress=False)
    assert not cache.exists(), "it is said before anything is done"


def test_shares_and_times_are_read() -> None:
    assert [read_budget(text, None)[0].max_drop for text in ("1%", "0.5 %", "0.02", 0.03)] == [0.01, 0.005, 0.02, 0.03]
    assert read_budget("kl<=0.05", None) == (lathe.Budget("kl", 0.05), True)
    assert [read_seconds(text) for text in ("90s", "20m", "1.5h", "600", 12.5)] == [90, 1200, 5400, 600, 12.5]


def test_a_decoder_is_timed_on_texts_and_judged_by_its_logits(
    scripted: Speeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(fused=1.1, int8=1.3, low=1.6)
    model = decoder(Spec(rotary=(Rotary(16),), windows=(0,)))
    texts = [{"input_ids": RNG.integers(0, VOCABULARY, (2, 20))} for _ in range(6)]
    out = lathe.optimize(model, "speed", "5%", samples=texts, progress=False)
    assert out.search.metric == "KL in nats a token of the logits"
    assert {"8-bit weights", "cpu-int4, gptq"} <= {trial.name for trial in out.search.trials}
    (folder,) = (tmp_path / "cache" / "onnxlathe" / "optimize").iterdir()
    timed = np.load(folder / "samples" / "timed-0.npz")
    assert timed["prompt"].shape == (1, 20) and int(timed["new"]) == 16
    timer = Timer(str(folder / "original.onnx"), "cpu", 1)
    timer.load(str(folder / "samples" / "timed-0.npz"))
    found = timer.measure(0.01)
    assert found.keys() == {"prompt", "token"} and min(found.values()) > 0
    streams = lathe.optimize(model, "speed", 0, samples=[np.arange(30) % 40, np.arange(12)], progress=False)
    assert streams.search.judged >= 1


def test_shapes_that_are_timed() -> None:
    few = [{"x": np.zeros((1, n))} for n in (3, 5, 3, 3)]
    assert representatives(few) == [(0, 3.0), (1, 1.0)]
    many = [{"x": np.zeros((1, n))} for n in range(40, 0, -1)]
    chosen = representatives(many)
    assert [weight for _, weight in chosen] == [10.0] * 4
    assert [many[at]["x"].shape[1] for at, _ in chosen] == [6, 16, 26, 36]


def test_the_key_of_a_search_is_its_content(
    network: ir.Model, feeds: list[dict[str, np.ndarray]], tmp_path: Path
) -> None:
    key = kept.search_key(network, feeds, "cpu")
    assert kept.search_key(network.clone(), [dict(item) for item in feeds], "cpu") == key
    path = tmp_path / "elsewhere" / "net.onnx"
    path.parent.mkdir()
    save(network, path, external_data=True)
    assert kept.samples_hash(feeds) != kept.samples_hash(feeds[::-1])
    assert kept.search_key(network, feeds, "cuda") != key
    hashed = kept.graph_hash(load(path))
    assert hashed == kept.graph_hash(load(path))
    changed = load(path)
    value = changed.graph.initializers["a"]
    array = value.const_value.numpy().copy()  # type: ignore[union-attr]
    array[3, 4] += 1e-6
    value.const_value = ir.tensor(array, name="a")
    assert kept.graph_hash(changed) != hashed
    node = next(iter(network.graph))
    node.op_type = "Other"
    assert kept.search_key(network, feeds, "cpu") != key


def test_where_no_cache_can_be_written_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with kept.open_kept("key") as folder:
        folder.keep("a", {"failure": "x"})
        assert folder.figures("a") == {"failure": "x"}
    assert not folder.folder.exists()


def test_the_oldest_searches_go_first(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(kept, "_MOST", 2500)
    for number, key in enumerate(("old", "middle", "new")):
        with kept.open_kept(key) as folder:
            (folder.folder / "data").write_bytes(bytes(1000))
        stamp = time.time() - 100 + number
        if folder.folder.exists():
            os.utime(folder.folder, (stamp, stamp))
    with kept.open_kept("new"):
        pass
    assert {folder.name for folder in cache.iterdir()} == {"middle", "new"}


def test_the_picture_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    trials = [
        Trial("one", drop=0.0, speeds={"(1,16)": 1.5}, weights={"(1,16)": 1}, bytes=100, exact=True),
        Trial("two", drop=0.004, speeds={"(1,16)": 3.0}, weights={"(1,16)": 1}, bytes=30),
        Trial("worse", drop=0.5, speeds={"(1,16)": 2.0}, weights={"(1,16)": 1}, bytes=60, status="loses too much"),
        Trial("gone", status="failed"),
        Trial(
            "nan", drop=float("inf"), speeds={"(1,16)": 9.0}, weights={"(1,16)": 1}, bytes=9, status="loses too much"
        ),
    ]
    found = Search("speed", "1 - pooled cosine", 0.01, trials, "two", 100, 32, notes=["a note"])
    assert [trial.name for trial in found.front()] == ["one", "two"]
    assert "Infinity" not in json.dumps(found.to_dict())
    found.plot(tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    assert text.startswith("<?xml") and "two" in text
    found.print()
    printed = capsys.readouterr().out
    assert "<- taken" in printed and "3.00 x" in printed and "loses too much" in printed and "a note" in printed


def test_a_child_is_stopped_in_time_and_says_what_is_wrong(tmp_path: Path, network: ir.Model) -> None:
    path = save(network, tmp_path / "net.onnx")
    start = time.monotonic()
    with pytest.raises(OutOfTime):
        request = Request(str(path), str(tmp_path / "out.onnx"), ["cpu-fp32"], True, None, "cpu", 1, 0)
        compile_apart(request, 0.3, lambda text: None)
    assert time.monotonic() - start < 10 and not (tmp_path / "out.onnx").exists()
    with Child("time", str(tmp_path / "missing.onnx"), "cpu", "1") as child, pytest.raises(LatheError, match="no file"):
        child.answer()


def test_for_real(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes, timing, command line: a model whose fused form is measured to be faster or is not returned."""
    for name, value in (("_ROUNDS", 3), ("_TURN", 0.02), ("_SURE_ROUNDS", 3), ("_SURE_TURN", 0.02)):
        monkeypatch.setattr(search, name, value)

    def command(*options: str) -> tuple[int, str, str]:
        base = ["onnxlathe", "compile", str(model), "--for", "cpu", "--goal", "speed", "--threads", "1", *options]
        monkeypatch.setattr(sys, "argv", base)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    model, output = save(block(), tmp_path / "model.onnx"), tmp_path / "model.speed.onnx"
    sample = {"ids": RNG.integers(0, 96, (1, 24))}
    np.savez(tmp_path / "sample.npz", **sample)
    code, printed, error = command("--max-drop", "0", "--samples", str(tmp_path / "sample.npz"), "--time-budget", "2m")
    assert code == 0, error
    assert "<- taken" in printed and f"wrote {output}" in printed.replace("\n", "")
    stored = json.loads(load(output).metadata_props[REPORT_KEY])["search"]
    (trial,) = stored["trials"]
    assert trial["name"] == "cpu-fp32" and trial["speeds"]["(1,24)"] > 0 and trial["drop"] < 1e-5
    assert stored["chosen"] == ("cpu-fp32" if trial["speed"] >= 1 else "original")
    np.testing.assert_allclose(outputs(output, [sample])[0], outputs(model, [sample])[0], rtol=1e-4, atol=1e-5)
    assert (tmp_path / "model.speed.svg").exists()
    code, printed, _ = command("--max-drop", "0", "--samples", str(tmp_path / "sample.npz"), "--bundle")
    assert code == 0 and (tmp_path / "model.speed.bundle").is_dir()
    code, _, error = command("--passes", "basic", "--tolerance", "1")
    assert code == 2 and "--goal goes without --passes, --tolerance" in error
    code, _, error = command("--max-drop", "much")
    assert code == 2 and "'much'" in error
