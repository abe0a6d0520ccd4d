"""The report page: whole, escaped, short, and looked at in a browser at the widths of a phone and of a desk."""

from __future__ import annotations

import dataclasses
import html.parser
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxlathe as lathe
from onnxlathe.compiler.base import Refusal
from onnxlathe.compiler.memory_plan import PLAN_KEY, MemoryPlan, PlannedBuffer, pack_plans
from onnxlathe.compiler.report import PassRecord, Report, Speed
from onnxlathe.compiler.reporting.records import Latency, NodeTime
from onnxlathe.optimizing.trials import Search, Trial
from onnxlathe.passes.memory.plan_memory import PlanMemory
from onnxlathe.passes.quantization.quantize_static import QuantizeStatic
from onnxlathe.reporting import memory_pictures
from onnxlathe.runtime.node_profile import profile_in_turns
from rewriting import from_text, inside_if

pytest.importorskip("jinja2")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<script>alert(1)</script>\"'&"
TEXT = """<ir_version: 10, opset_import: ["" : 20]>
net (float[n, 32] x, float[32, 64] w1, float[64] b1, float[64, 32] w2) => (y) {
  i = Identity(x)  m = MatMul(i, w1)  a = Add(m, b1)  r = Relu(a)  c = MatMul(r, w2)  s = Sigmoid(c)  y = Add(s, x)
}"""


class Page(html.parser.HTMLParser):
    """Tags with their attributes, headings in order, and what is open at the end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def samples() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((rows, 32)).astype(np.float32)} for rows in (4, 9)]


@pytest.fixture(scope="module")
def compiled(samples: list[dict[str, np.ndarray]]) -> Any:
    """A quantized model with a memory plan, everything measured."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (32, 64), "b1": (64,), "w2": (64, 32)}
    model = from_text(TEXT, **{name: rng.standard_normal(s).astype(np.float32) / 8 for name, s in shapes.items()})
    passes = ["cleanup", "fuse-linear", QuantizeStatic(), PlanMemory(bindings={"n": 4})]
    out = lathe.compile(model, passes, calibration=samples, profile=True, progress=False, threads=1, speed_gate=False)
    out.report.speed = Speed(1.7, 0.04, {"(4,32)": 1.7, "(9,32)": 2.5})
    return out


def write(report: Report, folder: Path) -> str:
    report.html(folder / "report.html")
    assert [path.name for path in folder.iterdir()] == ["report.html"], "no temporary file stays"
    return (folder / "report.html").read_text(encoding="utf-8")


def flat(page: Page) -> str:
    return re.sub(r"\s+", " ", " ".join(page.text))


def test_everything_is_on_the_page(compiled: Any, tmp_path: Path) -> None:
    report = compiled.report
    assert report.latency and report.analysis and report.pictures and report.graph and report.weights
    page = Page(write(report, tmp_path))
    assert not page.open
    text = flat(page)
    for record in report.passes:
        assert record.name in text
        for note in record.notes:
            assert re.sub(r"\s+", " ", note) in text
    for item in report.graph.replacements:
        assert all(op.replace("com.microsoft.", "") in text for op in (*item.before, *item.after))
    for layer in report.analysis["layers"]:
        assert layer["name"] in text
    for item in report.weights.changes:
        assert item.name in text
    for op in list(report.latency[0].ops)[:12]:
        assert op in text
    assert "lathe.compile(..., [" in text and report.environment["cpu"] in text
    assert any("arena" not in caption and caption in text for caption in report.pictures)
    anchors = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    ids = {f"#{attributes['id']}" for _, attributes in page.tags if attributes.get("id")}
    assert anchors <= ids, "every link leads somewhere"


def test_page_loads_nothing(compiled: Any, tmp_path: Path) -> None:
    page = Page(write(compiled.report, tmp_path))
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "object", "embed", "audio", "video")]
    for tag, attributes in page.tags:
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes), tag
        if attributes.get("href"):
            assert attributes["href"].startswith(("#", "data:,")), tag
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "report.html").read_text(), re.S)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]


def test_headings_are_in_order_and_pictures_have_a_text(compiled: Any, tmp_path: Path) -> None:
    page = Page(write(compiled.report, tmp_path))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels)), levels
    pictures = [attributes for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert len(pictures) >= 5 and all(attributes.get("aria-label") for attributes in pictures)
    regions = [attributes for tag, attributes in page.tags if attributes.get("class") == "scroll"]
    assert regions and all(item.get("tabindex") == "0" and item.get("aria-label") for item in regions)


def test_stored_report_makes_the_same_page(compiled: Any, tmp_path: Path) -> None:
    """Through JSON and back; the pictures come from the metadata, which an artifact has too."""
    again = Report.from_dict(json.loads(json.dumps(compiled.report.to_dict())))
    assert not again.pictures and again.graph == compiled.report.graph and again.latency == compiled.report.latency
    again.pictures = memory_pictures(compiled.model)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert write(again, first) == write(compiled.report, second)


def test_report_of_an_older_version(tmp_path: Path) -> None:
    old = {"source": "m.onnx", "passes": [], "ops_before": {"Add": 1}, "ops_after": {"Add": 1}, "unknown": 1}
    page = Page(write(Report.from_dict(old), tmp_path))
    assert not page.open and "not measured" in flat(page) and "not compared" in flat(page)


def evil_report() -> Report:
    """A report in which every name that can come from a model is an attack."""
    record = PassRecord(
        EVIL, EVIL, "applied", 0.1, (3, 2), (100, 50), {EVIL: 2}, [EVIL], [Refusal(EVIL, EVIL, EVIL)], 0.1,
        Speed(1.0, 0.1, {EVIL: 1.0}),
    )  # fmt: skip
    layer = {"name": EVIL, "op": EVIL, "value": EVIL, "position": 0, "contribution": 1.0, "saturation": None}
    layer |= dict.fromkeys(("local_sqnr", "local_cosine", "cumulative_sqnr", "cumulative_cosine"), 1.0)
    output = {"name": EVIL, "sqnr": 1.0, "cosine": 1.0, "relative_error": 1.0}
    data = {
        "source": f"/models/{EVIL}",
        "device": EVIL,
        "passes": [dataclasses.asdict(record), dataclasses.asdict(PassRecord(EVIL, notes=[EVIL]))],
        "ops_before": {EVIL: 3},
        "ops_after": {EVIL: 2},
        "weight_bytes": [100, 50],
        "error": 0.5,
        "environment": {EVIL: EVIL, "command": EVIL, "call": EVIL, "onnxlathe": EVIL},
        "graph": {
            "unchanged": 1,
            "removed": 1,
            "added": 1,
            "replacements": [{"before": {EVIL: 1}, "after": {EVIL: 1}, "passes": [EVIL], "places": 1, "example": EVIL}],
        },
        "weights": {
            "changes": [
                {"name": EVIL, "op": EVIL, "shape": [2], "types": [EVIL, EVIL], "elements": [2000, 2000], "zeros": 0.5,
                 "bytes_before": 8000, "bytes_after": 8000}
            ],
            "more": [0, 0, 0],
            "bytes_by_type": [{EVIL: 8000}, {EVIL: 8000}],
        },
        "latency": [dataclasses.asdict(Latency(EVIL, {EVIL: (1.0, 1.0)}, ([NodeTime(EVIL, EVIL, 1.0)], [])))],
        "analysis": {"outputs": [output], "layers": [layer], "samples": 1, "notes": [EVIL]},
        "search": {
            "goal": EVIL, "metric": EVIL, "limit": 0.01, "chosen": EVIL, "judged": 3, "made": True, "notes": [EVIL],
            "trials": [{"name": EVIL, "speed": 2.0, "speeds": {EVIL: 2.0}, "drop": 0.002, "bytes": 10, "status": EVIL,
                        "front": True}],
        },
    }  # fmt: skip
    return Report.from_dict(json.loads(json.dumps(data)))


def test_names_are_escaped(tmp_path: Path) -> None:
    text = write(evil_report(), tmp_path)
    page = Page(text)
    assert not page.open and "<script" not in text.lower()
    assert text.count("&lt;script&gt;") > 30
    assert flat(page).count("<script>alert(1)</script>") > 20, "shown as it is"


def test_a_model_with_evil_names(tmp_path: Path, samples: list[dict[str, np.ndarray]]) -> None:
    model = from_text("""<ir_version: 10, opset_import: ["" : 20]> g (float[n, 32] x) => (y) {
        a = Relu(x) b = Identity(a) c = Relu(b) y = Add(c, b) }""")
    for node in model.graph:
        node.name = f"{EVIL}{node.name}"
        for value in node.outputs:
            if value.name != "y":
                value.name = f"{EVIL}{value.name}"
    out = lathe.compile(model, ["cleanup"], calibration=samples[:1], progress=False)
    plan = MemoryPlan(EVIL, {EVIL: 1}, (EVIL,), (PlannedBuffer((EVIL,), 64, 0, 1, 0),), EVIL)
    out.model.metadata_props[PLAN_KEY] = pack_plans([plan])
    out.report.pictures = memory_pictures(out.model)
    text = write(out.report, tmp_path)
    assert "<script" not in text and "&lt;script&gt;" in text and "<svg" in text


def test_thousands_of_refusals_make_a_short_page(tmp_path: Path) -> None:
    """They are grouped by rule and by what their reasons say beside names and numbers, and counted."""
    refusals = [Refusal(f"node_{i}", "A -> B", f"value_{i} is also used elsewhere") for i in range(9_000)]
    refusals += [Refusal(f"node_{i}", "A -> B", f"it has {i} rows") for i in range(1_000)]
    refusals += [Refusal(f"n{i}", f"rule {'x' * i} -> y", "no") for i in range(300)]
    notes = [f"note {i}" for i in range(5_000)]
    counts = {f"rule {i}": 1 for i in range(2_000)}
    ops = {f"Op{i}": i for i in range(3_000)}
    record = PassRecord("p", status="applied", nodes=(20_000, 100), counts=counts, notes=notes, refusals=refusals)
    report = Report(source="m" * 500, passes=[record], ops_before=ops, ops_after={"Op0": 5})
    text = write(report, tmp_path)
    assert len(text) < 150_000
    page = flat(Page(text))
    assert "10,300 places nearly matched" in page and "value_0 is also used elsewhere" in page
    assert "9,000 ×" in page and "1,000 ×" in page and "and 8,996 more" in page and "value_5" not in page
    assert "and 261 rules that are not shown" in page
    assert "2,000" in page or "1980 other rules" in page.replace(",", "")


def test_without_jinja(compiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(lathe.LatheError, match=r'pip install "onnxlathe\[report\]"'):
        compiled.report.html(tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_failed_writing_keeps_the_old_page(compiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def full(self: Path, other: Path) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(lathe.LatheError, match="no space"):
        compiled.report.html(target)
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_search_is_shown(tmp_path: Path) -> None:
    """Every pipeline tried, the one taken marked, in the table and in the picture."""
    search = Search("speed", "1 - cosine", 0.01, chosen="int8", bytes=100, judged=8, notes=["no GPU here"])
    for name, drop, speed, status in (("fp32", 0.0, 1.5, ""), ("int8", 0.004, 3.0, ""), ("int4", 0.3, 2.0, "too far")):
        search.trials.append(Trial(name, "", False, drop, {"(1,16)": speed}, {"(1,16)": 1.0}, bytes=50, status=status))
    search.trials.append(Trial("broken", status="failed: no samples"))
    text = write(Report(search=json.loads(json.dumps(search.to_dict()))), tmp_path)
    page = flat(Page(text))
    assert "Taken: int8" in page and "too far" in page and "failed: no samples" in page and "no GPU here" in page
    assert "at most 0.01 of 1 - cosine on 8 samples" in page and "3.00 ×" in page
    taken, others = (re.search(rf'<path class="dots {kind}" d="([^"]*)"', text) for kind in ("taken", "others"))
    assert taken is not None and others is not None and (taken[1].count("M"), others[1].count("M")) == (1, 3)


# ---- what is measured


def test_times_of_both_sides(compiled: Any) -> None:
    """Operators that ONNX Runtime runs on each side, and times that add up."""
    for item in compiled.report.latency:
        assert any("MatMul" in op or "Gemm" in op for op, (old, _) in item.ops.items() if old)
        assert any("Integer" in op or op.startswith("Q") for op, (_, new) in item.ops.items() if new)
        for side in range(2):
            listed = sum(node.seconds for node in item.nodes[side])
            assert listed == pytest.approx(sum(pair[side] for pair in item.ops.values()))
    assert [item.sample for item in compiled.report.latency] == ["(4,32)", "(9,32)"]


def test_bodies_are_counted_by_their_nodes() -> None:
    model = inside_if(from_text('<ir_version: 10, opset_import: ["" : 20]> g (float[2, 3] x) => (y) { y = Relu(x) }'))
    feeds = {"x": np.ones((2, 3), np.float32), "take": np.array([True])}
    found = profile_in_turns([model, model], [{}, {}], [feeds, feeds], threads=1, turns=2)
    assert {op for side in found for _, op in side} == {"Relu"}


def test_nothing_is_measured_unasked(tmp_path: Path) -> None:
    model = from_text('<ir_version: 10, opset_import: ["" : 20]> g (float[n, 3] x) => (y) { y = Relu(x) }')
    report = lathe.compile(model, "basic", progress=False).report
    assert not report.latency and report.analysis is None
    assert "Where the time goes" not in write(report, tmp_path)


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(compiled: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {"full": folder / "full.html", "evil": folder / "evil.html"}
    compiled.report.html(found["full"])
    evil_report().html(found["evil"])
    return found


_CONTRAST = """() => {
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 10 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(linear)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const back = e => { for (; e; e = e.parentElement) { const c = parts(getComputedStyle(e).backgroundColor);
    if (c.length == 3 || c[3] == 1) return c; } return [255, 255, 255]; };
  const poor = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()) || e.closest('svg')) continue;
    const a = light(parts(getComputedStyle(e).color)), b = light(back(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push([e.tagName, e.className, e.textContent.slice(0, 30), ratio]);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("which", ["full", "evil"])
def test_in_a_browser(browser: Any, pages: dict[str, Path], which: str, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[which].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert said == [] and asked == [pages[which].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
    narrow = page.evaluate("[...document.querySelectorAll('h1, h2, p, td, summary')].filter(e => e.clientWidth && "
                           "e.getBoundingClientRect().right > innerWidth && !e.closest('.scroll')).length")  # fmt: skip
    assert narrow == 0
    assert page.evaluate(_CONTRAST) == [], "text that is hard to read"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] < 60")
    assert dark is (scheme == "dark")
    context.close()


def test_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    """Tab leads to the skip link, then the sections; Enter opens a pass; what has the focus shows it."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(pages["full"].as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.parentElement.open") is True
    page.close()
