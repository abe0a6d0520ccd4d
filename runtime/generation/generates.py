"""``generate``, for whatever runs a language model: a session, stages, ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..memory import BufferPool
from ..providers import Device
from .causal_lm import CausalLM
from .generate import CacheMaker, OnToken, Runnable, generate
from .prefix_cache import PrefixCache
from .prompts import TokenIds
from .sampling import Sampling


class Generates:
    """Base of what can continue texts.

    Attributes:
        device: where it runs.
        prefixes: keys and values of texts seen before; None: each prompt is computed in full.
    """

    device: Device
    prefixes: PrefixCache | None = None
    _buffers: BufferPool
    _caches: CacheMaker | None = None  # None: in memory of this process

    def _generator(self) -> tuple[Runnable, CausalLM]:
        """What runs, and how.

        Raises:
            ModelError: the model cannot generate.
        """
        raise NotImplementedError

    def generate(
        self,
        prompts: TokenIds | Sequence[TokenIds],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        eos: int | Sequence[int] | None = None,
        on_token: OnToken | None = None,
        max_length: int | None = None,
        prefill_chunk: int = 512,
    ) -> Any:
        """Continues prompts with a causal language model whose cache is in its inputs and outputs.

        A row's tokens do not depend on the other rows. A row ends with an ``eos`` token, after ``max_new_tokens``, or
        when it has ``max_length`` tokens in all (or as many as the model's table of positions).

        Inputs and outputs of the model: ``input_ids`` and, optionally, ``position_ids`` [batch, sequence],
        ``attention_mask`` [batch, past + sequence], ``past_key_values.N.key``/``.value`` [batch, kv_heads, past,
        head_dim]; ``logits`` [batch, sequence or 1, vocabulary], ``present.N.key``/``.value``. Where each past is read
        by a GroupQueryAttention only, past and present are one buffer, and nothing is copied from step to step.

        Args:
            prompts: token ids [sequence], or a list of such of any lengths.
            max_new_tokens: new tokens of each row.
            temperature: logits are divided by it; 0 takes the most likely token.
            top_k: draw from the ``top_k`` most likely tokens only.
            top_p: draw from the most likely tokens that reach this probability only.
            seed: seed of the draws; each row draws with it alone, so equal prompts get equal texts: give a list, one
                seed a prompt, for different ones. None: different each time.
            eos: token ids that end a row, which keeps them; None: those that the artifact records, () for none.
            on_token: called with ``(row, token)`` as soon as a token is chosen. Its exceptions stop everything.
            max_length: the most tokens of a row, prompt included; the cache has its full size from the start. None: no
                limit but the model's, and the cache doubles when it is full.
            prefill_chunk: tokens of a prompt that run at once.

        Returns:
            int64 [new tokens]; for a list of prompts, a list of such.

        Raises:
            ModelError: the model has no cache, a prompt is empty, too long or has unknown token ids, an option is
                wrong, or ONNX Runtime fails.
        """
        runnable, model = self._generator()
        return generate(
            runnable,
            model,
            self.device,
            prompts,
            max_new_tokens,
            Sampling(temperature, top_k, top_p),
            seed=seed,
            eos=eos,
            on_token=on_token,
            max_length=max_length,
            prefill_chunk=prefill_chunk,
            prefixes=self.prefixes,
            pool=self._buffers,
            caches=self._caches,
        )
