"""The report as one HTML page: a template, a style sheet and SVG in one file, without scripts and without network."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath

from ...runtime.errors import LatheError
from ..base import Refusal
from ..report import PassRecord, Report, format_bytes
from .pictures import bits_class, error_chart, search_chart, weight_map
from .records import Weights

_HERE = Path(__file__).parent
_RULES, _REASONS, _NODES, _NAME = 40, 8, 4, 100  # how much of a list is shown, and how long a name may be
_NAMES = re.compile(r"\S*[\d_/.:]\S*")  # words that are numbers or names: two reasons that differ only there are alike


@dataclasses.dataclass
class Reason:
    """Refusals of one rule whose reasons are alike.

    Attributes:
        text: the reason of the first.
        count: how many.
        nodes: names of the first few.
    """

    text: str
    count: int
    nodes: list[str]


@dataclasses.dataclass
class Refused:
    """A rule that was refused.

    Attributes:
        by: name of the pass.
        rule: the rule.
        count: how often.
        reasons: why, the most frequent first; at most ``_REASONS``.
        more: refusals for other reasons.
    """

    by: str
    rule: str
    count: int
    reasons: list[Reason]
    more: int


def render(report: Report) -> str:
    """The page.

    Names of nodes and values come from the model and are escaped. Long lists are cut, and say what they leave out.

    Raises:
        LatheError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise LatheError("The report page needs jinja2.", 'Install it with: pip install "onnxlathe[report]"') from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters: dict[str, Callable[..., str]] = {
        "bytes": format_bytes,
        "change": _change,
        "share": _share,
        "percent": _percent,
        "seconds": _seconds,
        "times": _times,
        "error": _error,
        "relative": _relative,
        "decibel": _decibel,
        "name": _name,
        "plural": _plural,
    }
    environment.filters.update(filters)
    template = environment.from_string((_HERE / "page.html.j2").read_text(encoding="utf-8"))
    refused = _by_rule(report.passes)
    return template.render(
        report=report,
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        title=PurePath(report.source).name or "model",
        worked=[record for record in report.passes if record.status != "unchanged"],
        idle=Counter(record.name for record in report.passes if record.status == "unchanged"),
        refused=refused[:_RULES],
        rules_more=len(refused) - _RULES,
        refusals=sum(len(record.refusals) for record in report.passes),
        top=_by_reason(refused),
        nodes=(sum(report.ops_before.values()), sum(report.ops_after.values())),
        ops_changed=_changed_ops(report),
        types=_types(report.weights),
        weight_map=weight_map(report.weights) if report.weights else "",
        tried=search_chart(report.search) if report.search else "",
        chart=error_chart(report.analysis["layers"]) if report.analysis else "",
    )


def _by_rule(passes: Iterable[PassRecord]) -> list[Refused]:
    """Refusals by pass and rule, the most frequent first."""
    rules: dict[tuple[str, str], list[Refusal]] = defaultdict(list)
    for record in passes:
        for refusal in record.refusals:
            rules[record.name, refusal.rule].append(refusal)
    found = [_refused(by, rule, refusals) for (by, rule), refusals in rules.items()]
    return sorted(found, key=lambda item: -item.count)


def _refused(by: str, rule: str, refusals: Sequence[Refusal]) -> Refused:
    alike: dict[str, list[Refusal]] = defaultdict(list)
    for refusal in refusals:
        alike[_NAMES.sub("", refusal.reason)].append(refusal)
    ranked = sorted(alike.values(), key=lambda group: -len(group))
    reasons = [Reason(group[0].reason, len(group), [item.node for item in group[:_NODES]]) for group in ranked]
    return Refused(by, rule, len(refusals), reasons[:_REASONS], sum(reason.count for reason in reasons[_REASONS:]))


def _by_reason(refused: Iterable[Refused]) -> list[tuple[str, Reason]]:
    """The three most frequent reasons, each with its pass."""
    reasons = [(item.by, reason) for item in refused for reason in item.reasons]
    return sorted(reasons, key=lambda pair: -pair[1].count)[:3]


def _changed_ops(report: Report) -> list[tuple[str, int, int]]:
    """Operators whose number changed, the most changed first."""
    names = {*report.ops_before, *report.ops_after}
    counts = [(op, report.ops_before.get(op, 0), report.ops_after.get(op, 0)) for op in names]
    return sorted((item for item in counts if item[1] != item[2]), key=lambda item: (-abs(item[2] - item[1]), item[0]))


def _types(weights: Weights | None) -> list[tuple[str, str, int, int]]:
    """Element types with the class of their color and their bytes before and after, those with most bytes first."""
    before, after = weights.bytes_by_type if weights else ({}, {})
    found = [(bits_class(kind), kind, before.get(kind, 0), after.get(kind, 0)) for kind in {**before, **after}]
    return sorted(found, key=lambda item: -max(item[2:]))


def _share(part: float, whole: float) -> str:
    """``43.21%``, for widths."""
    return f"{100 * min(max(part / whole, 0.0), 1.0):.2f}%" if whole else "0%"


def _change(before: float, after: float) -> str:
    """``−75 %``."""
    if not before:
        return "new"
    percent = round(100 * (after - before) / before)
    return f"{'−' if percent < 0 else '+' if percent else '±'}{abs(percent)} %"


def _percent(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if value < 0.9995 else "100%"


def _relative(value: float) -> str:
    """An error for people: ``4.9 %``, or ``equal`` up to what rounding makes."""
    if value <= 1e-5:
        return "equal"
    return f"{100 * value:.2g} %" if value < 10 else f"{100 * value:.0f} %"


def _seconds(value: float) -> str:
    """``1.2 s``, ``3.4 ms`` or ``56 µs``."""
    for scale, unit in ((1, "s"), (1e3, "ms")):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}" if value * scale < 1000 else f"{value * scale:.0f} {unit}"
    return f"{value * 1e6:.0f} µs"


def _times(ratio: float) -> str:
    """``3.1 ×``."""
    return f"{ratio:.2f} ×" if ratio < 10 else f"{ratio:.0f} ×"


def _error(value: float | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")


def _decibel(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.1f}"


def _name(text: str) -> str:
    """A name of the model, its middle left out where it is very long."""
    return text if len(text) <= _NAME else f"{text[: _NAME // 2]}…{text[-_NAME // 2 :]}"


def _plural(count: int, noun: str) -> str:
    """``1 place``, ``2 places``."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


__all__ = ["render"]
