"""How a server stops: what runs is answered, what comes is sent elsewhere, the exit code is 0."""

import asyncio
import collections
import concurrent.futures
import contextlib
import gc
import os
import re
import signal
import threading
import time

import grpc
import pytest
from conftest import MODEL, Running, holding, running
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_cli import serving

from protos import open_inference as pb
from serving.config import ServerConfig
from serving.errors import StartupError
from serving.server import Server, serve
from serving.services.gate import STOPPING

INFER = pb.RPCS["ModelInfer"].path
STREAM = pb.RPCS["ModelStreamInfer"].path
READY = pb.RPCS["ServerReady"].path
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

# How a client learns that its call was never accepted: from us, or because nobody listens any more.
ELSEWHERE = re.compile(rf"{STOPPING}|failed to connect to all addresses")


def infer_request() -> bytes:
    request = pb.ModelInferRequest(model_name=MODEL)
    request.inputs.add(name="image", datatype="UINT8", shape=[1, 1, 28, 28])
    request.raw_input_contents.append(bytes(784))
    return request.SerializeToString()


class Load:
    """Clients that ask again and again until they are refused, and what they were told."""

    def __init__(self, address: str, clients: int) -> None:
        self.answered = 0
        self.ends: collections.Counter[tuple[grpc.StatusCode, str]] = collections.Counter()
        self.flowing = threading.Event()
        self._address = address
        self._clients = clients
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Load":
        self._thread.start()
        assert self.flowing.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    async def _run(self) -> None:
        own = [("grpc.use_local_subchannel_pool", 1)]  # a connection each
        channels = [grpc.aio.insecure_channel(self._address, own) for _ in range(4)]
        await asyncio.gather(*(self._ask(channels[number % 4]) for number in range(self._clients)))
        for channel in channels:
            await channel.close()

    async def _ask(self, channel: grpc.aio.Channel) -> None:
        call, request = channel.unary_unary(INFER), infer_request()
        try:
            while True:
                assert pb.ModelInferResponse.FromString(await call(request, timeout=60)).model_name == MODEL
                self.answered += 1
                if self.answered >= 500:
                    self.flowing.set()
        except grpc.aio.AioRpcError as error:
            self.ends[error.code(), error.details()] += 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_under_load_every_call_is_answered_or_sent_elsewhere(repository, number):
    with serving("--repository", repository, "--device", "cpu") as (process, address):
        with Load(address, clients=64) as load:
            process.send_signal(number)
        log = process.stderr.read()
        assert process.wait(30) == 0
    assert sum(load.ends.values()) == 64
    for code, details in load.ends:
        assert code is grpc.StatusCode.UNAVAILABLE, load.ends
        assert ELSEWHERE.match(details), load.ends
    assert "stopped" in log
    assert "Traceback" not in log


@pytest.fixture
def stopping(repository):
    """A server that was told to stop and has a long time for it: its address, and how to hurry it."""
    with running(repository, drain_delay_s=600, drain_s=600) as server, Stopping(server) as stopping:
        yield stopping


class Stopping:
    """Tell a server to stop, and later that there is no time for it."""

    def __init__(self, server: Running) -> None:
        self.address = server.address
        self._server = server

    def __enter__(self) -> "Stopping":
        self._hurry = asyncio.run_coroutine_threadsafe(_event(), self._server.loop).result(10)
        self._stop = asyncio.run_coroutine_threadsafe(self._server.server.stop(self._hurry), self._server.loop)
        return self

    def hurry(self) -> None:
        self._server.loop.call_soon_threadsafe(self._hurry.set)
        self._stop.result(60)

    def __exit__(self, *_: object) -> None:
        self.hurry()


async def _event() -> asyncio.Event:
    return asyncio.Event()


def test_a_server_that_stops_answers_on_and_is_not_ready(stopping):
    with grpc.insecure_channel(stopping.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=MODEL))
        while next(watch).status != NOT_SERVING:
            pass
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", MODEL, pb.SERVICE):
            assert check(health_pb2.HealthCheckRequest(service=service), timeout=10).status == NOT_SERVING
        assert pb.ServerReadyResponse.FromString(channel.unary_unary(READY)(b"", timeout=10)).ready is False
        answer = pb.ModelInferResponse.FromString(channel.unary_unary(INFER)(infer_request(), timeout=10))
        assert answer.model_name == MODEL
        stopping.hurry()
        with pytest.raises(grpc.RpcError) as raised:
            next(watch)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_open_streams_and_watchers_do_not_hold_a_server(repository):
    """What a stream has sent is answered, and then the stream ends, although its client sends more."""
    with running(repository, drain_s=600) as server, grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        ended = threading.Event()

        def requests():
            yield infer_request()
            ended.wait(60)

        answers = channel.stream_stream(STREAM)(requests())
        assert pb.ModelStreamInferResponse.FromString(next(answers)).infer_response.model_name == MODEL
        asyncio.run_coroutine_threadsafe(server.server.stop(), server.loop).result(120)
        with pytest.raises(grpc.RpcError) as raised:
            next(answers)
        ended.set()
        assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.UNAVAILABLE, STOPPING)
        statuses = []
        with pytest.raises(grpc.RpcError) as raised:
            statuses.extend(answer.status for answer in watch)
        assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.UNAVAILABLE, STOPPING)


def test_whoever_gets_an_answer_while_the_server_stops_is_told_to_ask_elsewhere(repository, monkeypatch):
    with (
        holding(repository, monkeypatch, drain_s=60) as (server, backend),
        grpc.insecure_channel(server.address) as channel,
    ):
        infer = channel.unary_unary(INFER)
        first = infer.future(infer_request(), timeout=60)
        assert backend.started.wait(10)
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(), server.loop)
        time.sleep(0.5)  # nobody calls meanwhile
        assert not stopping.done()
        backend.released.set()
        first.result()
        with pytest.raises(grpc.RpcError) as raised:
            infer(infer_request(), timeout=20)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert ELSEWHERE.match(raised.value.details())
        stopping.result(20)


def test_clients_that_do_not_mind_being_refused_do_not_hold_a_server(repository):
    with running(repository, drain_s=600) as server, concurrent.futures.ThreadPoolExecutor(8) as pool:
        stopped = threading.Event()

        def ask_on() -> None:
            with grpc.insecure_channel(server.address) as channel:
                infer = channel.unary_unary(INFER)
                while not stopped.is_set():
                    with contextlib.suppress(grpc.RpcError):
                        infer(infer_request(), timeout=10)

        asking = [pool.submit(ask_on) for _ in range(8)]
        try:
            asyncio.run_coroutine_threadsafe(server.server.stop(), server.loop).result(60)
        finally:
            stopped.set()
        for each in asking:
            each.result(20)


def test_a_watcher_that_leaves_harms_no_other(repository):
    with running(repository) as server, grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch
        stays, leaves = watch(health_pb2.HealthCheckRequest()), watch(health_pb2.HealthCheckRequest())
        assert next(stays).status == next(leaves).status == SERVING
        leaves.cancel()
        server.stop()
        assert next(stays).status == NOT_SERVING


def test_a_second_signal_ends_the_waiting(repository):
    words = ["--repository", repository, "--device", "cpu", "--drain-delay-s", "600", "--drain-s", "600"]
    with serving(*words) as (process, _):
        process.send_signal(signal.SIGTERM)
        for line in process.stderr:
            if "answering on for 600 s" in line:
                break
        process.send_signal(signal.SIGTERM)
        log = process.stderr.read()
        assert process.wait(60) == 0
    assert "stopped" in log
    assert "Traceback" not in log


@pytest.fixture
def own_signals():
    """A server in this process may handle signals: what did before it does again afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("fails", [False, True])
def test_a_server_asked_to_stop_while_it_starts_ends_quietly(repository, monkeypatch, caplog, fails):
    """Whether or not its start would have come to something."""
    ended = []

    async def load(_: Server) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(fails)
            if fails:
                raise StartupError("no model may be served") from None
            raise

    monkeypatch.setattr(Server, "load", load)
    serve(ServerConfig(repository=repository, port=0))
    gc.collect()
    assert ended == [fails]
    assert not [record for record in caplog.records if record.exc_info]
