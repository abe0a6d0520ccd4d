"""The stage problem: contiguous stages of an order of nodes, and what each of them costs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ..memory.lifetimes import Tensor
from .costs import GraphCosts

Balance = Literal["time", "memory"]
Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class StageProblem:
    """What stages are made of; nodes by number.

    Attributes:
        seconds: of each node.
        before: for each node those whose results it needs.
        tensors: what nodes make for others, with its bytes.
        weights: for each node the initializers it reads: {name: bytes}; shared ones are in every stage that reads them.
        transfer: seconds a byte takes from a stage to the next. A tensor that passes several cuts pays at each.
        cap: bytes a stage may have; infinite for no limit.
        balance: whether the slowest stage is to be as fast, or the largest as small, as possible.
    """

    seconds: Sequence[float]
    before: Sequence[set[int]]
    tensors: Sequence[Tensor]
    weights: Sequence[Mapping[str, int]]
    transfer: float = 0.0
    cap: float = np.inf
    balance: Balance = "time"

    @staticmethod
    def of(costs: GraphCosts, transfer: float, cap: float, balance: Balance) -> StageProblem:
        """The problem of a graph with known costs."""
        return StageProblem(costs.seconds, costs.flow.before, costs.flow.tensors, costs.weights, transfer, cap, balance)


class OrderCosts:
    """The costs of all stages of one order of the nodes.

    A stage takes its nodes' seconds and those of what enters and leaves it. It holds its weights and, at its fullest
    step, the activations alive there; those that only pass through are held too.

    Attributes:
        compute: [n + 1] seconds of the first i nodes.
        transfer: [n + 1] seconds of what crosses the cut in front of node i.
        live: [n] bytes alive at each step.
    """

    def __init__(self, problem: StageProblem, order: Sequence[int]) -> None:
        count = len(order)
        step = {node: index for index, node in enumerate(order)}
        self._problem = problem
        self.compute = np.concatenate([[0.0], np.cumsum([problem.seconds[node] for node in order])])
        crossing, live = np.zeros(count + 2), np.zeros(count + 1)
        for tensor in problem.tensors:
            first = step[tensor.producer]
            last = max((step[node] for node in tensor.consumers), default=first)
            crossing[first + 1] += tensor.size
            crossing[last + 1] -= tensor.size
            live[first] += tensor.size
            live[last + 1] -= tensor.size
        self.transfer = np.cumsum(crossing)[: count + 1] * problem.transfer
        self.live = np.cumsum(live)[:count]
        self._uses: list[list[tuple[int, int]]] = []  # for each step: where the weight was used before, its bytes
        last_use: dict[str, int] = {}
        for index, node in enumerate(order):
            self._uses.append([(last_use.get(name, -1), size) for name, size in problem.weights[node].items()])
            last_use.update(dict.fromkeys(problem.weights[node], index))

    def columns(self) -> Any:
        """For each end j = 1..n the costs of the stages [i, j), i = 0..j-1; infinite where one is over the cap."""
        count = len(self.live)
        weights, peak = np.zeros(count), np.zeros(count)
        for end in range(1, count + 1):
            last = end - 1
            for before, size in self._uses[last]:
                weights[before + 1 : end] += size
            np.maximum(peak[:end], self.live[last], out=peak[:end])
            memory = weights[:end] + peak[:end]
            if self._problem.balance == "memory":
                cost = memory.copy()
            else:
                cost = self.compute[end] - self.compute[:end] + self.transfer[:end] + self.transfer[end]
            cost[memory > self._problem.cap] = np.inf
            yield cost

    def seconds(self, start: int, end: int) -> float:
        """Seconds of the stage [start, end)."""
        return float(self.compute[end] - self.compute[start] + self.transfer[start] + self.transfer[end])

    def memory(self, start: int, end: int) -> int:
        """Bytes of the stage [start, end)."""
        weights = sum(size for uses in self._uses[start:end] for before, size in uses if before < start)
        return weights + int(self.live[start:end].max())

    def cost(self, start: int, end: int) -> float:
        """What the balance looks at, infinite over the cap."""
        memory = self.memory(start, end)
        if memory > self._problem.cap:
            return float("inf")
        return memory if self._problem.balance == "memory" else self.seconds(start, end)


@dataclasses.dataclass(frozen=True)
class Stages:
    """Stages of an order.

    Attributes:
        order: the nodes.
        cuts: where stages begin and the last ends: 0, ..., n.
        bottleneck: the largest cost of a stage; infinite where none fits the cap.
    """

    order: tuple[int, ...]
    cuts: tuple[int, ...]
    bottleneck: float

    @property
    def labels(self) -> list[int]:
        """The stage of each node, by node number."""
        labels = [0] * len(self.order)
        for stage, (start, end) in enumerate(itertools.pairwise(self.cuts)):
            for node in self.order[start:end]:
                labels[node] = stage
        return labels


def cut_order(problem: StageProblem, order: Sequence[int], count: int) -> Stages:
    """The best stages of ``order``, exactly: F[j][s] = min over i of max(F[i][s - 1], cost of [i, j)).

    O(n^2 k) time in NumPy, O(n k) memory.
    """
    size = len(order)
    costs = OrderCosts(problem, order)
    best = np.full((size + 1, count + 1), np.inf)
    best[0, 0] = 0.0
    choice = np.zeros((size + 1, count + 1), np.int64)
    for end, column in enumerate(costs.columns(), start=1):
        candidates = np.maximum(best[:end, :-1], column[:, None])
        choice[end, 1:] = candidates.argmin(axis=0)
        best[end, 1:] = candidates.min(axis=0)
    cuts = [size]
    for stage in range(count, 0, -1):
        cuts.append(int(choice[cuts[-1], stage]))
    return Stages(tuple(order), tuple(reversed(cuts)), float(best[size, count]))
