"""Exact search for offsets by deciding which of two buffers lies below the other: what scheduling calls a job shop.

At every moment the buffers alive are jobs of one machine, and their offsets are the times at which they start. The
search decides who lies lowest (or highest) at one moment, and everything that follows from it: precedences that are
the only way, and edge finding (Carlier & Pinson, "An algorithm for solving the job-shop problem", 1989). Moments where
the search failed weigh more when the next one is chosen (Boussemart et al., "Boosting systematic search by weighting
constraints", 2004), and it starts again, slightly shuffled, when it has failed often. Strong where moments are full.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_LARGEST = 4_000_000  # pairs of buffers, counted once for each moment; more are left to other searches
_FIRST_LIMIT, _GROWTH = 200, 1.1  # nodes until the search starts again
_FORGET = 0.8  # of the weights, at every start
_SHUFFLE = 0.1  # how often two neighbours in the order of candidates change places
_SLACK = 0.01  # of the capacity; added to what is free at a moment when moments are compared


class _Fails(Exception):
    """A moment (its number) at which the buffers do not fit."""

    def __init__(self, moment: int) -> None:
        self.moment = moment


@dataclasses.dataclass
class _State:
    """What is decided.

    Attributes:
        low: int64 [n + 1], the lowest offset each buffer can have; the last is nobody.
        high: int64 [n + 1], bytes that must stay free above each.
        below: bool [n + 1, n + 1], whether the first lies below the second.
    """

    low: Array
    high: Array
    below: Array

    def copy(self) -> _State:
        return _State(self.low.copy(), self.high.copy(), self.below.copy())


@dataclasses.dataclass
class _Choice:
    """A moment, the state before it is decided, and who of ``candidates`` (the next one last) may be lowest there."""

    state: _State
    moment: int
    from_above: bool
    candidates: list[int]


class PrecedenceSearch:
    """The search for one set of buffers.

    Args:
        inside: bool [n, moments], which buffers are alive when.
        size: int64 [n], positive.
        capacity: bytes there are.
        rank: int64 [n], which buffer goes first where nothing else decides.
        seed: of the shuffling.

    Attributes:
        too_large: whether one step would take so long that it is not worth a try.
    """

    def __init__(self, inside: Array, size: Array, capacity: int, rank: Array, seed: int = 0) -> None:
        self._inside = inside[:, _largest_moments(inside)]
        self._size = np.append(size, 0)
        self._rank = np.append(rank, 0)
        self._capacity = capacity
        self._random = np.random.default_rng(seed)
        count, moments = self._inside.shape
        self._alive = self._inside.sum(axis=0)
        most = int(self._alive.max())
        self.too_large = moments * most * most > _LARGEST
        self._members = np.full((moments, most), count)
        for moment in range(moments):
            members = np.flatnonzero(self._inside[:, moment])
            self._members[moment, : len(members)] = members
        self._sizes = self._size[self._members]
        self._real = self._members < count
        self._different = ~np.eye(most, dtype=bool)
        self._weight = np.ones(moments)

    def runs(self, deadline: float) -> Iterator[Array | None]:
        """Searches again and again; yields after every start: offsets int64 [n] at last, None before.

        Ends without offsets where there are none.
        """
        count = len(self._size) - 1
        start = _State(np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64), np.zeros((count + 1,) * 2, bool))
        try:
            self._propagate(start, np.ones(len(self._alive), bool))
        except _Fails:
            return
        limit, large_first = float(_FIRST_LIMIT), False
        while True:
            found, complete = self._run(start, int(limit), large_first, deadline)
            if found is not None or not complete:
                yield found
            if found is not None or complete:
                return
            limit *= _GROWTH
            large_first = not large_first
            self._weight = 1 + (self._weight - 1) * _FORGET

    def _run(self, start: _State, limit: int, large_first: bool, deadline: float) -> tuple[Array | None, bool]:
        """Depth first until there are offsets, everything is tried (then the second is True), or ``limit`` nodes."""
        stack: list[_Choice] = []
        nodes, state = 0, start
        while True:
            nodes += 1
            if nodes > limit or time.monotonic() > deadline:
                return None, False
            try:
                choice = self._choose(state, large_first)
                if choice is None:
                    return state.low[:-1], True
                stack.append(choice)
            except _Fails as failure:
                self._weight[failure.moment] += 1
            while True:
                while stack and not stack[-1].candidates:
                    stack.pop()
                if not stack:
                    return None, True
                try:
                    state = self._decide(stack[-1])
                    break
                except _Fails as failure:
                    nodes += 1
                    self._weight[failure.moment] += 1

    def _choose(self, state: _State, large_first: bool) -> _Choice | None:
        """The moment with the fewest ways to go on and the least room; None where everything is decided."""
        below = state.below[self._members[:, :, None], self._members[:, None, :]]
        under = np.add.reduce(below, axis=1, dtype=np.int16)
        over = np.add.reduce(below, axis=2, dtype=np.int16)
        low, high = state.low[self._members], state.high[self._members]
        sides = [self._open(under, over, low, high), self._open(over, under, high, low)]
        scores = np.stack([score for score, _ in sides])
        best = int(scores.argmin())
        if scores.flat[best] == np.inf:
            return None
        side, moment = divmod(best, len(self._alive))
        candidates = self._members[moment][sides[side][1][moment]]
        if not len(candidates):
            raise _Fails(moment)
        at = (state.high if side else state.low)[candidates]
        key = at - self._size[candidates] if large_first else at
        order = candidates[np.lexsort([self._rank[candidates], key])].tolist()
        for index in np.flatnonzero(self._random.random(len(order) - 1) < _SHUFFLE).tolist():
            order[index], order[index + 1] = order[index + 1], order[index]
        return _Choice(state, moment, bool(side), order[::-1])

    def _open(self, under: Array, over: Array, low: Array, high: Array) -> tuple[Array, Array]:
        """For each moment how hard it is to decide who comes next, and who may; seen from below."""
        moments, most = low.shape
        fixed = self._real & (under + over == self._alive[:, None] - 1)
        taken = np.zeros((moments, most + 1), bool)
        where, which = np.nonzero(fixed)
        taken[where, under[where, which]] = True
        placed = taken.argmin(axis=1)[:, None]  # so many lie lowest in an order that is decided
        left = self._real & ~(fixed & (under < placed))
        far = 2 * self._capacity
        total = np.where(left, self._sizes, 0).sum(axis=1)
        least_low = np.where(left, low, far).min(axis=1)
        least_high = np.where(left, high, far).min(axis=1)
        fits = low + (total + least_high)[:, None] <= self._capacity
        may = left & (under == placed) & fits
        free = self._capacity - least_low - least_high - total
        score = may.sum(axis=1) * (free + _SLACK * self._capacity) / self._weight
        return np.where(left.sum(axis=1) > 1, score, np.inf), may

    def _decide(self, choice: _Choice) -> _State:
        """The state in which the next candidate lies lowest (or highest) of all that are open at the moment.

        Raises:
            _Fails: it does not fit.
        """
        first = choice.candidates.pop()
        state = choice.state.copy()
        members = np.flatnonzero(self._inside[:, choice.moment])
        below = state.below.T if choice.from_above else state.below
        others = members[~below[members, first] & ~below[first, members] & (members != first)]
        below[first, others] = True
        dirty = (self._inside[first] & self._inside[others]).any(axis=0)
        dirty[choice.moment] = True
        self._propagate(state, dirty)
        return state

    def _propagate(self, state: _State, dirty: Array) -> None:
        """Draws the conclusions at the ``dirty`` moments, and at those that they change.

        Raises:
            _Fails: there are no offsets.
        """
        while dirty.any():
            moments = np.flatnonzero(dirty)
            low, high = state.low.copy(), state.high.copy()
            pairs = [self._order_pairs(state, moments)]
            pairs.append(self._raise(state.low, state.high, state.below, moments))
            pairs.append(self._raise(state.high, state.low, state.below.T, moments))
            members = self._members[moments]
            _fail_where((state.low + state.high + self._size)[members] > self._capacity, moments)
            changed = np.flatnonzero((state.low > low) | (state.high > high))
            dirty = np.asarray(self._inside[changed].any(axis=0))
            one, other = np.concatenate(pairs, axis=1)
            if len(one):
                dirty |= (self._inside[one] & self._inside[other]).any(axis=0)

    def _order_pairs(self, state: _State, moments: Array) -> Array:
        """Writes into ``below`` who must lie below whom because the other way is too high; int64 [2, pairs]."""
        members, size = self._members[moments], self._sizes[moments]
        low, high = state.low[members] + size, state.high[members] + size
        first, second = members[:, :, None], members[:, None, :]
        below = state.below[first, second]
        must = (high[:, :, None] + low[:, None, :] > self._capacity) & self._different
        _fail_where(must & state.below[second, first], moments)
        moment, one, other = np.nonzero(must & ~below)
        pairs = np.stack([members[moment, one], members[moment, other]])
        state.below[pairs[0], pairs[1]] = True
        return pairs

    def _raise(self, low: Array, high: Array, below: Array, moments: Array) -> Array:
        """Raises the lowest offsets as far as some moments demand, seen from below.

        Args:
            low, high: int64 [n + 1]; ``low`` is written.
            below: bool [n + 1, n + 1]; what edge finding says is written into it.
            moments: their numbers.

        Returns:
            The pairs added to ``below``, int64 [2, pairs].
        """
        members = self._members[moments]
        members = np.take_along_axis(members, np.argsort(low[members], axis=1, kind="stable"), 1)
        own_low, own_high, size = low[members], high[members], self._size[members]
        # What lies below a buffer fills the room from the lowest of it upwards. Axes: moment, buffer, below.
        under = below[members[:, None, :], members[:, :, None]]
        np.maximum.at(low, members, _stacked(under, own_low, size).max(axis=2))
        # Edge finding. Axes: moment, threshold, buffer: all with at least so much above them as the threshold.
        above = own_high[:, :, None]
        among = own_high[:, None, :] >= above
        height = _stacked(among, own_low, size)
        _fail_where(height + above > self._capacity, moments)
        late = np.maximum.accumulate(height, axis=2) > self._capacity - above - size[:, None, :]
        late &= ~among  # too late to lie among them: they all lie below
        late &= (among.astype(np.float32) @ (~under).astype(np.float32).transpose(0, 2, 1)) > 0  # else it is known
        at, threshold, buffer = np.nonzero(late)
        if not len(at):
            return np.zeros((2, 0), np.int64)
        heights = height[at, threshold]
        room = self._capacity - own_high[at, threshold] - size[at, buffer]
        first = (heights > room[:, None]).argmax(axis=1)
        from_first = np.arange(members.shape[1]) >= first[:, None]
        lifted = members[at, buffer]
        np.maximum.at(low, lifted, np.where(from_first, heights, 0).max(axis=1))
        hit, who = np.nonzero(from_first & among[at, threshold] & ~under[at, buffer])
        pairs = np.stack([members[at[hit], who], lifted[hit]])
        below[pairs[0], pairs[1]] = True
        return pairs


def _stacked(chosen: Array, low: Array, size: Array) -> Array:
    """[..., i]: how high those of ``chosen`` reach that come at or after i, if they lie on the lowest of them; else 0.

    Args:
        chosen: bool [moments, ..., k].
        low, size: int64 [moments, k], ascending by ``low``.
    """
    total = np.cumsum((chosen * size[:, None, :])[..., ::-1], axis=-1)[..., ::-1]
    return np.where(total > 0, total + low[:, None, :], 0)


def _fail_where(wrong: Array, moments: Array) -> None:
    if wrong.any():
        raise _Fails(int(moments[wrong.reshape(len(moments), -1).any(axis=1).argmax()]))


def _largest_moments(inside: Array) -> Array:
    """Moments at which someone is alive and whose buffers are not all alive at a neighbouring one, too."""
    kept: list[int] = []
    for moment in np.flatnonzero(inside.any(axis=0)).tolist():
        while kept and not (inside[:, kept[-1]] & ~inside[:, moment]).any():
            kept.pop()
        if not kept or (inside[:, moment] & ~inside[:, kept[-1]]).any():
            kept.append(moment)
    return np.array(kept, np.int64)
