"""The loop of a search: compile, judge, time; the best so far is always known."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from onnxlathe.compiler.graph import weight_bytes
from onnxlathe.compiler.report import Report
from onnxlathe.runtime.artifact import load
from onnxlathe.runtime.errors import LatheError

from .candidates import Candidate, Progress, first_candidates, without
from .data import SearchData
from .judge import Judge
from .kept import Kept
from .optimized import read_report
from .processes import OutOfTime, Race, compile_apart
from .trials import Trial
from .worker import Request

_ROUNDS, _TURN = 5, 0.3  # of a trial
_SURE_ROUNDS, _SURE_TURN = 9, 0.5  # of what is to be the answer
_CONFIRMED = 3  # trials measured again at most
_RESERVE = 0.3  # of the time at most, for measuring the answer again
_START = 10.0  # seconds that starting two processes and warming up takes at most


@dataclasses.dataclass
class Searcher:
    """What a search works with.

    Attributes:
        original: the model as it was.
        data: the samples.
        progress: how far it has come.
        judge: what is lost.
        race: how fast it is.
        kept: what an earlier search left, and what this one leaves.
        target, threads, seed: as of ``compile``.
        deadline: when it ends (``time.monotonic``).
        tell: shown while it goes on.
    """

    original: Path
    data: SearchData
    progress: Progress
    judge: Judge
    race: Race
    kept: Kept
    target: str
    threads: int
    seed: int
    deadline: float
    tell: Callable[[str], None]
    trials: list[Trial] = dataclasses.field(default_factory=lambda: list[Trial]())
    notes: list[str] = dataclasses.field(default_factory=lambda: list[str]())
    _dropped: list[str] = dataclasses.field(default_factory=lambda: list[str]())

    def run(self) -> Trial | None:
        """Tries what there is to try and returns the best, measured again; None where the original is the best.

        Ctrl-C and the end of the time stop the trying; what was found so far counts.
        """
        again = _START + 1.5 * 2 * _SURE_ROUNDS * _SURE_TURN * len(self.data.timed)
        reserve = min(again, _RESERVE * self.left)
        try:
            for candidate in self._candidates():
                if self.left <= reserve:
                    self.notes.append(f"Out of time before {candidate.name}; the search goes on when asked again.")
                    break
                self._try(candidate, self.left - reserve)
            return self._confirmed()
        except KeyboardInterrupt:
            self.notes.append("Stopped by Ctrl-C: the best so far, measured once; the search goes on when asked again.")
            for trial in self.trials:
                if trial.name not in self.progress.done and not trial.status:
                    trial.status = "stopped"
            return next(iter(self.progress.ranked()), None)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def _candidates(self) -> Iterator[Candidate]:
        progress = self.progress
        for candidate in first_candidates(progress.subject, progress.goal, progress.budget):
            yield without(candidate, self._dropped)
        while (suggested := progress.next()) is not None:
            yield suggested

    def _try(self, candidate: Candidate, seconds: float) -> None:
        """One candidate, from passes to figures."""
        self.progress.tried[candidate.name] = candidate
        trial = Trial(candidate.name, candidate.text, candidate.exact)
        self.trials.append(trial)
        best = next(iter(self.progress.ranked()), None)
        so_far = f"; best so far: {best.name}, {best.speed:.2f} x" if best else ""
        number = f"{candidate.name} ({len(self.trials)}. try, {self.left:.0f} s left{so_far})"
        start = time.monotonic()
        try:
            known = self.kept.figures(candidate.text)
            if known is None:
                self._compile(candidate, seconds, lambda text: self.tell(f"{number}: {text}"))
            elif known.get("failure"):
                raise LatheError(known["failure"])
            self.tell(f"{number}: judging")
            self._measure(trial, candidate, start + seconds)
        except OutOfTime:
            trial.status = "out of time"
            self.notes.append(f"{candidate.name} was not done in the time left.")
        except LatheError as error:
            trial.status = "failed"
            self.notes.append(f"{candidate.name} failed: {error.what}")
            self.kept.keep(candidate.text, {"failure": error.what})
        else:
            self.progress.done[trial.name] = trial
            trial.status = self._why_not(trial)
        trial.seconds = time.monotonic() - start

    def _compile(self, candidate: Candidate, seconds: float, tell: Callable[[str], None]) -> None:
        folder = self.kept.folder / "samples" / "calibration"
        request = Request(
            source=str(self.original),
            target=str(self.kept.model(candidate.text)),
            passes=candidate.passes,
            gate=candidate.gate,
            calibration=str(folder) if self.data.calibration else None,
            device=self.target,
            threads=self.threads,
            seed=self.seed,
        )
        compile_apart(request, seconds, tell)
        self.kept.keep(candidate.text, {"compiled": True})

    def _measure(self, trial: Trial, candidate: Candidate, deadline: float) -> None:
        """Fills ``trial`` from what is kept, or measures it."""
        path = self.kept.model(candidate.text)
        known = self.kept.figures(candidate.text) or {}
        model = load(path)
        report = read_report(model)
        if candidate.gate:
            self._dropped = [record.name for record in report.passes if record.status == "dropped"]
        self._left_out(trial, report)
        trial.bytes = weight_bytes(model)
        del model
        again = callable(self.progress.budget.metric)  # its code is in no key
        trial.drop = known.get("drop") if not again else None
        trial.drop = self.judge.drop(path) if trial.drop is None else trial.drop
        if "speeds" in known:
            trial.speeds, trial.noise, trial.kept = known["speeds"], known["noise"], True
            trial.weights = known["weights"]
        else:
            self.tell(f"{trial.name}: timing")
            self._time(trial, _ROUNDS, _TURN, deadline)
        self._keep(trial)

    def _time(self, trial: Trial, rounds: int, turn: float, deadline: float) -> None:
        folder = self.kept.folder / "samples"
        samples = [folder / f"timed-{number}.npz" for number in range(len(self.data.timed))]
        seconds = max(deadline - time.monotonic(), 1.0)
        path = self.kept.model(trial.passes)
        found = self.race.run(path, samples, rounds=rounds, turn=turn, seconds=seconds)
        trial.speeds, trial.weights, trial.noise = {}, {}, 0.0
        for timed, ratios in zip(self.data.timed, found, strict=True):
            for part, (ratio, noise) in ratios.items():
                label = f"{part} {timed.label}".strip()
                while label in trial.speeds:
                    label += "'"
                trial.speeds[label], trial.weights[label] = ratio, timed.weight
                trial.noise = max(trial.noise, noise)

    def _keep(self, trial: Trial) -> None:
        figures = {"drop": trial.drop, "speeds": trial.speeds, "weights": trial.weights, "noise": trial.noise}
        self.kept.keep(trial.passes, figures)

    def _left_out(self, trial: Trial, report: Report) -> None:
        """Says which passes failed, as the trial is then of the others only."""
        for record in report.passes:
            if record.status == "failed":
                self.notes.append(f"{trial.name}: {record.name} failed and was left out; {'; '.join(record.notes)}")

    def _why_not(self, trial: Trial) -> str:
        if not self.progress.within(trial):
            return "loses too much"
        return "" if self.progress.fits(trial) else "slower than the original"

    def _confirmed(self) -> Trial | None:
        """The best, after it was measured longer and still is; a lucky first measurement does not count."""
        for _ in range(_CONFIRMED + 1):
            ranked = self.progress.ranked()
            if not ranked or ranked[0].confirmed:
                return ranked[0] if ranked else None
            best = ranked[0]
            self.tell(f"measuring {best.name} again")
            try:
                self._time(best, _SURE_ROUNDS, _SURE_TURN, self.deadline)
            except OutOfTime:
                self.notes.append(f"No time was left to measure {best.name} again.")
                return best
            best.confirmed = True
            best.status = self._why_not(best)
            self._keep(best)
        confirmed = [trial for trial in self.progress.ranked() if trial.confirmed]
        return confirmed[0] if confirmed else None
