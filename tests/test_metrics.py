"""Metrics of real servers, scraped over HTTP: what was sent is what is counted, alone and combined."""

import asyncio
import base64
import logging
import pickle
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from conftest import MODEL, edit_manifest, holding, running
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from test_parity import change_weight

from protos import classifier_pb2 as pb
from protos import open_inference as oip
from serving.errors import StartupError
from serving.metrics import MAX_REASON, Endpoint, render
from serving.repository import State
from serving.snapshot import Key, Process, RunsOn, Snapshot, Version, combine, ended
from serving.statistics import DROP_REASONS, DURATION_BOUNDS_NS, Histogram, Rpcs, Statistics, merge

ROOT = Path(__file__).parents[1]
IMAGES = np.zeros((4, 1, 28, 28), np.uint8)
PATIENCE_S = 20.0
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
SERVICES = ("classifier.v1.Classifier", "inference.GRPCInferenceService")


class Scraped:
    """The samples of one scrape, asked for by name and labels."""

    def __init__(self, text: str, parser: Callable = parse):
        self.families: list[Metric] = list(parser(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def all(self, name: str, **labels: str) -> dict[tuple[str, ...], float]:
        """The values of all series with these labels, by the values of their others in the order of their names."""
        found = {}
        for sample in self.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                found[tuple(sample.labels[key] for key in sorted(sample.labels) if key not in labels)] = sample.value
        return found

    def one(self, name: str, **labels: str) -> float:
        (value,) = self.all(name, **labels).values()
        return value


def get(address: str, path: str = "/metrics", accept: str = "") -> tuple[int, str, str]:
    """Status, content type and body."""
    request = urllib.request.Request(f"http://{address}{path}", headers={"Accept": accept} if accept else {})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return response.status, response.headers["Content-Type"], response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def scrape(address: str) -> Scraped:
    status, _, text = get(address)
    assert status == 200
    return Scraped(text)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what has been set going to become true."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.01)


def infer_request(rows: int, model: str = MODEL, **parameters: int) -> bytes:
    request = oip.ModelInferRequest(model_name=model)
    request.inputs.add(name="image", datatype="UINT8", shape=(rows, 1, 28, 28))
    request.raw_input_contents.append(IMAGES[:rows].tobytes())
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    return request.SerializeToString()


def code_of(call: Callable[[], object]) -> str:
    try:
        call()
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


@pytest.fixture
def server(repository):
    with running(repository, metrics_port=0) as server:
        yield server


@pytest.fixture
def metrics(server) -> str:
    return server.server.metrics_address


# --- what was sent is what is counted


def test_every_request_is_counted_once_and_where_it_belongs(server, metrics):
    with grpc.insecure_channel(server.address) as channel:
        infer = channel.unary_unary(oip.RPCS["ModelInfer"].path)
        predict = channel.unary_unary("/classifier.v1.Classifier/Predict")
        for rows in (1, 1, 3):
            infer(infer_request(rows))
        predict(pb.PredictRequest(raw=pb.RawImages(pixels=IMAGES[:2].tobytes())).SerializeToString())
        wrong_shape = pb.PredictRequest(raw=pb.RawImages(pixels=b"no picture")).SerializeToString()
        assert code_of(lambda: predict(wrong_shape)) == "INVALID_ARGUMENT"
        assert code_of(lambda: infer(infer_request(1, timeout=-1))) == "INVALID_ARGUMENT"
        assert code_of(lambda: infer(infer_request(1, "cats"))) == "NOT_FOUND"
        assert code_of(lambda: infer(b"\xff" * 9)) == "INVALID_ARGUMENT"
        stream = channel.stream_stream(oip.RPCS["ModelStreamInfer"].path)
        answers = list(stream(iter([infer_request(2), infer_request(1, "cats"), infer_request(1, timeout=-1)])))
        assert len(answers) == 3
        classify = channel.stream_stream("/classifier.v1.Classifier/PredictStream")
        assert len(list(classify(iter([wrong_shape])))) == 1
        answer = channel.unary_unary(oip.RPCS["ModelStatistics"].path)(b"")
        (triton,) = oip.ModelStatisticsResponse.FromString(answer).model_stats

    got = scrape(metrics)
    oip_service = "inference.GRPCInferenceService/"
    assert got.all("parityserve_rpcs_total") == {
        ("OK", f"{oip_service}ModelInfer"): 3,
        ("INVALID_ARGUMENT", f"{oip_service}ModelInfer"): 2,
        ("NOT_FOUND", f"{oip_service}ModelInfer"): 1,
        ("OK", f"{oip_service}ModelStreamInfer"): 1,
        ("OK", f"{oip_service}ModelStatistics"): 1,
        ("OK", "classifier.v1.Classifier/Predict"): 1,
        ("INVALID_ARGUMENT", "classifier.v1.Classifier/Predict"): 1,
        ("OK", "classifier.v1.Classifier/PredictStream"): 1,
    }
    assert got.all("parityserve_stream_errors_total") == {
        ("NOT_FOUND", f"{oip_service}ModelStreamInfer"): 1,
        ("INVALID_ARGUMENT", f"{oip_service}ModelStreamInfer"): 1,
        ("INVALID_ARGUMENT", "classifier.v1.Classifier/PredictStream"): 1,
    }
    version = {"model": MODEL, "version": "1"}
    assert got.all("parityserve_requests_total", **version) == {("success",): 5, ("failure",): 4}
    assert got.all("parityserve_requests_dropped_total", **version) == {(reason,): 0 for reason in DROP_REASONS}

    runs, rows = triton.execution_count, triton.inference_count
    assert rows == 1 + 1 + 3 + 2 + 2
    assert got.one("parityserve_batch_size_count", **version) == runs == 5
    assert got.one("parityserve_batch_size_sum", **version) == rows
    small = got.all("parityserve_batch_size_bucket", **version)
    assert [small[le,] for le in ("1.0", "2.0", "4.0", "+Inf")] == [2, 4, 5, 5]
    stats = triton.inference_stats
    assert (stats.success.count, stats.fail.count) == (5, 4)
    for name, count, ns in (
        ("request", stats.success.count, stats.success.ns),
        ("queue", stats.queue.count, stats.queue.ns),
        (
            "compute",
            runs,
            sum(b.compute_input.ns + b.compute_infer.ns + b.compute_output.ns for b in triton.batch_stats),
        ),
    ):
        assert got.one(f"parityserve_{name}_duration_seconds_count", **version) == count
        assert got.one(f"parityserve_{name}_duration_seconds_sum", **version) == ns / 1e9
        buckets = got.all(f"parityserve_{name}_duration_seconds_bucket", **version)
        assert list(buckets) == [
            (f"{bound / 1e9:g}" if bound < 10**9 else f"{bound / 1e9:.1f}",) for bound in DURATION_BOUNDS_NS
        ] + [("+Inf",)]
        assert list(buckets.values()) == sorted(buckets.values())
        assert buckets["+Inf",] == count
    stages = got.all("parityserve_request_stage_seconds_total", **version)
    parts = {
        "queue": stats.queue,
        "compute_input": stats.compute_input,
        "compute_infer": stats.compute_infer,
        "compute_output": stats.compute_output,
    }
    assert stages == {(stage,): part.ns / 1e9 for stage, part in parts.items()}
    assert sum(part.ns for part in parts.values()) == stats.success.ns


def test_what_serves_is_shown(server, metrics):
    got = scrape(metrics)
    about = {"backend": "onnx", "device": "cpu", "provider": "CPUExecutionProvider", "verified": "true"}
    assert got.one("parityserve_model_info", model=MODEL, version="1", **about) == 1
    (status,) = server.server.repository.statuses()
    assert got.one("parityserve_golden_max_abs", model=MODEL) == status.served.golden.max_abs > 0
    assert got.one("parityserve_model_ready", model=MODEL) == got.one("parityserve_ready") == 1
    assert got.one("parityserve_workers") == 1
    assert got.one("process_resident_memory_bytes") > 50e6
    assert got.one("process_cpu_seconds_total") > 0
    assert got.one("process_open_fds") > 3
    assert time.time() - 24 * 3600 < got.one("process_start_time_seconds") < time.time()
    assert scrape(metrics).one("process_start_time_seconds") == got.one("process_start_time_seconds")
    assert get(metrics, "/ready")[::2] == (200, "ready\n")
    assert get(metrics, "/live")[::2] == (200, "live\n")


def test_a_version_that_may_not_be_served_is_shown_with_the_reason(tampered):
    shutil.copytree(tampered / MODEL, tampered / "changed")
    edit_manifest(tampered / "changed" / "1", model="changed")
    change_weight(tampered / "changed" / "1", 1.01)
    with running(tampered, metrics_port=0, models=(MODEL, "changed")) as server:
        metrics = server.server.metrics_address
        got = scrape(metrics)
        assert got.all("parityserve_model_ready") == {(MODEL, "1"): 1, ("changed", "1"): 0}
        ((model, reason, version),) = got.all("parityserve_model_load_failed")
        assert (model, version) == ("changed", "1")
        (status,) = [status for status in server.server.repository.statuses() if status.name == "changed"]
        assert reason.rstrip("…") in status.reason
        assert "the answers on cpu (CPUExecutionProvider) are not the trained model's" in reason
        assert got.one("parityserve_ready") == 0
        assert get(metrics, "/ready")[::2] == (503, "not ready\n")


def test_a_model_that_was_unloaded_is_not_shown(repository):
    with running(repository, metrics_port=0, model_control="explicit", models=(MODEL,)) as server:
        with grpc.insecure_channel(server.address) as channel:
            request = oip.RepositoryModelUnloadRequest(model_name=MODEL)
            channel.unary_unary(oip.RPCS["RepositoryModelUnload"].path)(request.SerializeToString())
        assert not [sample for sample in scrape(server.server.metrics_address).samples if "model" in sample.labels]


@pytest.fixture
def held(repository, monkeypatch):
    """A server whose model is held, with room for a few requests, and the backend."""
    with holding(repository, monkeypatch, metrics_port=0, max_queue=6) as both:
        yield both


def test_the_queue_and_what_is_dropped_from_it(held):
    server, backend = held
    metrics = server.server.metrics_address

    def dropped(reason: str) -> float:
        return scrape(metrics).one("parityserve_requests_dropped_total", reason=reason)

    def arrived() -> bool:
        return scrape(metrics).one("parityserve_queue_depth") == 4 or dropped("expired") == 1

    async def scenario() -> list[str]:
        async with grpc.aio.insecure_channel(server.address) as channel:
            infer = channel.unary_unary(oip.RPCS["ModelInfer"].path)
            calls = [infer(infer_request(1))]
            assert await asyncio.to_thread(backend.started.wait, PATIENCE_S)
            calls += [infer(infer_request(2)), infer(infer_request(4, timeout=60_000_000)), infer(infer_request(3))]
            await asyncio.to_thread(until, lambda: scrape(metrics).one("parityserve_queue_depth") == 3)
            assert scrape(metrics).one("parityserve_requests_running") == 1
            assert scrape(metrics).one("parityserve_queue_bytes") == (1 + 2 + 4 + 3) * 784
            calls += [infer(infer_request(1, timeout=1000))]
            await asyncio.to_thread(until, arrived)
            while not await asyncio.to_thread(dropped, "queue_full"):
                calls += [infer(infer_request(1))]
                await asyncio.wait({asyncio.ensure_future(calls[-1].code())}, timeout=0.2)
            calls[3].cancel()
            await asyncio.sleep(0.01)  # the timeout, 1 ms, must pass while its request waits
            backend.released.set()
            return [(await call.code()).name for call in calls]

    codes = asyncio.run(scenario())
    assert codes[:5] == ["OK", "OK", "OK", "CANCELLED", "DEADLINE_EXCEEDED"]
    assert "RESOURCE_EXHAUSTED" in codes
    until(lambda: sum(scrape(metrics).all("parityserve_requests_total").values()) == len(codes))
    got = scrape(metrics)
    refusals = codes.count("RESOURCE_EXHAUSTED")
    want = {"queue_full": refusals, "queue_bytes": 0, "expired": 1, "cancelled": 1}
    assert got.all("parityserve_requests_dropped_total", model=MODEL, version="1") == {
        (reason,): count for reason, count in want.items()
    }
    assert got.one("parityserve_requests_total", outcome="success") == codes.count("OK")
    assert got.one("parityserve_requests_total", outcome="failure") == refusals + 2
    for name in ("queue_depth", "requests_running", "queue_bytes"):
        assert got.one(f"parityserve_{name}") == 0
    for code in ("OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"):
        assert got.one("parityserve_rpcs_total", code=code) == codes.count(code)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_stream_counts_what_is_refused_and_what_its_caller_left_once(held, prepared):
    """Of ten requests one runs, five wait, and four are refused; then the caller goes."""
    server, backend = held
    metrics = server.server.metrics_address
    with grpc.insecure_channel(server.address) as channel:
        if prepared:
            backend.released.set()
            channel.unary_unary(oip.RPCS["ModelInfer"].path)(infer_request(1))
            backend.released.clear()
        before = scrape(metrics).one("parityserve_requests_total", outcome="success")
        backend.started.clear()

        def requests():
            yield infer_request(1)
            assert backend.started.wait(PATIENCE_S)  # or more of them may run together
            yield from [infer_request(1)] * 9

        call = channel.stream_stream(oip.RPCS["ModelStreamInfer"].path)(requests())
        until(lambda: scrape(metrics).one("parityserve_requests_total", outcome="failure") == 4)
        assert scrape(metrics).one("parityserve_requests_dropped_total", reason="queue_full") == 4
        assert scrape(metrics).one("parityserve_stream_errors_total", code="RESOURCE_EXHAUSTED") == 4
        call.cancel()
        until(lambda: scrape(metrics).one("parityserve_requests_total", outcome="failure") == 10)
        backend.released.set()
        until(lambda: scrape(metrics).one("parityserve_requests_dropped_total", reason="cancelled") == 5)
        until(lambda: scrape(metrics).one("parityserve_batch_size_count") == before + 1)
    assert scrape(metrics).one("parityserve_requests_total", outcome="failure") == 10
    assert scrape(metrics).one("parityserve_requests_total", outcome="success") == before
    assert (
        scrape(metrics).one("parityserve_rpcs_total", method=f"{oip.SERVICE}/ModelStreamInfer", code="CANCELLED") == 1
    )


def test_a_run_counts_though_nobody_waits_for_it_any_more(held):
    server, backend = held
    metrics = server.server.metrics_address
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(oip.RPCS["ModelInfer"].path).future(infer_request(3))
        assert backend.started.wait(PATIENCE_S)
        call.cancel()
        until(lambda: scrape(metrics).one("parityserve_requests_total", outcome="failure") == 1)
        backend.released.set()
        until(lambda: scrape(metrics).one("parityserve_batch_size_count") == 1)
        answer = channel.unary_unary(oip.RPCS["ModelStatistics"].path)(b"")
    (triton,) = oip.ModelStatisticsResponse.FromString(answer).model_stats
    assert (triton.inference_count, triton.execution_count) == (3, 1)
    assert [(batch.batch_size, batch.compute_infer.count) for batch in triton.batch_stats] == [(3, 1)]
    got = scrape(metrics)
    assert got.one("parityserve_batch_size_sum") == 3
    assert got.one("parityserve_requests_total", outcome="success") == 0
    assert got.one("parityserve_requests_dropped_total", reason="cancelled") == 0  # it did run


# --- the endpoint


def test_openmetrics_is_given_to_those_who_ask(server, metrics):
    status, content_type, text = get(metrics, accept=OPENMETRICS)
    assert status == 200
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")
    got = Scraped(text, parse_openmetrics)
    assert got.one("parityserve_model_ready", model=MODEL) == 1
    plain = get(metrics)
    assert plain[1].startswith("text/plain; version=0.0.4")
    assert {sample.name for sample in got.samples} == {sample.name for sample in Scraped(plain[2]).samples}


def test_other_paths_are_not_found(metrics):
    assert get(metrics, "/")[::2] == (404, "not found; there are /metrics, /live and /ready\n")
    assert get(metrics, "/metrics?name=x")[0] == 200


def test_without_a_port_there_are_no_metrics(repository):
    with running(repository) as server:
        assert server.server.metrics_address is None
        assert "metrics" not in {thread.name for thread in threading.enumerate()}


def test_a_port_in_use_is_told():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            StartupError, match=rf"cannot listen on 127.0.0.1:{port} for metrics: Address already in use"
        ):
            Endpoint("127.0.0.1", port, lambda: Snapshot(True, 1))
    with pytest.raises(
        StartupError, match=r"cannot listen on nowhere.invalid:0 for metrics: .+ with --metrics-port and"
    ):
        Endpoint("nowhere.invalid", 0, lambda: Snapshot(True, 1))


def test_the_server_does_not_start_on_a_metrics_port_in_use(repository):
    with running(repository, metrics_port=0) as server:
        taken = server.server.metrics_address.rpartition(":")[2]
        with (
            pytest.raises(StartupError, match="choose another with --metrics-port"),
            running(repository, metrics_port=int(taken)),
        ):
            pass
        assert get(server.server.metrics_address)[0] == 200


def test_a_failing_snapshot_is_an_internal_error_and_the_next_may_succeed(caplog):
    snapshots = iter([ValueError("secret"), Snapshot(ready=False, workers=2)])

    def snapshot() -> Snapshot:
        found = next(snapshots)
        if isinstance(found, Exception):
            raise found
        return found

    endpoint = Endpoint("127.0.0.1", 0, snapshot)
    try:
        with caplog.at_level(logging.ERROR, "serving.metrics"):
            assert get(endpoint.address)[::2] == (500, "internal error\n")
        assert "secret" in caplog.text
        assert scrape(endpoint.address).one("parityserve_workers") == 2
    finally:
        endpoint.close()
    with pytest.raises(urllib.error.URLError):
        get(endpoint.address)


def test_a_stopping_server_is_not_ready_and_still_tells_why(held):
    server, backend = held
    metrics = server.server.metrics_address
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(oip.RPCS["ModelInfer"].path).future(infer_request(1))
        assert backend.started.wait(PATIENCE_S)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        until(lambda: get(metrics, "/ready")[0] == 503)
        assert scrape(metrics).one("parityserve_model_ready") == 1
        backend.released.set()
        assert call.result(PATIENCE_S)
        stopping.join()


# --- statistics


def test_a_duration_is_counted_in_the_first_bucket_that_holds_it():
    histogram = Histogram()
    for ns in (0, 100_000, 100_001, 10**10, 10**10 + 1):
        histogram.add(ns)
    assert histogram.buckets == [2, 1, *[0] * 13, 1, 1]
    assert (histogram.count, histogram.ns) == (5, 2 * 10**10 + 200_002)
    assert (DURATION_BOUNDS_NS[0], DURATION_BOUNDS_NS[-1]) == (10**5, 10**10)


@dataclass
class Stages:
    """When a request went through the stages, as its answer has it."""

    rows: int
    queued_ns: int
    taken_ns: int
    assembled_ns: int
    computed_ns: int


def counted(seed: int) -> Statistics:
    """Statistics of a made-up history."""
    rng, statistics = random.Random(seed), Statistics()
    for _ in range(200):
        times = sorted(time.monotonic_ns() - rng.randrange(10**10) for _ in range(5))
        rows = rng.choice((1, 2, 1500))
        statistics.succeeded(times[0], Stages(rows, *times[1:]))
        statistics.executed(rows, *(rng.randrange(10**8) for _ in range(3)))
        statistics.failed(times[0])
        statistics.dropped(rng.choice(DROP_REASONS))
    return statistics


def test_merged_statistics_are_the_sums():
    one, two = counted(1), counted(2)
    both = merge([one, two])
    assert merge([]) == Statistics()
    assert both == merge([two, one]) == merge([merge([one]), pickle.loads(pickle.dumps(two))])
    assert both.success.count == both.queue.count == both.runs.count == both.fail.count == both.drops.total() == 400
    assert both.success.buckets == [sum(pair) for pair in zip(one.success.buckets, two.success.buckets, strict=True)]
    assert both.inference_count == one.inference_count + two.inference_count
    assert both.execution_count == 400
    assert both.last_inference_ms == max(one.last_inference_ms, two.last_inference_ms)
    parts = both.queue.ns + both.compute_input_ns + both.compute_infer_ns + both.compute_output_ns
    assert parts == both.success.ns == one.success.ns + two.success.ns
    before = pickle.dumps(one)
    both.executed(1, 1, 1, 1)  # shares nothing with its parts
    both.succeeded(0, Stages(1, 0, 0, 0, 0))
    assert pickle.dumps(one) == before


def test_statistics_that_were_pickled_go_on_counting():
    statistics = pickle.loads(pickle.dumps(counted(1)))
    statistics.executed(1, 1, 1, 1)
    statistics.dropped("expired")
    assert statistics.execution_count == 201


def test_what_another_thread_reads_meanwhile_never_falls():
    statistics = Statistics()

    def count():
        for number in range(30_000):
            statistics.executed(number % 500 + 1, 1, 2, 3)
            statistics.succeeded(0, Stages(1, 1, 2, 3, 4))
            statistics.dropped(DROP_REASONS[number % 4])

    counter = threading.Thread(target=count)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        counter.start()
        before, reads = merge([statistics]), 0
        while counter.is_alive():
            after = merge([statistics])
            for name in ("success", "queue", "runs"):
                one, two = getattr(before, name), getattr(after, name)
                assert two.ns >= one.ns
                assert all(late >= early for early, late in zip(one.buckets, two.buckets, strict=True))
            assert after.execution_count >= before.execution_count
            assert after.compute_output_ns >= before.compute_output_ns
            assert after.drops >= before.drops
            before, reads = after, reads + 1
    finally:
        sys.setswitchinterval(switch)
        counter.join()
    assert reads > 3
    assert statistics.runs.count == statistics.execution_count == statistics.success.count == 30_000


# --- several processes

WORKER = """
import asyncio, base64, pathlib, pickle, sys
import numpy as np
from serving.client import AsyncClient
from serving.config import ServerConfig
from serving.server import Server

async def main(repository, requests):
    server = Server(ServerConfig(repository=repository, port=0, device="cpu"))
    address = await server.start()
    await server.load()
    async with AsyncClient(address) as client:
        for number in range(requests):
            await client.predict([np.zeros((28, 28), np.uint8)] * (number + 1))
    print(base64.b64encode(pickle.dumps(server.snapshot())).decode())
    await server.stop()
    assert "prometheus_client" not in sys.modules  # not needed where nobody scrapes

asyncio.run(main(pathlib.Path(sys.argv[1]), int(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def workers(repository) -> list[Snapshot]:
    """Of two processes, of which one answered 3 requests and the other 5."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, repository, str(n)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for n in (3, 5)
    ]
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [pickle.loads(base64.b64decode(text)) for text in printed]


def scraped(snapshot: Snapshot) -> Scraped:
    return Scraped(render(snapshot)[0].decode())


def test_two_processes_are_counted_as_one(workers):
    key = Key(MODEL, "1")
    got = scraped(combine(workers))
    assert got.one("parityserve_workers") == 2
    assert got.one("parityserve_ready") == got.one("parityserve_model_ready") == got.one("parityserve_model_info") == 1
    assert got.one("parityserve_requests_total", outcome="success") == 8
    assert got.one("parityserve_rpcs_total", method="classifier.v1.Classifier/Predict") == 8
    assert got.one("parityserve_batch_size_sum") == 1 + 2 + 3 + 1 + 2 + 3 + 4 + 5
    sums = [worker.statistics[key].success.ns for worker in workers]
    assert got.one("parityserve_request_duration_seconds_sum") == sum(sums) / 1e9
    alone = [scraped(worker) for worker in workers]
    for le, count in got.all("parityserve_request_duration_seconds_bucket", model=MODEL, version="1").items():
        assert count == sum(one.one("parityserve_request_duration_seconds_bucket", le=le[0]) for one in alone)
    for name in ("process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total"):
        assert got.one(name) == pytest.approx(sum(one.one(name) for one in alone))
    assert got.one("process_start_time_seconds") == min(one.one("process_start_time_seconds") for one in alone)


def test_the_counts_of_a_process_that_has_ended_stay(workers):
    before = scraped(combine(workers))
    after = scraped(combine([workers[0], ended(workers[1])]))
    for name in (
        "parityserve_rpcs",
        "parityserve_requests",
        "parityserve_request_stage_seconds",
        "process_cpu_seconds",
    ):
        assert after.all(f"{name}_total") == before.all(f"{name}_total")
    assert after.all("parityserve_batch_size_bucket") == before.all("parityserve_batch_size_bucket")
    assert after.one("parityserve_workers") == 1
    assert after.one("process_resident_memory_bytes") == scraped(workers[0]).one("process_resident_memory_bytes")
    gone = scraped(combine([ended(worker) for worker in workers]))
    assert gone.all("parityserve_model_ready") == {}
    assert gone.one("parityserve_requests_total", outcome="success") == 8


def test_what_is_not_ready_in_one_process_is_not_ready(workers):
    key = Key(MODEL, "1")
    failed = replace(workers[1], ready=False, versions={key: Version(State.UNAVAILABLE, "broken " * 100)})
    for order in ([workers[0], failed], [failed, workers[0]]):
        got = scraped(combine(order))
        assert got.one("parityserve_ready") == got.one("parityserve_model_ready") == 0
        ((_, reason, _),) = got.all("parityserve_model_load_failed")
        assert reason == ("broken " * 100)[: MAX_REASON - 1] + "…"


def test_processes_that_run_on_different_devices_are_both_shown(workers):
    key = Key(MODEL, "1")
    gpu = Version(
        State.READY, "", frozenset({RunsOn("onnx", "CUDAExecutionProvider", "cuda:0", True)}), 1e-4, 2, 1, 2352
    )
    got = scraped(combine([workers[0], replace(workers[1], versions={key: gpu})]))
    assert set(got.all("parityserve_model_info", model=MODEL, version="1", backend="onnx", verified="true")) == {
        ("cpu", "CPUExecutionProvider"),
        ("cuda:0", "CUDAExecutionProvider"),
    }
    assert got.one("parityserve_golden_max_abs") == 1e-4
    assert [got.one(f"parityserve_{name}") for name in ("queue_depth", "requests_running", "queue_bytes")] == [
        2,
        1,
        2352,
    ]


# --- the documentation


def test_the_documentation_lists_every_metric_and_no_other():
    """Its name, type and labels, of a snapshot in which everything occurs."""
    key = Key("m", "1")
    version = Version(State.UNAVAILABLE, "broken", frozenset({RunsOn("onnx", "CPU", "cpu", True)}), 1e-6)
    rpcs = Rpcs()
    rpcs.ended["s/M", "OK"] = rpcs.stream_errors["s/M", "INTERNAL"] = 1
    everything = Snapshot(True, 1, {key: version}, {key: counted(1)}, rpcs, Process(1.0, 1, 1, 1.0))
    exposed = {}
    for family in scraped(everything).families:
        labels = set().union(*(sample.labels for sample in family.samples)) - {"le"}
        name = f"{family.name}_total" if family.type == "counter" else family.name
        exposed[name] = (family.type, labels)
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (gauge|counter|histogram) \| (.*?) ?\| .+ \|$", text, re.MULTILINE)
    listed = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(rows) == len(listed) > 20
    assert listed == exposed
    for name in set(re.findall(r"\b(?:parityserve|process)_[a-z_]+", text)):
        assert re.sub(r"_(bucket|count|sum)$", "", name) in exposed or name in exposed, f"{name} is not a metric"
