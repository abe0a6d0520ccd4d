"""The generation loop: each prompt alone into the cache, then all rows together, a token each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import LatheError, ModelError
from ..memory import BufferPool
from ..providers import Device
from .causal_lm import CausalLM
from .kv_cache import Cache, make_cache
from .prefix_cache import PrefixCache
from .prompts import Row, TokenIds, check_prompts, read_prompts
from .sampling import Sampling

Array = np.ndarray[Any, Any]
OnToken = Callable[[int, int], object]
CacheMaker = Callable[[CausalLM, int, int, int, Device, BufferPool | None], Cache]
"""What ``make_cache`` is."""
_ROOM = 256  # tokens that a cache without a fixed length begins with, beyond the prompt


class Runnable(Protocol):
    """What the loop runs: an ``ort.InferenceSession``, or several that look like one."""

    def io_binding(self) -> Any:
        """A binding of inputs and outputs to memory."""
        ...

    def run_with_iobinding(self, iobinding: Any) -> None:
        """Runs what was bound."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """What ``generate`` was asked for, checked.

    Attributes:
        max_new_tokens: of each row.
        limit: tokens a row may have, prompt included; None for no limit.
        fixed: the cache has its full length from the start.
        chunk: tokens of a prompt that run at once.
        sampling: how tokens are chosen.
        eos: tokens that end a row.
        on_token: called with (row, token) for each token.
        prefixes: texts seen before.
        pool: where the cache's memory comes from.
        caches: how caches are made.
    """

    max_new_tokens: int
    limit: int | None
    fixed: bool
    chunk: int
    sampling: Sampling
    eos: frozenset[int]
    on_token: OnToken | None
    prefixes: PrefixCache | None
    pool: BufferPool | None
    caches: CacheMaker


def generate(
    session: Runnable,
    model: CausalLM,
    device: Device,
    prompts: TokenIds | Sequence[TokenIds],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int | Sequence[int] | None,
    eos: int | Sequence[int] | None,
    on_token: OnToken | None,
    max_length: int | None,
    prefill_chunk: int,
    prefixes: PrefixCache | None = None,
    pool: BufferPool | None = None,
    caches: CacheMaker | None = None,
) -> Array | list[Array]:
    """``Session.generate``, for a raw session whose graph is ``model``."""
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise ModelError(f"{name} is {value}.", "Give at least 1.")
    if max_length is not None and model.positions is not None and max_length > model.positions:
        raise ModelError(
            f"max_length is {max_length}, but the model knows {model.positions} positions.", "Give at most that."
        )
    limit = model.positions if max_length is None else max_length
    arrays, single = read_prompts(prompts)
    check_prompts(arrays, model.vocabulary, limit, max_length is not None)
    ends = model.eos if eos is None else (eos,) if isinstance(eos, int) else eos
    request = Request(
        max_new_tokens, limit, max_length is not None, prefill_chunk, sampling, frozenset(map(int, ends)), on_token,
        prefixes, pool, caches or make_cache,
    )  # fmt: skip
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(arrays)
    if len(seeds) != len(arrays):
        raise ModelError(f"There are {len(arrays)} prompts and {len(seeds)} seeds.", "Give one seed, or one a prompt.")
    rows = [Row(i, array, np.random.default_rng(seeds[i])) for i, array in enumerate(arrays)]
    # Rows that the graph cannot run together run one after the other.
    together = len(rows) == 1 or (model.batched and (model.ragged or len({len(row.prompt) for row in rows}) == 1))
    for group in [rows] if together else [[row] for row in rows]:
        _Generation(session, model, device, group, request).run()
    results = [np.array(row.tokens, np.int64) for row in rows]
    return results[0] if single else results


class _Generation:
    """Rows that run together, each [prompt, new tokens]."""

    def __init__(
        self, session: Runnable, model: CausalLM, device: Device, rows: Sequence[Row], request: Request
    ) -> None:
        self._session = session
        self._model = model
        self._device: Device = device
        self._rows = rows
        self._request = request
        prompts = np.array([len(row.prompt) for row in rows])
        steps = np.minimum(request.max_new_tokens, (request.limit or np.iinfo(np.int64).max) - prompts)
        # Slots that can be needed at most; with padding on the left, every row has those of the longest.
        self._most = int((prompts + steps).max() if model.in_place else prompts.max() + steps.max())
        capacity = self._most if request.fixed else min(self._most, int(prompts.max()) + _ROOM)
        self._cache = request.caches(model, len(rows), capacity, int(prompts.max()), device, request.pool)
        self._lengths = np.zeros(len(rows), np.int64)  # tokens of each row in the cache

    def run(self) -> None:
        for index, row in enumerate(self._rows):
            self._accept(index, self._prefill(index, row.prompt))
        active = [index for index, row in enumerate(self._rows) if not row.done]
        if active:
            self._decode(active)
        for index, row in enumerate(self._rows):  # the last token chosen has not run
            self._keep(index, np.concatenate([row.prompt, row.tokens])[: self._lengths[index]])

    def _prefill(self, index: int, prompt: Array) -> Array:
        """Runs a prompt in chunks, alone: exact and without padding. Returns the last position's logits."""
        cache = self._cache.row(index, len(prompt))
        stepper = _Stepper(self._session, self._model, self._device, cache)
        logits = np.empty(0, np.float32)
        known = 0
        if self._request.prefixes is not None:
            known, arrays = self._request.prefixes.find(prompt)
            if known:
                cache.load(arrays, known)
        for start in range(known, len(prompt), self._request.chunk):
            piece = prompt[None, start : start + self._request.chunk]
            end = start + piece.shape[1]
            logits = stepper.step(piece, np.ones((1, end)), np.arange(start, end)[None])
        self._cache.put(index, cache, len(prompt))
        self._lengths[index] = len(prompt)
        self._keep(index, prompt)
        return logits[0]

    def _keep(self, index: int, tokens: Array) -> None:
        if self._request.prefixes is not None:
            self._request.prefixes.keep(tokens, self._cache.save(index, len(tokens)))

    def _decode(self, active: list[int]) -> None:
        """A token for each row until all are done. A row that is done keeps its length and is computed for nothing."""
        rows, lengths, cache = self._rows, self._lengths, self._cache
        count = len(rows)
        stepper = _Stepper(self._session, self._model, self._device, cache)
        dtype = self._model.tokens["attention_mask"].numpy()
        tokens = np.array([[row.tokens[-1]] for row in rows])
        width = cache.width(lengths)
        starts = 0 if self._model.in_place else width - lengths
        known = np.zeros((count, cache.capacity), dtype)  # 1 where a column holds a token
        columns = np.arange(width)
        known[:, :width] = (columns >= np.reshape(starts, (-1, 1))) & (columns < np.reshape(starts + lengths, (-1, 1)))
        while active:
            width = cache.width(lengths)
            if cache.reserve(width + 1, self._most):
                known = np.pad(known, ((0, 0), (0, cache.capacity - known.shape[1])))
            mask = known[:, : width + 1].copy()
            # The token that runs is the last column, wherever the cache keeps it: so ONNX's rule (past, then new) and
            # GroupQueryAttention's (how many ones) both hold.
            mask[:, width] = 1
            slots = cache.slots(lengths)
            logits = stepper.step(tokens, mask, lengths[:, None])
            known[active, slots[active]] = 1
            lengths[active] += 1
            for index in active:
                self._accept(index, logits[index])
                tokens[index, 0] = rows[index].tokens[-1]
            active = [index for index in active if not rows[index].done]

    def _accept(self, index: int, logits: Array) -> None:
        """Chooses a row's next token, and says whether it is the row's last."""
        row, request = self._rows[index], self._request
        token = request.sampling.choose(logits, row.rng)
        row.tokens.append(token)
        total = len(row.prompt) + len(row.tokens)
        row.done = token in request.eos or len(row.tokens) == request.max_new_tokens or total == request.limit
        if request.on_token is not None:
            request.on_token(row.index, token)


class _Stepper:
    """Runs of one binding: tokens in, logits of the last position out, the cache carried on."""

    def __init__(self, session: Runnable, model: CausalLM, device: Device, cache: Cache) -> None:
        self._session = session
        self._model = model
        self._device: Device = device
        self._cache = cache
        self._binding = session.io_binding()
        self._dtypes = {name: dtype.numpy() for name, dtype in model.tokens.items()}
        self._logits: Array = np.empty(0, model.logits.numpy())

    def step(self, tokens: Array, mask: Array, positions: Array) -> Array:
        """Runs int tokens [batch, sequence] with their mask [batch, total] and positions [batch, sequence].

        Returns:
            float32 [batch, vocabulary]: the last position's logits. They hold until the next step.
        """
        new = tokens.shape[1]
        arrays = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        held = {name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in self._dtypes.items()}
        for name, array in held.items():  # ORT reads them where they are
            self._binding.bind_cpu_input(name, array)
        logits = self._bind_logits(*tokens.shape)
        self._cache.bind(self._binding, new)
        try:
            self._session.run_with_iobinding(self._binding)
        except LatheError:
            raise
        except Exception as error:  # ORT's exception classes are not public
            raise ModelError(
                f"ONNX Runtime failed at {new} tokens after {mask.shape[1] - new}: {str(error).splitlines()[0]}",
                "If the text is longer than the model knows positions, give max_length; else check the model with "
                "onnxlathe inspect.",
            ) from error
        self._cache.advance(new)
        if logits is None:
            logits = self._binding.get_outputs()[0].numpy()
        return logits[:, -1].astype(np.float32, copy=False)

    def _bind_logits(self, batch: int, new: int) -> Array | None:
        """Binds the logits, as the first output, to memory kept from run to run; None where their size is unknown."""
        size, only = self._model.logits_size, self._model.last_only
        if size is None or (only is None and new > 1):
            self._binding.bind_output("logits", "cpu")
            return None
        shape = (batch, 1 if only else new, size)
        count = batch * shape[1] * size
        if self._logits.size < count:
            self._logits = np.empty(count, self._logits.dtype)
        logits = self._logits[:count].reshape(shape)
        self._binding.bind_output("logits", "cpu", 0, int(self._model.logits), shape, logits.ctypes.data)
        return logits
