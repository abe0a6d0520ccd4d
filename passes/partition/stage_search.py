"""Which order of the nodes to cut into stages: a few known orders, then moves of single nodes between stages."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence

from ...compiler.base import no_progress
from .stage_bound import stage_bound
from .stage_costs import OrderCosts, StageProblem, Stages, cut_order
from .stage_program import solve_program

_EFFORT = 1_000_000  # nodes looked at by all moves tried
_GAIN = 1 - 1e-9
_NEAR = 1.02


def find_stages(
    problem: StageProblem, count: int, progress: Callable[[str], None] = no_progress
) -> tuple[Stages, float]:
    """The best stages found, and a proven bound of the bottleneck.

    Several orders are cut exactly and improved by local search. Where that leaves more than 2 % to the bound and the
    graph is small, an integer program raises the bound or finds better stages.

    Args:
        problem: nodes in a valid order.
        count: number of stages.
        progress: told how far the search is.
    """
    after = successors(problem)
    bound = stage_bound(problem, count)
    orders = [list(range(len(problem.seconds)))]
    orders += [_by_priority(problem, after, key) for key in _priorities(problem, after)]
    best: Stages | None = None
    for number, order in enumerate(orders):
        progress(f"stages: order {number + 1} of {len(orders)}")
        found = improve(problem, cut_order(problem, order, count), after)
        best = found if best is None or found.bottleneck < best.bottleneck * _GAIN else best
        if best.bottleneck <= bound * 1.0001:
            break
    assert best is not None
    if best.bottleneck <= bound * _NEAR or problem.balance == "memory":
        return best, bound
    progress("stages: integer program")
    proven, labels = solve_program(problem, count)
    if labels is not None and len(set(labels)) == count:
        found = improve(problem, _stages_of(problem, best.order, labels, count), after)
        best = min(best, found, key=lambda stages: stages.bottleneck)
    return best, max(bound, proven)


def successors(problem: StageProblem) -> list[set[int]]:
    """For each node those that need its result."""
    after: list[set[int]] = [set() for _ in problem.before]
    for node, before in enumerate(problem.before):
        for other in before:
            after[other].add(node)
    return after


def improve(problem: StageProblem, start: Stages, after: Sequence[set[int]]) -> Stages:
    """Moves nodes out of the costliest stage into a neighbour while that helps; cuts each new order exactly."""
    best = start
    tries = max(20, _EFFORT // max(1, len(start.order)))
    while tries > 0 and best.bottleneck < float("inf"):
        labels, costs = best.labels, _costs(problem, best)
        moved: Stages | None = None
        for node, target in _moves(problem, labels, costs.index(max(costs)), after, len(costs)):
            tries -= 1
            trial = list(labels)
            trial[node] = target
            candidate = _stages_of(problem, best.order, trial, len(costs))
            if candidate.bottleneck < best.bottleneck * _GAIN:
                moved = candidate
                break
            if tries <= 0:
                break
        if moved is None:
            return best
        again = cut_order(problem, moved.order, len(costs))
        best = again if again.bottleneck < moved.bottleneck else moved
    return best


def _moves(
    problem: StageProblem, labels: Sequence[int], stage: int, after: Sequence[set[int]], count: int
) -> list[tuple[int, int]]:
    """Nodes of ``stage`` that may go to the stage before or after it, and where to."""
    moves: list[tuple[int, int]] = []
    for node, label in enumerate(labels):
        if label != stage or labels.count(stage) == 1:
            continue
        if stage > 0 and all(labels[other] < stage for other in problem.before[node]):
            moves.append((node, stage - 1))
        if stage < count - 1 and all(labels[other] > stage for other in after[node]):
            moves.append((node, stage + 1))
    return sorted(moves, key=lambda move: problem.seconds[move[0]])


def _costs(problem: StageProblem, stages: Stages) -> list[float]:
    costs = OrderCosts(problem, stages.order)
    return [costs.cost(start, end) for start, end in itertools.pairwise(stages.cuts)]


def _stages_of(problem: StageProblem, order: Sequence[int], labels: Sequence[int], count: int) -> Stages:
    """Stages with those labels, nodes of a stage in the order they had."""
    new = tuple(sorted(order, key=lambda node: labels[node]))
    sizes = [labels.count(stage) for stage in range(count)]
    draft = Stages(new, tuple(itertools.accumulate(sizes, initial=0)), 0.0)
    return Stages(draft.order, draft.cuts, max(_costs(problem, draft)))


def _priorities(problem: StageProblem, after: Sequence[set[int]]) -> list[list[float]]:
    """Keys of other orders: as soon as possible, as late as possible, by the work that is behind."""
    count = len(problem.seconds)
    early, late, behind = [0.0] * count, [0.0] * count, [0.0] * count
    for node in range(count):
        early[node] = max((early[other] + 1 for other in problem.before[node]), default=0.0)
        behind[node] = problem.seconds[node] + max((behind[other] for other in problem.before[node]), default=0.0)
    for node in reversed(range(count)):
        late[node] = min((late[other] - 1 for other in after[node]), default=float(count))
    return [early, late, behind]


def _by_priority(problem: StageProblem, after: Sequence[set[int]], key: Sequence[float]) -> list[int]:
    """The topological order that always takes the ready node with the smallest key."""
    missing = [len(before) for before in problem.before]
    ready = [(key[node], node) for node, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        _, node = heapq.heappop(ready)
        order.append(node)
        for other in after[node]:
            missing[other] -= 1
            if not missing[other]:
                heapq.heappush(ready, (key[other], other))
    return order
