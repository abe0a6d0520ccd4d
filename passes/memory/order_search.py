"""In which order nodes should run so that the least memory is needed.

Exact dynamic programming over the sets of nodes that may be done (as in Ahn et al., "Serenity", 2020) while they are
few, a beam of the best of them where they are many. The graph is cut where only one tensor is alive, and the pieces are
ordered one by one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from ...compiler.base import no_progress
from .lifetimes import Flow, buffers_in_order
from .offset_search import Progress
from .order_bounds import order_bound

_WIDEST, _NARROWEST = 4096, 16
_EFFORT = 100_000  # states per piece, about; few seconds
_LONGEST = 400  # nodes of a piece
_TRIES = 6  # beams of a piece


def best_order(flow: Flow, progress: Progress = no_progress) -> list[int]:
    """An order of the nodes that needs the least memory that was found, never more than the given one.

    Args:
        flow: the graph; its nodes are in a valid order.
        progress: told how far the search is.
    """
    given = list(range(len(flow.before)))
    starts = [given, *(_depth_first(flow, reverse) for reverse in (False, True))]
    start = min(starts, key=lambda order: order_bound(flow, order))
    renumbered = _renumbered(flow, start)
    search = _Search(renumbered)
    candidates = [given, start]
    cuts = [_pieces(renumbered, outputs=False)]
    if len(given) <= _LONGEST:  # outputs that could wait would join the pieces of a large graph with many outputs
        cuts.append(_pieces(renumbered, outputs=True))
    for pieces in cuts if cuts[0] != cuts[-1] else cuts[:1]:
        order: list[int] = []
        for piece in pieces:
            if len(piece) > 20:
                progress(f"order: {len(order)} of {len(given)} nodes")
            order += search.order_piece(piece)
        candidates.append([start[index] for index in order])
    return min(candidates, key=lambda candidate: order_bound(flow, candidate))


def proven_best(flow: Flow, order: Sequence[int]) -> bool:
    """Whether a complete search shows that no order needs less than ``order``; False where that is open."""
    ordered = _renumbered(flow, order)
    if len(order) > _LONGEST:
        return False
    buffers = buffers_in_order(ordered, range(len(order)))
    live = [sum(b.size for b in buffers if b.start <= step < b.end) for step in range(len(order))]
    fullest = live.index(max(live))
    (piece,) = [piece for piece in _pieces(ordered, outputs=True) if fullest in piece]
    return _Search(ordered).is_best(piece)


def _depth_first(flow: Flow, reverse: bool) -> list[int]:
    """Every node as late as its readers allow, branch after branch, as ONNX Runtime's default order."""
    done: set[int] = set()
    order: list[int] = []
    read = {other for before in flow.before for other in before}
    todo = [node for node in reversed(range(len(flow.before))) if node not in read]
    while todo:
        node = todo[-1]
        waiting = sorted((other for other in flow.before[node] if other not in done), reverse=reverse)
        if node in done or not waiting:
            todo.pop()
            if node not in done:
                done.add(node)
                order.append(node)
            continue
        todo += waiting
    return order


def _renumbered(flow: Flow, order: Sequence[int]) -> Flow:
    """``flow`` with its nodes counted in ``order``."""
    step = {node: index for index, node in enumerate(order)}
    tensors = [
        dataclasses.replace(tensor, producer=step[tensor.producer], consumers={step[n] for n in tensor.consumers})
        for tensor in flow.tensors
    ]
    before = [{step[other] for other in flow.before[node]} for node in order]
    return Flow(before, tensors, [flow.in_place[node] for node in order])


def _pieces(flow: Flow, outputs: bool) -> list[list[int]]:
    """The nodes in order, cut after what makes the only tensor still needed; long pieces where least is alive.

    With ``outputs`` a graph output is still needed: there is no cut after it that keeps it from being made later.
    """
    count = len(flow.before)
    tensors, size = [0] * (count + 1), [0] * (count + 1)
    for tensor in flow.tensors:
        end = max(tensor.consumers, default=tensor.producer)
        tensors[tensor.producer] += 1
        tensors[count if outputs and tensor.kept else end] -= 1
        size[tensor.producer] += tensor.size
        size[end] -= tensor.size
    alive, live = list(itertools.accumulate(tensors)), list(itertools.accumulate(size))
    free = max((node for node, before in enumerate(flow.before) if not before), default=0)  # could run before a cut
    made = {tensor.producer for tensor in flow.tensors if tensor.consumers}
    cuts = [0, *(node + 1 for node in range(free, count - 1) if alive[node] == 1 and node in made), count]
    pieces: list[list[int]] = []
    todo = list(itertools.pairwise(cuts))[::-1]
    while todo:
        start, end = todo.pop()
        if end - start <= _LONGEST:
            pieces.append(list(range(start, end)))
            continue
        quarter = (end - start) // 4
        middle = min(range(start + quarter, end - quarter), key=lambda node: live[node]) + 1
        todo += [(middle, end), (start, middle)]
    return pieces


@dataclasses.dataclass
class _State:
    """A set of nodes that are done (bits, by position in the piece), and the best way to it known.

    Attributes:
        done: the set.
        ready: nodes that could run next.
        live: bytes alive.
        peak: the most bytes that were alive on the way.
        last: the nodes that ran since ``previous``.
        previous: the state before.
    """

    done: int
    ready: frozenset[int]
    live: int
    peak: int
    last: tuple[int, ...]
    previous: _State | None


class _Search:
    """Orders one piece after the other."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._made = flow.made
        self._after: list[list[int]] = [[] for _ in flow.before]
        for node, before in enumerate(flow.before):
            for other in before:
                self._after[other].append(node)
        self._reads: list[list[int]] = [[] for _ in flow.before]
        for index, tensor in enumerate(flow.tensors):
            for node in tensor.consumers:
                self._reads[node].append(index)

    def order_piece(self, piece: list[int]) -> list[int]:
        """The nodes of ``piece`` in the best order found.

        Each beam only keeps what stays below a ceiling, which is then lowered (or raised again) by halves.
        """
        if len(piece) < 3:
            return piece
        self._begin(piece)
        best, ceiling = piece, self._peak_of(piece)
        floor = max(self._least(node) for node in piece)
        target = ceiling - 1
        for _ in range(_TRIES):
            if target < floor:
                break
            found, complete = self._beam(piece, target)
            if found is not None:
                best, ceiling = found, self._peak_of(found)
            elif complete:
                floor = target + 1
            if complete and found is not None:
                break  # nothing was left out: it is the best there is
            target = min(ceiling - 1, (floor + ceiling) // 2) if found is not None else (target + ceiling) // 2
            if target >= ceiling - 1 and found is None:
                break
        return best

    def is_best(self, piece: list[int]) -> bool:
        """Whether no order of ``piece`` needs less than the one it is in, and that is certain."""
        self._begin(piece)
        return self._beam(piece, self._peak_of(piece) - 1) == (None, True)

    def _beam(self, piece: list[int], target: int) -> tuple[list[int] | None, bool]:
        """An order that never has more than ``target`` alive, and whether the search was complete."""
        width = min(_WIDEST, max(_NARROWEST, _EFFORT // len(piece)))
        ready = frozenset(node for node in piece if not self._needs[node])
        levels: list[dict[int, _State]] = [{} for _ in range(len(piece) + 1)]  # by the number of nodes done
        self._add(levels, self._settle(_State(0, ready, 0, 0, (), None)))
        complete = True
        for level in levels[:-1]:
            best = sorted(level.values(), key=lambda state: (state.live, state.peak))
            level.clear()  # what is not on the way to a later state can go
            complete = complete and len(best) <= width
            for state in best[:width]:
                for node in sorted(state.ready):
                    during, live = self._step(state, node)
                    if during <= target:
                        self._add(levels, self._settle(self._run(state, node, during, live)))
        if not levels[-1]:
            return None, complete
        (way,) = levels[-1].values()
        order: list[int] = []
        state: _State | None = way
        while state is not None:
            order += reversed(state.last)
            state = state.previous
        return order[::-1], complete

    def _peak_of(self, order: list[int]) -> int:
        state = _State(0, frozenset(order), 0, 0, (), None)
        for node in order:
            state = self._run(state, node, *self._step(state, node))
        return state.peak

    def _least(self, node: int) -> int:
        """Bytes alive while ``node`` runs, whatever the order, relative to what is alive before the piece."""
        tensors = self._flow.tensors
        made = sum(tensors[index].size for index in self._made[node])
        read = [index for index in self._reads[node] if tensors[index].producer in self._bit]
        over = max((tensors[index].size for index in read if index in self._flow.in_place[node]), default=0)
        return sum(tensors[index].size for index in read) + made - over - self._outside

    def _begin(self, piece: list[int]) -> None:
        inside = set(piece)
        self._bit = {node: 1 << index for index, node in enumerate(piece)}
        self._needs = {node: self._mask(self._flow.before[node] & inside) for node in piece}
        self._readers: dict[int, int] = {}
        for node in piece:
            for tensor in (*self._reads[node], *self._made[node]):
                self._readers[tensor] = self._mask(self._flow.tensors[tensor].consumers & inside)
        last = piece[-1]
        outside = [t for t in self._readers if self._flow.tensors[t].producer not in inside]
        self._outside = sum(self._flow.tensors[t].size for t in outside)  # freed at most, so alive goes below zero
        self._stays = {t for t in self._readers if self._lives_on(t, last)}

    def _lives_on(self, index: int, last: int) -> bool:
        tensor = self._flow.tensors[index]
        return tensor.kept or max(tensor.consumers, default=-1) > last

    def _mask(self, nodes: set[int]) -> int:
        mask = 0
        for node in nodes:
            mask |= self._bit[node]
        return mask

    def _step(self, state: _State, node: int) -> tuple[int, int]:
        """Bytes alive while ``node`` runs, and after it."""
        tensors = self._flow.tensors
        done = state.done | self._bit[node]
        added = sum(tensors[index].size for index in self._made[node])
        freed, over = 0, 0
        for index in self._reads[node]:
            if index not in self._stays and not self._readers[index] & ~done:
                freed += tensors[index].size
                if index in self._flow.in_place[node]:
                    over = tensors[index].size
        for index in self._made[node]:
            if index not in self._stays and not self._readers[index]:
                freed += tensors[index].size
        return state.live + added - over, state.live + added - freed

    def _run(self, state: _State, node: int, during: int, live: int) -> _State:
        done = state.done | self._bit[node]
        freed = [n for n in self._after[node] if n in self._bit and not self._needs[n] & ~done]
        ready = (state.ready - {node}) | frozenset(freed)
        return _State(done, ready, live, max(state.peak, during), (node,), state)

    @staticmethod
    def _add(levels: list[dict[int, _State]], state: _State) -> None:
        level = levels[state.done.bit_count()]
        known = level.get(state.done)
        if known is None or (state.peak, state.live) < (known.peak, known.live):
            level[state.done] = state

    def _settle(self, state: _State) -> _State:
        """Runs what costs nothing at once: nodes that leave no more alive than before and do not raise the peak.

        Later they would free no more, so no order is lost.
        """
        moved = list(state.last)
        previous = state.previous
        found = True
        while found:
            found = False
            for node in sorted(state.ready):
                during, live = self._step(state, node)
                if live <= state.live and during <= state.peak:
                    state = self._run(state, node, during, live)
                    moved.append(node)
                    found = True
        return dataclasses.replace(state, last=tuple(moved), previous=previous)
