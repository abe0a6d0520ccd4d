"""The runtime's memory: pooled outputs, size classes, shared weights, arena options."""

from __future__ import annotations

import gc
import platform
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from onnxlathe.runtime.inference import session_options
from onnxlathe.runtime.memory import BufferPool, SharedWeights, return_freed, size_class
from rewriting import from_text

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[n, 64] x, float[64, 512] w) => (float[n, 512] y) {y = MatMul(x, w)}"""


def model() -> ir.Model:
    return from_text(TEXT, w=np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32))


def test_size_classes_waste_at_most_a_quarter() -> None:
    for size in [1, 64, 65, 100, 1000, 4097, 123_457, 1 << 20, (1 << 20) + 1]:
        assert size <= size_class(size) <= max(64, size * 1.25 + 64)
        assert size_class(size_class(size)) == size_class(size)


def test_buffers_come_back_when_nothing_looks_into_them() -> None:
    pool = BufferPool()
    array = pool.empty((3, 5), np.dtype(np.float32))
    array[:] = 1
    part = array[1]
    del array
    assert pool.use.live == 60 and part.sum() == 5
    other = pool.empty((4, 4), np.dtype(np.float32))
    assert pool.use.misses == 2 and not np.shares_memory(part, other)
    del part
    gc.collect()
    assert pool.use.live == 64
    again = pool.empty((2, 2), np.dtype(np.float32))
    assert pool.use.hits == 1 and pool.use.hit_ratio == pytest.approx(1 / 3) and again.ctypes.data % 64 == 0
    del again
    assert pool.shrink() == 64 and pool.use.held == 64 and pool.use.fragmentation == 0


def test_runs_after_warm_up_allocate_no_outputs() -> None:
    session = lathe.Session(model())
    x = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    expected = session.run({"x": x})["y"]
    for _ in range(2):
        y = session.run_pooled({"x": x})["y"]
    misses = session.memory().misses
    for _ in range(20):
        y = session.run_pooled({"x": x})["y"]
        np.testing.assert_array_equal(y, expected)
    assert session.memory().misses <= misses + 1  # the old result is there until the new one has taken its place
    assert session.memory().hits >= 18
    kept = [session.run_pooled({"x": x * k})["y"] for k in range(3)]
    np.testing.assert_allclose(kept[2], 2 * kept[1], rtol=1e-5)
    assert not kept[0].any()


def test_outputs_whose_shape_depends_on_the_data() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[4] x) => (int64[1, n] y) { y = NonZero(x) }'
    session = lathe.Session(from_text(text))
    for values in ([1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]):
        x = np.array(values, np.float32)
        np.testing.assert_array_equal(session.run_pooled({"x": x})["y"], [np.flatnonzero(x)])


def test_sessions_share_weights(tmp_path: Path) -> None:
    from onnxlathe.runtime.artifact import load, save

    path = save(model(), tmp_path / "m.onnx", external_data=True)
    weights = SharedWeights(load(path))
    assert weights.nbytes == 64 * 512 * 4
    sessions = [lathe.Session(path, weights=weights) for _ in range(3)]
    x = np.ones((2, 64), np.float32)
    expected = lathe.Session(path).run({"x": x})["y"]
    for session in sessions:
        np.testing.assert_allclose(session.run({"x": x})["y"], expected, rtol=1e-5)


def test_arena_options() -> None:
    options = session_options(
        ort_config={
            "memory_pattern": False,
            "memory_reuse": False,
            "memory_arena": False,
            "execution_order": "priority",
        }
    )
    assert not options.enable_mem_pattern and not options.enable_mem_reuse and not options.enable_cpu_mem_arena
    assert str(options.execution_order).endswith("PRIORITY_BASED")
    plain = session_options()
    assert plain.enable_mem_pattern and plain.enable_mem_reuse and plain.enable_cpu_mem_arena


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give memory back themselves")
def test_what_is_freed_goes_back_to_the_system() -> None:
    def resident() -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmRSS"))

    start = resident()
    arrays = [np.ones(12_000) for _ in range(1000)]  # 96 kB each: from the heap, not mapped
    kept = arrays[::100]
    del arrays
    assert resident() - start > 80_000  # kB; those that are kept hold the heap open
    return_freed()
    assert resident() - start < 10_000
    assert all((array == 1).all() for array in kept)
