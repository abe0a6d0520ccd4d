"""What only a GPU can show. Skipped where CUDA does not run."""

from __future__ import annotations

import numpy as np
import pytest

import onnxlathe as lathe
from onnxlathe.compiler.verify import compare_tokens, run_reference
from onnxlathe.models.zoo import build
from onnxlathe.runtime.feeds import make_feeds
from onnxlathe.runtime.providers import cuda_problem

pytestmark = pytest.mark.skipif(cuda_problem() is not None, reason=f"no CUDA here: {cuda_problem()}")


def encoder() -> lathe.ir.Model:
    entry = build("encoder")
    return lathe.export(entry.module, entry.args, dynamic_shapes=entry.dynamic_shapes)


@pytest.mark.parametrize("preset", ["cpu-fp32", "cuda-fp16"])
def test_presets_on_the_gpu_agree_with_the_cpu(preset: str) -> None:
    model = encoder()
    feeds = make_feeds(model, count=3)
    out = lathe.compile(model, preset, target="cuda", calibration=feeds, speed_gate=False, progress=False)
    session = out.session("cuda")
    got = [session.run(sample) for sample in feeds]
    assert all(np.isfinite(array).all() for result in got for array in result.values())
    assert compare_tokens(feeds, run_reference(model, feeds), got)[0] < (
        5e-3 if preset == "cpu-fp32" else 2e-2
    )  # TF32, float16


def test_bound_arrays_and_generation() -> None:
    from onnxlathe.models.stories import stories260k

    model = lathe.export_causal_lm(stories260k())
    prompt = np.array([1, 403, 407, 261])
    texts = {device: lathe.Session(model, device=device).generate(prompt, 32, eos=()) for device in ("cpu", "cuda")}
    assert texts["cpu"].tolist() == texts["cuda"].tolist()


def test_nodes_run_where_they_were_placed() -> None:
    from onnxlathe.passes import PartitionDevices

    model = encoder()
    step = PartitionDevices(machines={"cuda": (50e12, 2e12, 5e-6)}, latency=1e-9, links=1e12)  # all it can go there
    out = lathe.compile(model, [step], progress=False)
    session = out.session("cuda")
    feeds = make_feeds(model, count=1)
    assert compare_tokens(feeds, run_reference(model, feeds), [session.run(feeds[0])])[0] < 5e-3
    assert not session.misplaced
