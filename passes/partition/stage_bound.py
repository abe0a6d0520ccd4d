"""How fast the slowest of k stages can be at best, proven.

Bounds leave out transfers, memory caps and the cheapest nodes, which can only make them smaller.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from .stage_costs import StageProblem

_LEFT_OUT = 0.003  # of a stage's fair share: the cheapest nodes, all together


@dataclasses.dataclass(frozen=True)
class HeavyNodes:
    """The nodes that matter.

    Attributes:
        nodes: their numbers in the problem, ascending.
        seconds: of each.
        before: for each the set (bits, by position in ``nodes``) of those that must run before it.
        behind: for each node of the problem, heavy or not, the set of heavy ones before it.
    """

    nodes: Sequence[int]
    seconds: Sequence[float]
    before: Sequence[int]
    behind: Sequence[int]


def stage_bound(problem: StageProblem, count: int) -> float:
    """A lower bound of the bottleneck of ``count`` stages, in what ``problem.balance`` counts."""
    if problem.balance == "memory":
        unique = {name: size for weights in problem.weights for name, size in weights.items()}
        return max([sum(unique.values()) / count, *(float(sum(weights.values())) for weights in problem.weights)])
    heavy = heavy_nodes(problem, count)
    return _chain_bound(heavy.seconds, heavy.before, count)


def heavy_nodes(problem: StageProblem, count: int) -> HeavyNodes:
    """Leaves out the cheapest nodes of ``problem``; what runs before what stays as it is."""
    budget = sum(problem.seconds) / count * _LEFT_OUT
    kept = set(range(len(problem.seconds)))
    for node in sorted(kept, key=lambda node: problem.seconds[node]):
        budget -= problem.seconds[node]
        if budget < 0 or len(kept) <= count:
            break
        kept.remove(node)
    number = {node: index for index, node in enumerate(sorted(kept))}
    ancestors: list[int] = []
    for before in problem.before:
        bits = 0
        for other in before:
            bits |= ancestors[other] | (1 << number[other] if other in number else 0)
        ancestors.append(bits)
    nodes = sorted(kept)
    return HeavyNodes(nodes, [problem.seconds[n] for n in nodes], [ancestors[n] for n in nodes], ancestors)


def _chain_bound(seconds: Sequence[float], before: Sequence[int], count: int) -> float:
    """Nodes that are ordered with all others form a chain; what lies between two of them is taken as a liquid.

    Stages are differences of growing sets that contain all ancestors of their nodes, so each ends at a point of the
    chain, within a liquid or between two of its nodes. The least bottleneck of that relaxed chain is found by bisection
    over a greedy filling.
    """
    total = len(seconds)
    behind = Counter(member for bits in before for member in members_of(bits))
    solid = [node for node in range(total) if before[node].bit_count() + behind[node] + 1 == total]
    solid.sort(key=lambda node: before[node].bit_count())
    liquid = [0.0] * (len(solid) + 1)
    among = sum(1 << node for node in solid)
    for node in set(range(total)) - set(solid):
        liquid[(before[node] & among).bit_count()] += seconds[node]
    pieces: list[tuple[float, bool]] = [(liquid[0], False)]
    for index, node in enumerate(solid):
        pieces += [(seconds[node], True), (liquid[index + 1], False)]
    low, high = max(max(seconds), sum(seconds) / count), sum(seconds)
    if _fits(pieces, low, count):
        return low
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if _fits(pieces, middle, count) else (middle, high)
    return low


def members_of(bits: int) -> list[int]:
    """The positions of the ones in ``bits``, ascending."""
    members: list[int] = []
    while bits:
        low = bits & -bits
        members.append(low.bit_length() - 1)
        bits ^= low
    return members


def _fits(pieces: Sequence[tuple[float, bool]], most: float, count: int) -> bool:
    room = most = most * (1 + 1e-12)
    stages = 1
    for size, solid in pieces:
        if solid and size > room:
            stages, room = stages + 1, most
        while size > room:
            if solid or stages > count:
                return False
            size, stages, room = size - room, stages + 1, most
        room -= size
    return stages <= count
