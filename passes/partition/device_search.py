"""Which device each group of nodes runs on, so that compute and transfers take the least time.

Two devices without memory caps: exact, as a minimum cut (Stone, "Multiprocessor scheduling with the aid of network flow
algorithms", 1977). Otherwise moves of single groups and of pairs that exchange data, from several starts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

import networkx as nx

_ALL_PAIRS = 40  # groups; of more, only those that exchange data are moved together


@dataclasses.dataclass(frozen=True)
class DeviceProblem:
    """Groups of nodes that stay together, by number.

    Attributes:
        seconds: of each group on each device; infinite where it cannot run.
        weights: initializers that each group reads: {name: bytes}; one that groups on a device share is there once.
        tensors: (producer, consumers, seconds to move it): paid once for each other device that reads it.
        caps: bytes of weights that each device has room for.
    """

    seconds: Sequence[Sequence[float]]
    weights: Sequence[Mapping[str, int]]
    tensors: Sequence[tuple[int, frozenset[int], float]]
    caps: Sequence[float]

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return len(self.caps)

    def cost(self, assigned: Sequence[int]) -> float:
        """``run_seconds``, infinite over a cap."""
        held = self.held(assigned)
        fits = all(size <= cap for size, cap in zip(held, self.caps, strict=True))
        return self.run_seconds(assigned) if fits else float("inf")

    def run_seconds(self, assigned: Sequence[int]) -> float:
        """Seconds of one run, everything after another; infinite where a group cannot run."""
        total = sum(seconds[device] for seconds, device in zip(self.seconds, assigned, strict=True))
        for producer, consumers, move in self.tensors:
            total += move * len({assigned[group] for group in consumers} - {assigned[producer]})
        return total

    def held(self, assigned: Sequence[int]) -> list[int]:
        """Bytes of weights on each device."""
        on: defaultdict[int, dict[str, int]] = defaultdict(dict)
        for weights, device in zip(self.weights, assigned, strict=True):
            on[device].update(weights)
        return [sum(on[device].values()) for device in range(self.devices)]


def find_devices(problem: DeviceProblem) -> list[int] | None:
    """The device of each group; None where no assignment is found that runs and fits."""
    cut = _minimum_cut(problem) if problem.devices == 2 else None
    if cut is not None and problem.cost(cut) < float("inf"):  # the best without caps, and it keeps them
        return cut
    found = [_descend(problem, start) for start in [*_starts(problem), *([] if cut is None else [cut])]]
    best = min(found, key=problem.cost)
    return best if problem.cost(best) < float("inf") else None


def _minimum_cut(problem: DeviceProblem) -> list[int] | None:
    """The exact optimum for two devices without caps; None where a group runs on neither."""
    graph = nx.DiGraph()
    for group, (first, second) in enumerate(problem.seconds):
        if first == second == float("inf"):
            return None
        # A group on the far side of the cut is on device 1 and pays there. No capacity: never cut.
        for edge, cost in ((("first", group), second), ((group, "second"), first)):
            graph.add_edge(*edge, **({"capacity": cost} if cost < float("inf") else {}))
    for number, (producer, consumers, move) in enumerate(problem.tensors):
        # One transfer for any number of readers on the other device, in either direction: a node of its own for each.
        for direction in ("there", "back"):
            wire = (direction, number)
            ends = [(wire, reader) for reader in consumers]
            edges = (
                [(producer, wire), *ends] if direction == "there" else [(wire, producer), *((r, w) for w, r in ends)]
            )
            for index, edge in enumerate(edges):
                graph.add_edge(*edge, **({"capacity": move} if index == 0 else {}))
    _, (near, _) = nx.minimum_cut(graph, "first", "second")
    return [0 if group in near else 1 for group in range(len(problem.seconds))]


def _starts(problem: DeviceProblem) -> list[list[int]]:
    """Everything on one device, as far as it runs there; each group where it is fastest."""
    groups = range(len(problem.seconds))
    fastest = [min(range(problem.devices), key=lambda d: problem.seconds[group][d]) for group in groups]
    starts = [
        [device if problem.seconds[group][device] < float("inf") else fastest[group] for group in groups]
        for device in range(problem.devices)
    ]
    return [*starts, fastest]


def _descend(problem: DeviceProblem, assigned: list[int]) -> list[int]:
    """Moves groups, alone or two at once, and exchanges them, as long as that helps: first to fit, then to be fast."""
    best = _rank(problem, assigned)
    improved = True
    while improved:
        improved = False
        for change in _changes(problem, assigned):
            trial = list(assigned)
            for group, device in change:
                trial[group] = device
            if (rank := _rank(problem, trial)) < best:
                assigned, best, improved = trial, rank, True
    return assigned


def _rank(problem: DeviceProblem, assigned: Sequence[int]) -> tuple[bool, float, float]:
    """What is compared: whether everything runs, bytes over the caps, seconds."""
    seconds = problem.run_seconds(assigned)
    over = sum(max(0.0, held - cap) for held, cap in zip(problem.held(assigned), problem.caps, strict=True))
    return seconds == float("inf"), over, seconds


def _changes(problem: DeviceProblem, assigned: Sequence[int]) -> list[list[tuple[int, int]]]:
    groups, devices = range(len(assigned)), range(problem.devices)
    changes = [[(group, device)] for group in groups for device in devices if assigned[group] != device]
    pairs = {(producer, reader) for producer, readers, _ in problem.tensors for reader in readers if reader != producer}
    if len(assigned) <= _ALL_PAIRS:
        pairs = set(itertools.combinations(groups, 2))
    for a, b in sorted(pairs):
        changes += [[(a, device), (b, device)] for device in devices]
        changes.append([(a, assigned[b]), (b, assigned[a])])
    return changes
