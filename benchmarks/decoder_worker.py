"""One side of the decoder benchmark, alone in its process; requests as in ``worker.py``.

    PYTHON benchmarks/decoder_worker.py KIND MODEL THREADS

A case is an ``.npz``: ``prompt`` int64 [batch, past] and, to decode, ``token`` int64 [batch, 1]. A run is one prefill
of an empty cache, or one decoding step at about ``past`` tokens; it returns the logits of the last position
[batch, vocabulary]. Every side fills its cache itself, from the prompt. Sides that copy the cache really do: present is
the next step's past, and after ``DRIFT`` steps they begin at ``past`` again. For loops the case has ``new``: a run is a
text and returns its tokens [batch, new]; with ``steps`` the time between two tokens is taken.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from worker import Feeds, serve, timed

DRIFT = 16


class Ort:
    """A graph run by bare onnxruntime, everything bound. Where GroupQueryAttention makes the presents, past and present
    are one buffer."""

    def __init__(self, model: str, threads: int, ours: bool = False) -> None:
        import onnx
        import onnxruntime

        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        if ours:  # with the session options that the artifact asks for
            import onnxlathe

            self._session = onnxlathe.Session(model, threads=threads).ort
        else:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(model, load_external_data=False).graph
        makers = {output: node.op_type for node in graph.node for output in node.output}
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._cache = {name: name.replace("past_key_values", "present") for name in self._inputs if "past" in name}
        self._in_place = all(makers[present] == "GroupQueryAttention" for present in self._cache.values())
        described = Path(model).parent / "genai_config.json"  # genai's builder leaves the size of a head open
        self._head = json.loads(described.read_text())["model"]["decoder"]["head_size"] if described.exists() else 0
        self._feeds: Feeds = {}

    def __call__(self, feeds: Feeds) -> Any:
        if feeds is not self._feeds:
            self._prepare(feeds)
        if "token" not in feeds:
            return self._step(self._empty, feeds["prompt"], 0)
        past, length = self._present, self._length
        if self._in_place or length >= feeds["prompt"].shape[1] + DRIFT:
            past, length = self._start, feeds["prompt"].shape[1]
        return self._step(past, feeds["token"], length)

    def _prepare(self, feeds: Feeds) -> None:
        batch, past = feeds["prompt"].shape
        length = room(past) if self._in_place else 0
        # In place the buffer is the past from the start: what lies in it behind the tokens is never read.
        self._empty = {
            name: self._value(np.zeros((batch, info.shape[1], length, self._size(info)), np.float32), "cpu", 0)
            for name, info in self._inputs.items()
            if name in self._cache
        }
        self._feeds = feeds
        if "token" in feeds:
            self._step(self._empty, feeds["prompt"], 0)
            self._start = self._present

    def _size(self, info: Any) -> int:
        return info.shape[3] if isinstance(info.shape[3], int) else self._head

    def _step(self, past: dict[str, Any], ids: Any, length: int) -> Any:
        batch, new = ids.shape
        total = length + new
        tokens = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": np.tile(np.arange(length, total), (batch, 1)),
        }
        binding = self._session.io_binding()
        for name in self._inputs.keys() & tokens.keys():
            binding.bind_cpu_input(name, tokens[name])
        binding.bind_output("logits", "cpu")
        for name, present in self._cache.items():
            binding.bind_ortvalue_input(name, past[name])
            if self._in_place:
                binding.bind_ortvalue_output(present, past[name])
            else:
                binding.bind_output(present, "cpu")
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        self._present = past if self._in_place else dict(zip(self._cache, present, strict=True))
        self._length = total
        return logits.numpy()[:, -1]  # a view


class Loop:
    """A generation loop: a run is a greedy text; with ``steps`` in the case the time between two tokens counts."""

    def __call__(self, feeds: Feeds) -> Any:
        return self.text(feeds["prompt"], int(feeds["new"]))[0]

    def timed(self, feeds: Feeds, count: int) -> list[float]:
        """Seconds of each text, or of ``count`` steps."""
        if "steps" not in feeds:
            return timed(self, feeds, count)
        times: list[float] = []
        while len(times) < count:
            times += np.diff(self.text(feeds["prompt"], min(DRIFT, count - len(times)) + 1)[1]).tolist()
        return times

    def text(self, prompt: Any, new: int) -> tuple[Any, list[float]]:
        """New tokens [batch, new], and when each of them was there."""
        raise NotImplementedError


class GenaiLoop(Loop):
    """onnxruntime-genai's own loop on a folder of its builder; with 0 threads as its configuration has it."""

    def __init__(self, model: str, threads: int) -> None:
        import onnxruntime_genai

        self._og = onnxruntime_genai
        config = onnxruntime_genai.Config(model)
        if threads:
            session = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": session}}))
        self._model = onnxruntime_genai.Model(config)

    def text(self, prompt: Any, new: int) -> tuple[Any, list[float]]:
        """A fresh generator each time, as a request to a server has; its cache is as long as everybody's."""
        parameters = self._og.GeneratorParams(self._model)
        length = room(prompt.shape[1])
        # min_length: the text does not end early, whatever the random weights say.
        parameters.set_search_options(max_length=length, min_length=length, batch_size=len(prompt), do_sample=False)
        generator = self._og.Generator(self._model, parameters)
        generator.append_tokens(np.ascontiguousarray(prompt, np.int32))
        times: list[float] = []
        for _ in range(new):
            generator.generate_next_token()
            times.append(time.perf_counter())
        rows = [np.asarray(generator.get_sequence(row))[prompt.shape[1] :] for row in range(len(prompt))]
        return np.stack(rows), times


class LatheLoop(Loop):
    """``onnxlathe.Session.generate``."""

    def __init__(self, model: str, threads: int) -> None:
        import onnxlathe

        self._session: Any = onnxlathe.Session(model, threads=threads)
        if not hasattr(self._session, "generate"):
            raise NotImplementedError("this onnxlathe has no Session.generate yet")

    def text(self, prompt: Any, new: int) -> tuple[Any, list[float]]:
        """Timed by the callback of the last row."""
        times: list[float] = []

        def on_token(row: int, token: int) -> None:
            if row == len(prompt) - 1:
                times.append(time.perf_counter())

        rows = self._session.generate(list(prompt), new, eos=(), on_token=on_token, max_length=room(prompt.shape[1]))
        return np.stack(rows), times


class TorchLoop(Loop):
    """``generate`` of transformers."""

    def __init__(self, model: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._module = AutoModelForCausalLM.from_pretrained(model).eval()

    def text(self, prompt: Any, new: int) -> tuple[Any, list[float]]:
        """Timed by a streamer."""

        times: list[float] = []

        class Streamer:
            def put(self, value: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        ids = self._torch.from_numpy(prompt)
        done = self._module.generate(
            ids, attention_mask=self._torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0, streamer=Streamer(),
        )  # fmt: skip
        return done[:, ids.shape[1] :].numpy(), times[1:]  # the first call brings the prompt


class Torch:
    """PyTorch on the folder that ``save_pretrained`` wrote: eager with a ``DynamicCache``, compiled with a
    ``StaticCache``, as each is run."""

    def __init__(self, model: str, threads: int, compiled: bool = False, last: bool = False) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch, self._compiled, self._last = torch, compiled, last
        self._module = AutoModelForCausalLM.from_pretrained(model).eval()
        self._run = torch.compile(self._module) if compiled else self._module
        forward = inspect.signature(self._module.forward).parameters
        self._argument = "past_key_values" if "past_key_values" in forward else "cache"
        self._feeds: Feeds = {}

    def __call__(self, feeds: Feeds) -> Any:
        ids = self._torch.from_numpy(feeds["prompt"])
        with self._torch.inference_mode():
            if "token" not in feeds:
                return self._step(ids, self._cache(ids), 0)
            if feeds is not self._feeds:
                self._past, self._feeds = self._cache(ids), feeds
                self._step(ids, self._past, 0)
                self._length = ids.shape[1]
            elif self._length >= ids.shape[1] + DRIFT:
                self._rewind(ids.shape[1])
            self._length += 1
            return self._step(self._torch.from_numpy(feeds["token"]), self._past, self._length - 1)

    def _cache(self, ids: Any) -> Any:
        from transformers import DynamicCache, StaticCache

        if not self._compiled:
            return DynamicCache(config=self._module.config)
        return StaticCache(config=self._module.config, max_cache_len=room(ids.shape[1]))

    def _rewind(self, length: int) -> None:
        if not self._compiled:
            self._past.crop(length)
        else:
            for layer in self._past.layers:
                layer.cumulative_length.fill_(length)
        self._length = length

    def _step(self, ids: Any, cache: Any, length: int) -> Any:
        positions = self._torch.arange(length, length + ids.shape[1])[None]
        kept = {"logits_to_keep": 1} if self._last else {}
        result = self._run(input_ids=ids, position_ids=positions, use_cache=True, **{self._argument: cache}, **kept)
        return result.logits[:, -1].numpy()


def openvino(model: str, threads: int) -> Any:
    """OpenVINO, see ``decoder_openvino.py``."""
    from decoder_openvino import OpenVino

    return OpenVino(model, threads)


def room(tokens: int) -> int:
    """Length of a buffer for the prompt and what is generated after it, the same for every side that has one."""
    return tokens + 128


KINDS: dict[str, Any] = {
    "ort": Ort,
    "lathe": lambda model, threads: Ort(model, threads, ours=True),
    "lathe loop": LatheLoop,
    "genai loop": GenaiLoop,
    "genai loop as it comes": lambda model, threads: GenaiLoop(model, 0),
    "openvino": openvino,
    "torch": Torch,
    "torch last": lambda model, threads: Torch(model, threads, last=True),
    "torch loop": TorchLoop,
    "torch.compile": lambda model, threads: Torch(model, threads, compiled=True),
}


if __name__ == "__main__":
    serve(KINDS[sys.argv[1]](sys.argv[2], int(sys.argv[3])))
