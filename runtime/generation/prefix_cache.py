"""Keys and values of prompts seen before, so that a prompt that begins like one of them need not compute them again."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class PrefixUse:
    """What a prefix cache has done.

    Attributes:
        hits: prompts that began like one seen before.
        misses: prompts that did not.
        reused: tokens whose keys and values were there already.
        asked: tokens of all prompts.
        held: bytes of keys and values kept.
    """

    hits: int
    misses: int
    reused: int
    asked: int
    held: int

    @property
    def hit_ratio(self) -> float:
        """reused / asked: the part of all prompts' tokens that was not computed; 0 before the first prompt."""
        return self.reused / self.asked if self.asked else 0.0


class PrefixCache:
    """Texts with the keys and values of their tokens; beyond ``capacity`` the ones not used for longest go.

    In a causal model the keys and values of a token depend on the tokens up to it only, so any beginning of a text
    serves all prompts that begin with it. Safe to use from several threads.

    Args:
        capacity: bytes of keys and values to keep at most.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._texts: OrderedDict[bytes, tuple[Array, Sequence[Array]]] = OrderedDict()
        self._hits = self._misses = self._reused = self._asked = self._held = 0
        self._lock = threading.Lock()

    def find(self, prompt: Array) -> tuple[int, Sequence[Array]]:
        """The longest beginning of ``prompt`` that is known: its length, and the arrays that hold it.

        The last token of the prompt does not count, as it must run for its logits. The arrays are [heads, tokens,
        size], with at least as many tokens; they are not to be changed.
        """
        with self._lock:
            best, key = 0, b""
            for name, (tokens, _) in self._texts.items():
                count = min(len(tokens), len(prompt) - 1)
                differs = np.flatnonzero(tokens[:count] != prompt[:count])
                shared = int(differs[0]) if differs.size else count
                if shared > best:
                    best, key = shared, name
            self._asked += len(prompt)
            self._reused += best
            if not best:
                self._misses += 1
                return 0, ()
            self._hits += 1
            self._texts.move_to_end(key)
            return best, self._texts[key][1]

    def keep(self, tokens: Array, arrays: Sequence[Array]) -> None:
        """Keeps the keys and values of a text, [heads, tokens, size] each, in the place of its own beginnings."""
        size = sum(array.nbytes for array in arrays)
        if size > self.capacity:
            return
        tokens = np.array(tokens, np.int64)
        with self._lock:
            for name, (known, _) in list(self._texts.items()):
                if len(known) <= len(tokens) and np.array_equal(known, tokens[: len(known)]):
                    self._drop(name)
            self._texts[tokens.tobytes()] = (tokens, arrays)
            self._held += size
            while self._held > self.capacity:
                self._drop(next(iter(self._texts)))

    @property
    def use(self) -> PrefixUse:
        """Counts so far."""
        return PrefixUse(self._hits, self._misses, self._reused, self._asked, self._held)

    def _drop(self, name: bytes) -> None:
        _, arrays = self._texts.pop(name)
        self._held -= sum(array.nbytes for array in arrays)
