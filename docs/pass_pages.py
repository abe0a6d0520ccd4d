"""Writes a page for each pass when the site is built: its docstring, its options, its measured figures.

Run by mkdocs (plugin gen-files). The figures come from ``benchmarks/results/passes.json``.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import json
from pathlib import Path
from typing import Any

import griffe
import mkdocs_gen_files

from onnxlathe.compiler.base import Claim, Pass
from onnxlathe.passes import PASSES
from onnxlathe.passes.presets import PRESETS, resolve_passes

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "passes.json"
FAMILIES = {
    "simplify": "Simplify",
    "fusion": "Fuse",
    "attention": "Attention",
    "quantization": "Quantize",
    "low_bit": "Low-bit weights",
    "pruning": "Prune",
    "memory": "Memory",
    "partition": "Divide",
}


def family(kind: type[Pass]) -> str:
    """The heading a pass stands under: its folder's."""
    parts = kind.__module__.split(".")
    return FAMILIES.get(parts[parts.index("passes") + 1], "Train")


def page(kind: type[Pass], measured: dict[str, Any]) -> str:
    """The page of one pass, in Markdown."""
    sections = griffe.parse(griffe.Docstring(inspect.getdoc(kind) or ""), griffe.Parser.google, warnings=False)
    text = "\n\n".join(section.value for section in sections if section.kind is griffe.DocstringSectionKind.text)
    first, _, rules = text.partition("\n\n")
    meanings = {
        item.name: " ".join(item.description.split())
        for section in sections
        if section.kind is griffe.DocstringSectionKind.attributes
        for item in section.value
    }
    exact = "answers equal (fp32, relative error at most 1e-5)" if kind.claims is Claim.EXACT else "changes numbers"
    presets = [f"`{name}`" for name in PRESETS if any(type(step) is kind for step in resolve_passes(name)[0])]
    lines = [
        f"# {kind.__name__}",
        f"`{kind.name}` · {exact} · " + (f"in {', '.join(presets)}" if presets else "in no preset"),
        "```bash\n" + f"onnxlathe compile model.onnx -o out.onnx --passes {kind.name}\n" + "```",
        first.replace("``", "`"),
        figure(kind.name, measured),
        "## Rules\n\n" + rules.replace("``", "`") if rules else "",
    ]
    fields = [field for field in dataclasses.fields(kind) if field.repr]
    if fields:
        rows = "\n".join(
            f"| `{field.name}` | {_cell(f'`{field.type}`')} | {_default(field)} "
            f"| {_cell(meanings.get(field.name, ''))} |"
            for field in fields
        )
        lines.append("## Options\n\n| option | type | default | meaning |\n|---|---|---|---|\n" + rows)
    return "\n\n".join(lines) + "\n"


def _default(field: dataclasses.Field[Any]) -> str:
    return "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def figure(name: str, measured: dict[str, Any]) -> str:
    """What ``benchmarks/passes.py`` measured of a pass, or where it is measured."""
    if name in measured["elsewhere"]:
        return f"**Measured** by `python benchmarks/{measured['elsewhere'][name]}.py`; see the guides."
    if name in measured["tested"]:
        return f"No benchmark has a figure of it; what it does is tested in `{measured['tested'][name]}`."
    row = measured["passes"].get(name)
    if row is None:
        return "**Not measured.**"
    if not row.get("applied"):
        return f"**Measured** on {row['model']}: it finds nothing to do there (`python benchmarks/passes.py`)."
    old, new = row["nodes"]
    time = ("time", 1 / row["speed"], row["noise"] / row["speed"])
    bars = [time, ("bytes", row["bytes"], 0.0), ("nodes", new / old, 0.0)]
    before, after = (f"{error:.0e}" for error in row["errors"])
    return (
        f"## Measured\n\n{picture(bars)}\n\nWith the pass relative to without it, on {row['model']}; largest error "
        f"against the original {before} without, {after} with it. Made by `python benchmarks/passes.py`."
    )


def picture(bars: list[tuple[str, float, float]]) -> str:
    """Horizontal bars around a line at 1; shorter is better."""
    scale = 240 / max(1.25, *(value for _, value, _ in bars))
    rows = [
        f'<text x="52" y="{y + 13}" text-anchor="end">{html.escape(label)}</text>'
        f'<rect x="60" y="{y}" width="{value * scale:.1f}" height="16" rx="2" opacity=".55"/>'
        f'<text x="{66 + value * scale:.1f}" y="{y + 13}">{value:.2f}{f" ± {noise:.2f}" if noise else ""}</text>'
        for y, (label, value, noise) in zip(range(4, 100, 24), bars, strict=False)
    ]
    one = f"{60 + scale:.1f}"
    line = f'<line x1="{one}" x2="{one}" y1="0" y2="76" stroke="currentColor" stroke-dasharray="3"/>'
    told = ", ".join(f"{label} {value:.2f}" for label, value, _ in bars)
    return (
        f'<svg viewBox="0 0 380 78" width="380" role="img" aria-label="With the pass, of without it: {told}" '
        f'fill="currentColor" font-size="12">{"".join(rows)}{line}</svg>'
    )


def main() -> None:
    """Writes ``passes/NAME.md`` for all passes, their index and their navigation."""
    measured = json.loads(RESULTS.read_text())
    overview, navigation = ["# Passes\n"], ["* [Overview](index.md)"]
    for heading in [*FAMILIES.values(), "Train"]:
        kinds = sorted((kind for kind in PASSES.values() if family(kind) == heading), key=lambda kind: kind.name)
        overview.append(f"\n## {heading}\n\n| pass | what it does |\n|---|---|")
        navigation.append(f"* {heading}")
        for kind in kinds:
            first = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
            overview.append(f"| [{kind.name}]({kind.name}.md) | {_cell(first)} |")
            navigation.append(f"    * [{kind.__name__}]({kind.name}.md)")
            with mkdocs_gen_files.open(f"passes/{kind.name}.md", "w") as file:
                file.write(page(kind, measured))
    for name, lines in (("index", overview), ("SUMMARY", navigation)):
        with mkdocs_gen_files.open(f"passes/{name}.md", "w") as file:
            file.write("\n".join(lines) + "\n")


main()
