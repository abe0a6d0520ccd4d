"""Stages as an integer program: exact for small graphs, a bound and a start for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize, sparse

from .stage_bound import HeavyNodes, heavy_nodes, members_of
from .stage_costs import StageProblem

_LARGEST = 3000  # variables
_TOLERANCE = 1e-5  # of the solver, relative to a stage


def solve_program(problem: StageProblem, count: int, time_limit: float = 10.0) -> tuple[float, list[int] | None]:
    """A proven bound of the bottleneck's seconds, and the stage of each node in the best partition met.

    y[v, s] = 1 where node v is in the first s + 1 of the stages. y grows with s and falls along edges; the cost of each
    stage is at most T; T is made small (HiGHS). 0 and None where the program is too large or ends without anything.
    """
    heavy = heavy_nodes(problem, count)
    nodes, cuts = len(heavy.nodes), count - 1
    if cuts == 0 or nodes * count > _LARGEST:
        return 0.0, None
    share = sum(heavy.seconds) / count  # the solver's tolerances are absolute: let a stage cost about 1
    seconds, before = [cost / share for cost in heavy.seconds], heavy.before
    rows: list[list[tuple[int, float]]] = []
    upper: list[float] = []
    last = nodes * cuts  # the variable T
    for node in range(nodes):
        rows += [[(node * cuts + s, 1.0), (node * cuts + s + 1, -1.0)] for s in range(cuts - 1)]
        for other in _direct(before, node):
            rows += [[(node * cuts + s, 1.0), (other * cuts + s, -1.0)] for s in range(cuts)]
    upper += [0.0] * len(rows)
    for stage in range(count):
        row = [(last, -1.0)]
        for node, cost in enumerate(seconds):
            if stage < cuts:
                row.append((node * cuts + stage, cost))
            if stage > 0:
                row.append((node * cuts + stage - 1, -cost))
        rows.append(row)
        upper.append(0.0 if stage < cuts else -sum(seconds))
    entries = [(index, column, value) for index, row in enumerate(rows) for column, value in row]
    r, c, v = (np.array(part) for part in zip(*entries, strict=True))
    matrix = sparse.csr_matrix((v, (r, c)), shape=(len(rows), last + 1))
    most: Any = np.append(np.ones(last), sum(seconds))  # scipy's stubs know numbers only
    limits: Any = np.array(upper)
    result = optimize.milp(
        c=np.eye(1, last + 1, last)[0],
        constraints=optimize.LinearConstraint(matrix, -np.inf, limits),
        integrality=np.append(np.ones(last), 0),
        bounds=optimize.Bounds(0, most),
        options={"time_limit": time_limit},
    )
    bound = getattr(result, "mip_dual_bound", None)
    proven = float(bound) * share * (1 - _TOLERANCE) if bound is not None and np.isfinite(bound) else 0.0
    if result.x is None:
        return proven, None
    inside = result.x[:last].reshape(nodes, cuts) > 0.5
    stages = [cuts - int(row.sum()) for row in inside]
    return proven, [max((stages[member] for member in members_of(bits)), default=0) for bits in _with_itself(heavy)]


def _with_itself(heavy: HeavyNodes) -> list[int]:
    """For each node of the problem the heavy nodes before it, and itself if it is heavy."""
    position = {node: index for index, node in enumerate(heavy.nodes)}
    return [bits | (1 << position[node] if node in position else 0) for node, bits in enumerate(heavy.behind)]


def _direct(before: Sequence[int], node: int) -> list[int]:
    """The ancestors of ``node`` that are no ancestors of another one."""
    far = 0
    members = members_of(before[node])
    for member in members:
        far |= before[member]
    return [member for member in members if not far >> member & 1]
