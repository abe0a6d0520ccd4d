"""Decides whether a pass kept the meaning of a graph; what is ill-conditioned is told apart from what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import traceback
from collections.abc import Callable
from random import Random
from typing import Literal

import numpy as np
import onnx_ir as ir

import onnxlathe as lathe
from onnxlathe.compiler.base import Claim, Outcome, Pass, PassContext
from onnxlathe.compiler.graph import all_nodes, remove_dead
from onnxlathe.compiler.kept_caches import KeptCaches
from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.compiler.verify import Results, Signature, check_model, check_structure, compare, run_reference
from onnxlathe.passes.presets import make_pass

from .generate import Case, Feeds
from .noise import with_noise
from .pruned import false_claim, masked
from .trials import Trial

Kind = Literal["unchanged", "same", "approximate", "ill-conditioned", "refused", "wrong"]
# Operators that make what moved a little infinite or no number.
_POLES = {"Acos", "Acosh", "Asin", "Atanh", "Div", "Exp", "Log", "Pow", "Reciprocal", "Sqrt", "Tan"}
_MARGIN = 8
_HALF = 5e-3  # graphs with half precision: what is fused rounds in other places


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of a trial: its kind, the rules that fired, and what was wrong."""

    kind: Kind
    detail: str = ""
    rules: tuple[str, ...] = ()


class Wrong(Exception):
    """A pass broke a promise."""


@dataclasses.dataclass
class _Prepared:
    """A graph to try passes on, samples and its results for them, and a clone that a pass left as it was."""

    model: ir.Model
    feeds: list[Feeds]
    results: Results
    spare: ir.Model | None = None

    @functools.cached_property
    def content(self) -> bytes:
        """The graph, to be compared."""
        return _content(self.model)

    def take(self) -> ir.Model:
        """A clone to work on."""
        clone, self.spare = self.spare or self.model.clone(), None
        return clone

    def give_back(self, clone: ir.Model) -> None:
        """Keeps a clone that nothing changed."""
        self.spare = clone

    def adapted(self, kept: KeptCaches | None, after: ir.Model) -> tuple[list[Feeds], Results]:
        """Samples and results as a model takes and gives them of whose caches ``kept`` are left."""
        if kept is None:
            return self.feeds, self.results
        return [kept.of(item, after) for item in self.feeds], [kept.of(item, after) for item in self.results]


def _content(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


class Judge:
    """Tries passes on one graph.

    Args:
        case: the graph.
        random: draws the options of the passes.
    """

    def __init__(self, case: Case, random: Random) -> None:
        self.case = case
        self.random = random
        self.model = load_model(case.proto)
        infer_shapes(self.model)
        dtypes = {value.dtype for node in all_nodes(self.model) for value in node.outputs}
        self.half = ir.DataType.FLOAT16 in dtypes
        self.poles = any(node.op_type in _POLES for node in all_nodes(self.model))
        self.live = self.model.clone()
        remove_dead(self.live)
        self._prepared: dict[tuple[str, ...], _Prepared | None] = {}

    def load(self) -> Verdict:
        """What loading did to the graph: nothing that shows."""
        return self._judged(self._load)

    def _load(self) -> Verdict:
        check_structure(self.model)
        check_model(self.model)
        results = run_reference(self.model, self.case.feeds)
        return self._compared(load_model(self.case.proto), self.case.results, results, 0.0)

    def trial(self, trial: Trial) -> Verdict:
        """Runs one pass or preset."""
        return self._judged(lambda: self._preset(trial.name[7:]) if trial.make is None else self._pass(trial))

    def _judged(self, run: Callable[[], Verdict]) -> Verdict:
        try:
            return run()
        except Wrong as error:
            return Verdict("wrong", str(error))
        except lathe.ModelError as error:
            return Verdict("wrong", f"does not run any more: {error}")
        except lathe.LatheError as error:
            return Verdict("wrong", f"{type(error).__name__}: {error}")
        except Exception:  # whatever it is, it is a finding
            return Verdict("wrong", traceback.format_exc(limit=-4))

    def _pass(self, trial: Trial) -> Verdict:
        prepared = self._after(("raw",) if trial.raw else trial.after)
        if prepared is None or trial.make is None:
            return Verdict("unchanged")
        step = trial.make(self.random)
        after = prepared.take()
        context = self._context(prepared.feeds)
        try:
            outcome = step(after, context)
        except lathe.LatheError as error:
            return Verdict("refused", str(error))
        if not outcome.changed:
            prepared.give_back(after)
            return Verdict("unchanged")
        if prepared.content == _content(after):
            raise Wrong(f"nothing changed, and it says: {dict(outcome.counts)}")
        kept = KeptCaches.take(after)
        feeds, expected = prepared.adapted(kept, after)
        verdict = self._check(step, prepared.model, after, feeds, expected)
        wrong = false_claim(step, prepared.model, after, outcome, self.model, _without_empty(prepared.feeds))
        if wrong:
            raise Wrong(wrong)
        dense = masked(step, prepared.model, after)
        if dense is not None:
            alike = dataclasses.replace(prepared, results=run_reference(dense, prepared.feeds)).adapted(kept, after)
            self._masked(dense, after, prepared.feeds, *alike)
        if trial.again:
            self._twice(step, after, self._context(feeds))
        return dataclasses.replace(verdict, rules=tuple(outcome.counts))

    def truthful(self) -> Verdict:
        """Whether the graphs that passes said they left alone are as they were; to be asked last."""
        for names, prepared in self._prepared.items():
            if prepared is not None and prepared.spare is not None and _content(prepared.spare) != prepared.content:
                return Verdict("wrong", f"a pass changed the graph (after {names}) and did not say so")
        return Verdict("same")

    def _check(self, step: Pass, before: ir.Model, after: ir.Model, feeds: list[Feeds], expected: Results) -> Verdict:
        check_structure(after)
        check_model(after)
        if not step.changes_signature:
            Signature.of(before).check_kept(Signature.of(after))
        feeds, expected = _taken(after, feeds, expected)
        results = run_reference(after, feeds)
        expected = [step.expected(result) for result in expected]
        if step.claims is Claim.EXACT:
            return self._compared(before, expected, results, step.tolerance)
        return self._approximated(before, feeds, expected, results)

    def _twice(self, step: Pass, after: ir.Model, context: PassContext) -> None:
        try:
            second: Outcome = step(after.clone(), context)
        except lathe.LatheError:  # e.g. values that are infinite now
            return
        if second.changed:
            raise Wrong(f"a second run changes it again: {dict(second.counts)}")

    def _preset(self, name: str) -> Verdict:
        feeds = _without_empty(self.case.feeds)
        try:
            compiled = lathe.compile(
                self.case.proto, name, calibration=feeds, verify=False, speed_gate=False, progress=False
            )
        except lathe.LatheError as error:
            if isinstance(error, lathe.PassError) and ("Please report" in str(error) or "failed:" in str(error)):
                raise Wrong(str(error)) from error
            return Verdict("refused", str(error))
        rules = tuple(record.name for record in compiled.report.passes if record.counts)
        if not rules:
            return Verdict("unchanged")
        feeds, expected = _taken(compiled.model, self.case.feeds, self.case.results)
        results = run_reference(compiled.model, feeds)
        if name in ("basic", "cpu-fp32"):
            verdict = self._compared(self.model, expected, results, 1e-5)
        else:
            verdict = self._approximated(self.model, feeds, expected, results)
        return dataclasses.replace(verdict, rules=rules)

    def _context(self, feeds: list[Feeds]) -> PassContext:
        return PassContext(threads=1, feeds=_without_empty(feeds), reference=self.model, original=self.model)

    def _after(self, names: tuple[str, ...]) -> _Prepared | None:
        """The graph after the passes ``names``, which are judged elsewhere; None where they do nothing."""
        if names not in self._prepared:
            self._prepared[names] = None
            model = (self.model if names == ("raw",) else self.live).clone()
            passes = [] if names == ("raw",) else [make_pass(name) for name in names]
            feeds = self.case.feeds
            try:
                changed = [step(model, self._context(feeds)).changed for step in passes]
                if (kept := KeptCaches.take(model)) is not None:
                    feeds = [kept.of(sample, model) for sample in feeds]
                if not passes or any(changed):
                    results = run_reference(model, feeds) if passes else self.case.results
                    self._prepared[names] = _Prepared(model, feeds, results)
            except lathe.LatheError:
                pass
        return self._prepared[names]

    def _compared(self, before: ir.Model, expected: Results, results: Results, tolerance: float) -> Verdict:
        with np.errstate(all="ignore"):
            error, output = compare(expected, results)
            tolerance = max(tolerance, _HALF) if self.half and tolerance else tolerance
            if error <= tolerance:
                return Verdict("same")
            sensitivity = self.sensitivity(before)
        if tolerance and error <= _MARGIN * sensitivity:
            return Verdict("ill-conditioned", f"{output} differs by {error:.1e}, noise gives {sensitivity:.1e}")
        raise Wrong(f"{output} differs by {error:.1e} (allowed {tolerance:.0e}, noise gives {sensitivity:.1e})")

    def _masked(
        self, dense: ir.Model, after: ir.Model, feeds: list[Feeds], small: list[Feeds], expected: Results
    ) -> None:
        """``after`` computes on ``small`` what ``dense`` does on ``feeds``."""
        finite = [
            all(np.isfinite(array).all() for array in item.values() if array.dtype.kind == "f") for item in expected
        ]
        small, expected = (list(itertools.compress(items, finite)) for items in (small, expected))
        small, expected = _taken(after, small, expected)
        error, output = compare(expected, run_reference(after, small))
        if error > (_HALF if self.half else 1e-5) and error > _MARGIN * self.sensitivity(dense, feeds):
            raise Wrong(f"{output} differs by {error:.1e} from the masked original's")

    def _approximated(self, model: ir.Model, feeds: list[Feeds], expected: Results, results: Results) -> Verdict:
        for before, after in zip(expected, results, strict=True):
            for name, array in before.items():
                if name not in after:  # of a cache that went with its layer; other outputs are in the signature
                    continue
                other = after[name]
                if array.dtype != other.dtype or array.ndim != other.ndim:
                    raise Wrong(f"{name} was {array.dtype}{array.shape} and is {other.dtype}{other.shape}")
                if array.dtype.kind == "f" and np.isfinite(array).all() and not np.isfinite(other).all():
                    if self.poles or _fragile(model, feeds):
                        return Verdict("ill-conditioned", f"{name} is not finite any more, nor is it with noise")
                    raise Wrong(f"{name} is not finite any more")
        return Verdict("approximate")

    def sensitivity(self, model: ir.Model, feeds: list[Feeds] | None = None) -> float:
        """How far the results move when every float tensor is off by a few units of its last place."""
        feeds = self.case.feeds if feeds is None else feeds
        expected, worst = run_reference(model, feeds), 0.0
        for seed in range(3):
            try:
                worst = max(worst, compare(expected, run_reference(with_noise(model, seed), feeds))[0])
            except lathe.LatheError:
                continue
        return worst


def _fragile(model: ir.Model, feeds: list[Feeds]) -> bool:
    """Whether results are no numbers any more where everything is off by some: a power of what may be negative."""
    return any(
        not np.isfinite(array).all()
        for seed in range(5)
        for found in run_reference(with_noise(model, seed, 0.3), feeds)
        for array in found.values()
        if array.dtype.kind == "f"
    )


def _without_empty(feeds: list[Feeds]) -> list[Feeds]:
    """Samples without empty dims."""
    return [sample for sample in feeds if all(array.size for array in sample.values())]


def _taken(after: ir.Model, feeds: list[Feeds], expected: Results) -> tuple[list[Feeds], Results]:
    """The samples that ``after`` must take: ORT's kernel of Attention takes no empty batch (docs/limits.md)."""
    attends = any(node.op_type == "Attention" and node.domain == "" for node in all_nodes(after))
    empty = [any(array.size == 0 for array in sample.values()) for sample in feeds]
    kept = [index for index, none in enumerate(empty) if not (attends and none)]
    return [feeds[index] for index in kept], [expected[index] for index in kept]
