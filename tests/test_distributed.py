"""Data, pipeline and tensor parallelism: threads, and Ray on one machine."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from cached_decoders import grouped, stories
from onnxlathe.compiler.base import PassContext
from onnxlathe.passes.partition.partition_stages import PartitionStages
from onnxlathe.passes.partition.partition_tensor import PartitionTensor
from onnxlathe.runtime.artifact import save
from onnxlathe.runtime.distributed import (
    DataParallel,
    Limits,
    Pipeline,
    TensorParallel,
    best_setting,
    map_batches,
    start_server,
    stop_server,
)
from onnxlathe.runtime.distributed.workers import WorkerDied
from onnxlathe.runtime.errors import ModelError, PlanError, RuntimeUnavailable
from onnxlathe.runtime.generation.prefix_cache import PrefixCache
from rewriting import from_text

TEXT = """<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 32] x, float[32, 64] a, float[64, 32] b)
  => (float[batch, 32] y, float[batch] row) {
    p = MatMul(x, a) q = Relu(p) y = MatMul(q, b) row = ReduceSum<keepdims=0>(x, axis) }"""


@pytest.fixture(scope="module")
def ray_of_tests() -> Iterator[Any]:
    """One Ray for all tests of the file."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def model() -> ir.Model:
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in (("a", (32, 64)), ("b", (64, 32)))}
    text = TEXT.replace("float[64, 32] b)", "float[64, 32] b, int64[1] axis)")
    return from_text(text, **arrays, axis=np.array([1]))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(model(), tmp_path / "model.onnx")


def rows(count: int) -> dict[str, np.ndarray]:
    """Row i is told by the sum of its numbers."""
    x = np.zeros((count, 32), np.float32)
    x[:, 0] = np.arange(count)
    return {"x": x}


def test_threads_answer_each_row_once_and_in_order(file: Path) -> None:
    expected = lathe.Session(file).run(rows(1001))
    seen: list[tuple[int, int]] = []
    with DataParallel(file, 3, engine="threads") as parallel:
        result = parallel.run(rows(1001), progress=lambda done, total: seen.append((done, total)))
        assert parallel.run(rows(1))["row"].tolist() == [0]
        assert parallel.run(rows(0))["y"].shape == (0, 32)
    np.testing.assert_array_equal(result["row"], np.arange(1001))
    np.testing.assert_allclose(result["y"], expected["y"], rtol=1e-5)
    assert seen[-1] == (1001, 1001) and seen == sorted(seen)


def test_samples_are_not_read_far_ahead(file: Path) -> None:
    read = 0

    def source() -> Iterator[dict[str, np.ndarray]]:
        nonlocal read
        for number in range(1000):
            read += 1
            yield rows(number % 5 + 1)

    with DataParallel(file, 2, engine="threads") as parallel:
        results = parallel.map(source())
        for number in range(20):
            assert len(next(results)["row"]) == number % 5 + 1
            assert read <= number + 20


def test_rows_of_many_callers_run_together(file: Path) -> None:
    """Each gets its own rows, also those with a bad sample among them."""
    with DataParallel(file, 2, engine="threads") as parallel:
        futures = [parallel.submit({"x": np.full((1 + n % 2, 32), n, np.float32)}) for n in range(200)]
        for n, future in enumerate(futures):
            np.testing.assert_allclose(future.result(30)["row"], [32.0 * n] * (1 + n % 2), rtol=1e-6)
        with pytest.raises(ModelError, match="dtype"):
            parallel.submit({"x": np.zeros((1, 32))})


class Flaky:
    """Workers of which some die: after ``lives`` runs, or on a row."""

    def __init__(self, inner: Any, lives: list[int], poison: float | None = None) -> None:
        self.inner, self.count, self.lives, self.poison, self.restarts = inner, inner.count, lives, poison, 0

    def submit(self, worker: int, feeds: Any) -> Future[Any]:
        self.lives[worker] -= 1
        if self.lives[worker] < 0 or (self.poison is not None and self.poison in feeds["x"][:, 0]):
            dead: Future[Any] = Future()
            dead.set_exception(WorkerDied("killed"))
            return dead
        return self.inner.submit(worker, feeds)

    def restart(self, worker: int) -> None:
        self.restarts += 1
        self.lives[worker] = 10**6

    def close(self) -> None:
        self.inner.close()


def test_rows_of_a_dead_worker_run_once_on_another(file: Path) -> None:
    with DataParallel(file, 2, engine="threads") as parallel:
        parallel.workers = flaky = Flaky(parallel.workers, [1, 10**6])
        np.testing.assert_array_equal(parallel.run(rows(10_000))["row"], np.arange(10_000))
        assert flaky.restarts >= 1
        parallel.workers = Flaky(flaky.inner, [10**6, 10**6], poison=77.0)
        with pytest.raises(RuntimeUnavailable, match="died on the same rows"):
            parallel.run(rows(100))


def test_bad_requests(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="at least one worker"):
        DataParallel(file, 0)
    with pytest.raises(RuntimeUnavailable, match="no engine"):
        DataParallel(file, 1, engine="sockets")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no file"):
        DataParallel(tmp_path / "no.onnx")
    fixed = from_text('<ir_version: 10, opset_import: ["" : 20]> g (float[1, 4] x) => (float[1, 4] y) { y = Relu(x) }')
    with pytest.raises(ModelError, match="cannot be divided"):
        DataParallel(save(fixed, tmp_path / "fixed.onnx"), engine="threads").run({"x": np.zeros((1, 4), np.float32)})
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[n, 4] x) => (float y) { y = ReduceSum<keepdims=0>(x) }'
    with pytest.raises(ModelError, match="put together"):
        DataParallel(save(from_text(text), tmp_path / "sum.onnx"), engine="threads").run(
            rows(8) | {"x": rows(8)["x"][:, :4]}
        )


def test_the_best_setting_uses_all_cores(file: Path) -> None:
    workers, threads = best_setting(file, rows(64), seconds=0.2)
    assert workers * threads == len(os.sched_getaffinity(0))


PROMPTS = [[1, 403, 407, 261, 378], [1, 346, 388]]


def divided_stories(folder: Path) -> list[list[int]]:
    """Two stages and two ranks of stories260k; returns the texts of one session."""
    stages = grouped(stories(), rotary=False)
    ranks = stages.clone()
    texts = [text.tolist() for text in lathe.Session(stages, threads=1).generate(PROMPTS, 40)]
    PartitionStages(k=2, cost="roofline")(stages, PassContext(threads=1))
    PartitionTensor(2)(ranks, PassContext(threads=1))
    lathe.save_stages(stages, folder / "stages")
    lathe.save_ranks(ranks, folder / "ranks")
    return texts


def test_a_ray_cluster_of_two_nodes(file: Path, tmp_path: Path) -> None:
    """Ray's own test cluster: the same code, a worker, stage or rank on each node, and the texts of one session.

    In a process of its own, before Ray starts here.
    """
    pytest.importorskip("ray")
    texts = divided_stories(tmp_path)
    command = [sys.executable, "-c", CLUSTER, str(file), str(tmp_path), json.dumps([PROMPTS, texts])]
    with (tmp_path / "log").open("w+") as log:  # Ray's daemons keep a pipe open
        subprocess.run(command, stdout=log, stderr=log, timeout=240)
        log.seek(0)
        text = log.read()
    assert "nodes 2 right True" in text, text[-2000:]
    assert "Pipeline on 2 nodes, texts True" in text and "TensorParallel on 2 nodes, texts True" in text, text[-2000:]


CLUSTER = """
import json, sys
import numpy as np, ray
from ray.cluster_utils import Cluster
from onnxlathe.runtime.distributed import DataParallel, Pipeline, TensorParallel
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
x = np.zeros((500, 32), np.float32)
x[:, 0] = np.arange(500)
with DataParallel(sys.argv[1], workers=2) as parallel:
    result = parallel.run({"x": x})
right = bool((result["row"] == np.arange(500)).all()) and parallel.engine == "ray"
print("nodes", len(ray.nodes()), "right", right)
prompts, texts = json.loads(sys.argv[3])
for kind, name in ((Pipeline, "stages"), (TensorParallel, "ranks")):
    with kind(sys.argv[2] + "/" + name) as parts:
        same = [text.tolist() for text in parts.generate(prompts, 40)] == texts
        print(kind.__name__, "on", len(set(parts.nodes())), "nodes, texts", same)
ray.shutdown()
cluster.shutdown()
"""


def test_ray_workers_and_a_kill(ray_of_tests: Any, file: Path) -> None:
    """A real process is killed in the middle of 10,000 rows."""
    with DataParallel(file, 2, engine="ray") as parallel:
        workers: Any = parallel.workers
        samples = [{"x": rows(10_000)["x"][n : n + 50]} for n in range(0, 10_000, 50)]
        found: list[float] = []
        for number, result in enumerate(parallel.map(samples)):
            found += result["row"].tolist()
            if number == 50:
                os.kill(ray_of_tests.get(workers.actors[0].process.remote()), signal.SIGKILL)
        assert found == list(range(10_000)) and parallel.restarts == 1
        with pytest.raises(ModelError, match="shape"):
            parallel.run({"x": np.zeros((4, 3), np.float32)})


def test_ray_stages_and_ranks(ray_of_tests: Any, tmp_path: Path) -> None:
    staged, ranked = model(), model()
    PartitionStages(k=2, cost="roofline")(staged, PassContext())
    PartitionTensor(2)(ranked, PassContext())
    expected = lathe.Session(model()).run(rows(9))
    with Pipeline(lathe.save_stages(staged, tmp_path / "stages")) as pipeline:
        for result in pipeline.run_many([rows(9)] * 7):
            np.testing.assert_allclose(result["y"], expected["y"], rtol=1e-5)
            np.testing.assert_array_equal(result["row"], expected["row"])
    with TensorParallel(lathe.save_ranks(ranked, tmp_path / "ranks")) as tensor:
        np.testing.assert_allclose(tensor.run(rows(9))["y"], expected["y"], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(tensor.run(rows(5))["row"], np.arange(5))
    with pytest.raises(PlanError, match="not ranks"):
        TensorParallel(tmp_path / "stages")


@pytest.mark.parametrize("in_place", [True, False])
def test_texts_through_ray_are_those_of_one_session(
    ray_of_tests: Any, in_place: bool, exported_stories: ir.Model, tmp_path: Path
) -> None:
    """Both kinds of cache, rows of different lengths and alone, caches that grow, prompts in chunks, prefixes kept."""
    whole = grouped(stories(), rotary=False) if in_place else exported_stories
    session = lathe.Session(whole, threads=1)
    staged = whole.clone()
    ranked = whole.clone() if in_place else lathe.compile(whole, ["basic"], verify=False, progress=False).model
    PartitionStages(k=3, cost="roofline")(staged, PassContext(threads=1))
    PartitionTensor(2)(ranked, PassContext(threads=1))
    for kind, folder in (
        (Pipeline, lathe.save_stages(staged, tmp_path / "stages")),
        (TensorParallel, lathe.save_ranks(ranked, tmp_path / "ranks")),
    ):
        with kind(folder) as parts:
            for prompts, options in ((PROMPTS, {}), (PROMPTS[0], {"max_length": 30, "prefill_chunk": 2})):
                expected = session.generate(prompts, 20, **options)
                for got, wanted in zip(parts.generate(prompts, 20, **options), expected, strict=True):
                    np.testing.assert_array_equal(got, wanted)
            if kind is Pipeline:  # longer than the cache begins
                np.testing.assert_array_equal(parts.generate(PROMPTS[1], 265), session.generate(PROMPTS[1], 265))
            parts.prefixes = PrefixCache(1 << 20)
            for _ in range(2):
                np.testing.assert_array_equal(parts.generate(PROMPTS[0], 20), session.generate(PROMPTS[0], 20))
            assert parts.prefixes.use.reused == len(PROMPTS[0]) - 1
            with pytest.raises(ModelError, match="token id 99999"):
                parts.generate([99_999])


def test_actors_forget_caches_and_say_what_is_wrong(ray_of_tests: Any, tmp_path: Path) -> None:
    divided_stories(tmp_path)
    with TensorParallel(tmp_path / "ranks") as parts:
        parts.generate(PROMPTS, 4)
        gc.collect()
        assert parts.each("held", [(), ()]) == [0, 0]
        os.kill(parts.each("process", [(), ()])[1], signal.SIGKILL)
        with pytest.raises(RuntimeUnavailable, match="is gone"):
            parts.generate(PROMPTS, 4)
    mixed = model()
    PartitionStages(k=2, cost="roofline")(mixed, PassContext())
    with Pipeline(lathe.save_stages(mixed, tmp_path / "no text")) as pipeline:
        with pytest.raises(ModelError, match="cannot generate"):
            pipeline.generate([1])
        with pytest.raises(ModelError, match="dtype"):
            pipeline.run({"x": np.zeros((1, 32))})


def test_ray_data(ray_of_tests: Any, file: Path) -> None:
    import ray.data

    table = ray.data.from_numpy(rows(300)["x"]).map_batches(lambda b: {"x": b["data"], "id": b["data"][:, 0]})
    found = map_batches(table, file, batch_size=64).take_all()
    assert sorted(float(item["id"]) for item in found) == list(range(300))
    assert all(float(item["row"]) == float(item["id"]) for item in found)


def post(port: int, path: str, body: bytes, token: str = "secret") -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body or None, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_serving(ray_of_tests: Any, tmp_path: Path) -> None:
    """A language model that also predicts: 500 requests at once, bad ones among them, one that never ends."""
    from onnxlathe.models.stories import tokenizer_json

    file = save(grouped(stories(), rotary=False), tmp_path / "stories.onnx")
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    port = free_port()
    start_server(file, port=port, limits=Limits(max_bytes=100_000, token="secret"))
    try:
        slow = socket.create_connection(("127.0.0.1", port))
        slow.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        kinds = [
            (b'{"prompt": [1, 403, 407], "max_new_tokens": %d}', 200),
            (b"{not json %d", 400),
            (b'{"prompt": [1, 99999], "max_new_tokens": %d}', 400),
            (b'{"prompt": "' + b"x" * 200_000 + b'", "max_new_tokens": %d}', 413),
        ]
        texts = lathe.Session(file, threads=1).generate([1, 403, 407], 9).tolist()
        asked = [(kinds[0 if n % 10 else n // 10 % 4], 1 + n % 9) for n in range(500)]
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(lambda a: post(port, "/generate", a[0][0] % a[1]), asked))
        for ((_, status), count), (code, content) in zip(asked, answers, strict=True):
            assert code == status, content
            if status == 200:
                assert json.loads(content)["tokens"] == texts[:count], "an answer of somebody else"
        code, content = post(port, "/generate", b'{"prompt": "Once upon a time", "max_new_tokens": 20, "stream": true}')
        lines = [json.loads(line) for line in content.splitlines()]
        assert code == 200 and sum("token" in line for line in lines) == 20 and "done" in lines[-1]
        assert "".join(line["text"] for line in lines).startswith(", there was"), lines
        assert post(port, "/health", b"", token="")[0] == 200 and post(port, "/health", b"{}")[0] == 405
        code, content = post(port, "/generate", b'{"prompt": [1, 99999], "stream": true}')
        assert code == 400 and b"token id 99999" in content, "an error in front of the first token is no stream"
        code, content = post(port, "/generate", b'{"prompt": [1], "temperatur": 1}')
        assert code == 400 and b"knows no ['temperatur']" in content
        for _ in range(10):  # clients that go in the middle of a stream
            gone = socket.create_connection(("127.0.0.1", port))
            body = b'{"prompt": [1, 403], "max_new_tokens": 500, "stream": true}'
            head = b"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: %d\r\n\r\n"
            gone.sendall(head % len(body) + body)
            assert gone.recv(100).startswith(b"HTTP/1.1 200")
            gone.close()
        until = time.monotonic() + 20
        while b"onnxlathe_texts_running 0" not in post(port, "/metrics", b"")[1]:
            assert time.monotonic() < until, "texts that nobody reads are still generated"
        with pytest.raises(RuntimeUnavailable, match="Cannot listen"):
            start_server(file, port=port)
        assert post(port, "/metrics", b"", token="wrong")[0] == 401
        assert b'status="413"' in post(port, "/metrics", b"")[1]
        assert post(port, "/predict", b'{"inputs": {"input_ids": [[1, "a"]]}}')[0] == 400
        assert post(port, "/nothing", b"{}")[0] == 404
        slow.close()
    finally:
        stop_server()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
