"""Text in, text out: ``run --prompt``, and what a language model's file needs beside it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import onnx_ir as ir

from onnxlathe.runtime.generation.causal_lm import EOS_KEY
from onnxlathe.runtime.generation.sampling import Sampling
from onnxlathe.runtime.generation.tokenizer import TextStream, eos_beside, load_tokenizer, put_tokenizer, tokenizer_file
from onnxlathe.runtime.session import Session


def stream_text(
    model: Path,
    prompt: str,
    tokenizer_path: Path | None,
    target: str,
    threads: int,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None,
    chunk: int,
) -> None:
    """Writes the prompt and its continuation to stdout as it comes, then the speed to stderr."""
    tokenizer = load_tokenizer(tokenizer_path or model)
    session = Session(model, device=target, threads=threads)
    stream = TextStream(tokenizer)
    ids: list[int] = tokenizer.encode(prompt).ids
    times = [time.perf_counter()]

    def show(row: int, token: int) -> None:
        if len(times) == 1:  # the prompt, once it is known to be good
            _write("".join(stream.push(known) for known in ids))
        times.append(time.perf_counter())
        _write(stream.push(token))

    try:
        session.generate(
            ids,
            max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=seed,
            eos=None if EOS_KEY in session.metadata else eos_beside(model),
            on_token=show,
            prefill_chunk=chunk,
        )
    finally:  # also after Ctrl-C: what was there stays, whole
        if len(times) > 1:
            _write(stream.finish() + "\n")
    said = f"{len(ids)} tokens read in {times[1] - times[0]:.2f} s, {len(times) - 1} written"
    if len(times) > 2:
        said += f", {(len(times) - 2) / (times[-1] - times[1]):.0f} a second"
    print(said, file=sys.stderr)


def carry_tokenizer(source: Path, compiled: ir.Model, output: Path | None) -> Path | None:
    """Gives ``output`` what ``source`` has beside it: its tokenizer, and the tokens that end a text.

    Args:
        source: the model that was compiled.
        compiled: the result.
        output: where it is written; None: the caller takes the tokenizer along.

    Returns:
        The tokenizer of ``source``, if there is one.
    """
    if EOS_KEY not in compiled.metadata_props and (eos := eos_beside(source)):
        compiled.metadata_props[EOS_KEY] = json.dumps(eos)
    file = tokenizer_file(source)
    if file is not None and output is not None:
        put_tokenizer(file.read_bytes(), output)
    return file


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
