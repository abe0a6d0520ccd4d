"""Decides whether a pass kept the meaning of a graph; what is ill-conditioned is told apart from what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import traceback
from collections.abc import Callable
from random import Random
from typing import Literal

import numpy as np
import onnx_ir as ir

import onnxlathe as lathe
from onnxlathe.compiler.base import Claim, Outcome, Pass, PassContext
from onnxlathe.compiler.graph import Names, all_nodes, make_node, remove_dead
from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.compiler.verify import Results, Signature, check_model, check_structure, compare, run_reference
from onnxlathe.passes.presets import make_pass

from .generate import Case, Feeds
from .trials import Trial

Kind = Literal["unchanged", "same", "approximate", "ill-conditioned", "refused", "wrong"]
_NOISE = {ir.DataType.FLOAT: 2.0**-22, ir.DataType.DOUBLE: 2.0**-22, ir.DataType.FLOAT16: 2.0**-10}
_POLES = {
    "Acosh",
    "Asin",
    "Acos",
    "Atanh",
    "Div",
    "Exp",
    "Log",
    "Pow",
    "Reciprocal",
    "Sqrt",
    "Tan",
}  # of a value that moved
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
    """A graph to try passes on, its results, and a clone that a pass left as it was."""

    model: ir.Model
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
        results = self._run(self.model)
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
        context = self._context(prepared.model)
        try:
            outcome = step(after, context)
        except lathe.LatheError as error:
            return Verdict("refused", str(error))
        if not outcome.changed:
            prepared.give_back(after)
            return Verdict("unchanged")
        if prepared.content == _content(after):
            raise Wrong(f"nothing changed, and it says: {dict(outcome.counts)}")
        verdict = self._check(step, prepared.model, after, prepared.results)
        if trial.again:
            self._twice(step, after, context)
        return dataclasses.replace(verdict, rules=tuple(outcome.counts))

    def truthful(self) -> Verdict:
        """Whether the graphs that passes said they left alone are as they were; to be asked last."""
        for names, prepared in self._prepared.items():
            if prepared is not None and prepared.spare is not None and _content(prepared.spare) != prepared.content:
                return Verdict("wrong", f"a pass changed the graph (after {names}) and did not say so")
        return Verdict("same")

    def _check(self, step: Pass, before: ir.Model, after: ir.Model, expected: Results) -> Verdict:
        check_structure(after)
        check_model(after)
        if not step.changes_signature:
            Signature.of(before).check_kept(Signature.of(after))
        feeds, expected = self._taken(after, expected)
        results = run_reference(after, feeds)
        expected = [step.expected(result) for result in expected]
        if step.claims is Claim.EXACT:
            return self._compared(before, expected, results, step.tolerance)
        return self._approximated(expected, results)

    def _twice(self, step: Pass, after: ir.Model, context: PassContext) -> None:
        try:
            second: Outcome = step(after.clone(), context)
        except lathe.LatheError:  # e.g. values that are infinite now
            return
        if second.changed:
            raise Wrong(f"a second run changes it again: {dict(second.counts)}")

    def _preset(self, name: str) -> Verdict:
        feeds = self._calibration()
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
        feeds, expected = self._taken(compiled.model, self.case.results)
        results = run_reference(compiled.model, feeds)
        if name in ("basic", "cpu-fp32"):
            verdict = self._compared(self.model, expected, results, 1e-5)
        else:
            verdict = self._approximated(expected, results)
        return dataclasses.replace(verdict, rules=rules)

    def _calibration(self) -> list[Feeds]:
        """Samples without empty dims."""
        return [feeds for feeds in self.case.feeds if all(array.size for array in feeds.values())]

    def _context(self, before: ir.Model) -> PassContext:
        return PassContext(threads=1, feeds=self._calibration(), reference=self.model, original=self.model)

    def _after(self, names: tuple[str, ...]) -> _Prepared | None:
        """The graph after the passes ``names``, which are judged elsewhere; None where they do nothing."""
        if names not in self._prepared:
            self._prepared[names] = None
            model = (self.model if names == ("raw",) else self.live).clone()
            passes = [] if names == ("raw",) else [make_pass(name) for name in names]
            try:
                changed = [step(model, self._context(model)).changed for step in passes]
                if not passes or any(changed):
                    results = self._run(model) if passes else self.case.results
                    self._prepared[names] = _Prepared(model, results)
            except lathe.LatheError:
                pass
        return self._prepared[names]

    def _run(self, model: ir.Model) -> Results:
        return run_reference(model, self.case.feeds)

    def _taken(self, after: ir.Model, expected: Results) -> tuple[list[Feeds], Results]:
        """The samples that ``after`` must take: ORT's kernel of Attention takes no empty batch (docs/limits.md)."""
        attends = any(node.op_type == "Attention" and node.domain == "" for node in all_nodes(after))
        empty = [any(array.size == 0 for array in feeds.values()) for feeds in self.case.feeds]
        kept = [index for index, none in enumerate(empty) if not (attends and none)]
        return [self.case.feeds[index] for index in kept], [expected[index] for index in kept]

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

    def _approximated(self, expected: Results, results: Results) -> Verdict:
        for before, after in zip(expected, results, strict=True):
            for name, array in before.items():
                other = after[name]
                if array.dtype != other.dtype or array.ndim != other.ndim:
                    raise Wrong(f"{name} was {array.dtype}{array.shape} and is {other.dtype}{other.shape}")
                finite = not self.poles and array.dtype.kind == "f" and np.isfinite(array).all()
                if finite and not np.isfinite(other).all():
                    raise Wrong(f"{name} is not finite any more")
        return Verdict("approximate")

    def sensitivity(self, model: ir.Model) -> float:
        """How far the results move when every float tensor is off by a few units of its last place."""
        expected, worst = self._run(model), 0.0
        for seed in range(3):
            try:
                worst = max(worst, compare(expected, self._run(with_noise(model, seed)))[0])
            except lathe.LatheError:
                continue
        return worst


def with_noise(model: ir.Model, seed: int) -> ir.Model:
    """A copy of ``model`` in which each float value, weights included, is multiplied by random numbers close to 1."""
    noisy = model.clone()
    names = Names(noisy)
    for graph in list(noisy.graphs()):
        values = [value for node in graph for value in node.outputs]
        values += [*graph.inputs, *graph.initializers.values()] if graph is noisy.graph else []
        for value in values:
            level = _NOISE.get(value.dtype) if value.dtype is not None else None
            if level is None or not value.name:
                continue
            _disturb(graph, names, value, level, seed := seed + 3)
    return noisy


def _disturb(graph: ir.Graph, names: Names, value: ir.Value, level: float, seed: int) -> None:
    """Lets the readers of ``value`` read ``value * (1 + level * sin(1234.5 value + seed))``."""
    users = [(use.node, use.idx) for use in value.uses()]
    base = names.fresh(f"{value.name}/noise")
    new: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value], dtype: ir.DataType = ir.DataType.FLOAT, **attributes: object) -> ir.Value:
        name = f"{base}_{len(new)}"
        new.append(make_node(op, inputs, name=name, output=name, like=value, dtype=dtype, attributes=attributes))
        return new[-1].outputs[0]

    def number(what: float) -> ir.Value:
        return add("Constant", [], value=ir.tensor(np.float32(what)))

    x = add("Clip", [add("Cast", [value], to=1), number(-1e6), number(1e6)])
    wave = add("Sin", [add("Add", [add("Mul", [x, number(1234.5)]), number(seed)])])
    factor = add("Add", [add("Mul", [wave, number(level)]), number(1.0)])
    dtype = value.dtype or ir.DataType.FLOAT
    times = add("Mul", [value, add("Cast", [factor], dtype, to=int(dtype))], dtype)
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, new)
    elif len(graph):
        graph.insert_before(graph[0], new)
    else:
        graph.extend(new)
    for user, index in users:
        user.replace_input_with(index, times)
    if value.is_graph_output() and producer is not None:
        old = value.name
        for index, output in enumerate(list(graph.outputs)):
            if output is value:
                graph.outputs[index] = times
        value.name, times.name = names.fresh(f"{old}_exact"), old
