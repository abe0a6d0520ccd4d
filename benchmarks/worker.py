"""One side of a timing, alone in its process: loads a model, then answers requests on stdin, one line each.

    PYTHON benchmarks/worker.py KIND MODEL THREADS

Requests are JSON: ``{"load": path of an .npz}`` -> ``{"ok": true}``; ``{"run": count}`` -> ``{"seconds": [...]}``;
``{"outputs": path}`` writes the first output. A side with a method ``timed(feeds, count)`` times itself. KIND: ``ort``
(plain, default options), ``lathe`` (onnxlathe.Session), ``openvino``, ``torch``, ``torch.compile``. Runs in the side's
own environment and imports only what the kind needs.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Feeds = dict[str, Any]


def plain_ort(model: str, threads: int) -> Callable[[Feeds], Any]:
    """Bare onnxruntime with default options."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)[0]


def lathe(model: str, threads: int) -> Callable[[Feeds], Any]:
    """The artifact through our runtime."""
    import onnxlathe

    session = onnxlathe.Session(model, threads=threads)
    return lambda feeds: session.ort.run(None, feeds)[0]


def openvino(model: str, threads: int) -> Callable[[Feeds], Any]:
    """OpenVINO, tuned for latency, fp32 enforced."""
    import openvino as ov

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    return lambda feeds: request.infer(feeds)[0]


def torch_module(compiled: bool) -> Callable[[str, int], Callable[[Feeds], Any]]:
    """PyTorch on the zoo's module."""

    def load(model: str, threads: int) -> Callable[[Feeds], Any]:
        import torch

        from onnxlathe.models import zoo

        torch.set_num_threads(threads)
        module = zoo.build(model).module.eval()
        run = torch.compile(module) if compiled else module
        names = ("input_ids", "attention_mask", "token_type_ids")

        def call(feeds: Feeds) -> Any:
            with torch.inference_mode():
                return run(*(torch.from_numpy(feeds[name]) for name in names)).numpy()

        return call

    return load


KINDS: dict[str, Callable[[str, int], Callable[[Feeds], Any]]] = {
    "ort": plain_ort,
    "lathe": lathe,
    "openvino": openvino,
    "torch": torch_module(False),
    "torch.compile": torch_module(True),
}


def serve(run: Callable[[Feeds], Any]) -> None:
    """Answers requests about ``run`` until stdin closes."""
    feeds: Feeds = {}
    print(json.dumps({"ok": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {"ok": True}
        if "load" in request:
            with np.load(request["load"]) as archive:
                feeds = {name: archive[name] for name in archive.files}
        elif "run" in request:
            answer = {"seconds": getattr(run, "timed", functools.partial(timed, run))(feeds, request["run"])}
        else:
            np.save(request["outputs"], np.asarray(run(feeds)))
        print(json.dumps(answer), flush=True)


def timed(run: Callable[[Feeds], Any], feeds: Feeds, count: int) -> list[float]:
    """Seconds of each of ``count`` calls."""
    times: list[float] = []
    for _ in range(count):
        start = time.perf_counter()
        run(feeds)
        times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    serve(KINDS[sys.argv[1]](sys.argv[2], int(sys.argv[3])))
