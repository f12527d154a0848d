"""Several processes on one port: real supervisors, workers, signals and connections."""

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from conftest import MODEL, edit_manifest, wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_cli import ROOT, command
from test_metrics import scrape
from test_parity import change_weight
from test_robustness import INFER, infer_request

from protos import open_inference as pb
from serving.client import Client
from serving.config import ServerConfig
from serving.errors import StartupError
from serving.machine import reserved, usable_cores, worker_count

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
PATIENCE_S = 60.0
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux spreads connections over processes")


class Supervised:
    """A supervisor process, and what it and its workers log."""

    def __init__(self, *words: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serving", "serve", "--port", "0", "--device", "cpu", *map(str, words)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""
        self._ended = False
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._more:
                self.log += line
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def logged(self, pattern: str, times: int = 1) -> list[str]:
        """Wait until a pattern has been logged so many times; its first group, each time."""
        with self._more:
            self._more.wait_for(lambda: self._ended or len(re.findall(pattern, self.log)) >= times, PATIENCE_S)
            found = re.findall(pattern, self.log)
        assert len(found) >= times, f"not logged: {pattern}\n{self.log}"
        return found

    @property
    def address(self) -> str:
        return self.logged(r" READY on (\S+)")[0]

    def workers(self, times: int = 2) -> list[int]:
        """The workers' process ids, in the order of their start."""
        return [int(pid) for pid in self.logged(r"worker \d \(pid (\d+)\) started", times)]

    def end(self) -> int:
        """Wait for its end; returns the exit code."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join()
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()  # the workers notice, and end the log
        self.process.wait()
        self._reader.join(PATIENCE_S)
        self.process.stderr.close()


@contextlib.contextmanager
def supervised(*words: object) -> Iterator[Supervised]:
    server = Supervised(*words)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def connections(address: str, count: int) -> Iterator[list[grpc.Channel]]:
    """So many that each of two workers has some of them, but for one time in 2 ** (count - 1)."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(grpc.insecure_channel(address, OWN_CONNECTION)) for _ in range(count)]


def rpc(channel: grpc.Channel, method: str, **fields: object):
    request = getattr(pb, f"{method}Request")(**fields)
    answer = channel.unary_unary(pb.RPCS[method].path)(request.SerializeToString(), timeout=PATIENCE_S)
    return getattr(pb, f"{method}Response").FromString(answer)


def version(channel: grpc.Channel, images: np.ndarray) -> str:
    """The version that answers."""
    answer = channel.unary_unary(INFER)(infer_request(images[:1]), timeout=PATIENCE_S)
    return pb.ModelInferResponse.FromString(answer).model_version


def publish(repository: Path, number: int) -> None:
    """Another version of the model, of the first one's files, appears."""
    draft = repository / MODEL / ".draft"
    shutil.copytree(repository / MODEL / "1", draft)
    edit_manifest(draft, version=number)
    draft.rename(repository / MODEL / str(number))


def health(channel: grpc.Channel, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_S).status


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and is not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def connected(pid: int, port: int) -> int:
    """How many connections to a port a process has accepted."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    established = {f"socket:[{line[9]}]" for line in lines if line[1].endswith(f":{port:04X}") and line[3] == "01"}
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += str(entry.readlink()) in established
    return count


# --- the port, and how many


@pytest.mark.parametrize("reuse", [0, 1])
def test_a_port_of_another_server_is_an_error_even_where_that_would_share_it(reuse, repository):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = command("serving", "serve", "--repository", repository, "--workers", "2", "--port", port)
    assert done.returncode == 1
    assert done.stderr.endswith(
        f"error: cannot listen on 127.0.0.1:{port}: in use, or not this machine's address; "
        "choose another with --port or --host\n"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::", "::1"])
def test_a_reserved_port_is_for_servers_that_share_it_and_for_no_other(host):
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")
    config = ServerConfig(host=host, port=0)
    with reserved(config) as port:
        assert port > 0
        again = config.model_copy(update={"port": port})
        with pytest.raises(StartupError, match=f":{port}: in use"), reserved(again):
            pass
        target = f"127.0.0.1:{port}" if host in ("0.0.0.0", "localhost") else again.address
        with grpc.insecure_channel(target) as channel:
            for _ in range(2):  # servers come and go
                server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 1)])
                assert server.add_insecure_port(again.address) == port
                server.start()
                call = channel.unary_unary("/none")
                assert code_of(lambda call=call: call(b"", wait_for_ready=True)) is grpc.StatusCode.UNIMPLEMENTED
                server.stop(None).wait()
        alone = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
        with pytest.raises(RuntimeError):
            alone.add_insecure_port(again.address)
    with reserved(again) as port:
        assert port == again.port


def test_an_address_of_another_machine_is_an_error():
    with (
        pytest.raises(StartupError, match=r"cannot listen on 192\.0\.2\.1:0: "),
        reserved(ServerConfig(host="192.0.2.1", port=0)),
    ):
        pass


def test_usable_cores_are_those_of_the_affinity_and_the_quotas(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    own = tmp_path / "own"
    group = tmp_path / "groups" / "service" / "ours"
    group.mkdir(parents=True)
    own.write_text("12:cpu:/elsewhere\n0::/service/ours\n")

    def cores() -> int:
        return usable_cores(tmp_path / "groups", own)

    assert cores() == 8
    (group / "cpu.max").write_text("max 100000\n")
    assert cores() == 8
    (group.parent / "cpu.max").write_text("350000 100000\n")
    assert cores() == 3
    (group / "cpu.max").write_text("50000 100000\n")
    assert cores() == 1
    version_1 = tmp_path / "version_1"
    (version_1 / "cpu").mkdir(parents=True)
    (version_1 / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, want in [("-1", 8), ("400000", 4)]:
        (version_1 / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        assert usable_cores(version_1, own) == want


def test_auto_is_one_worker_for_each_core_that_its_threads_leave(monkeypatch):
    monkeypatch.setattr("serving.machine.usable_cores", lambda: 8)
    for settings, want in [({}, 8), ({"threads": 3}, 2), ({"threads": 9}, 1), ({"device": "cuda:1"}, 1)]:
        assert worker_count(ServerConfig(**{"workers": "auto", "device": "cpu", **settings})) == want
    assert worker_count(ServerConfig()) == 1
    assert worker_count(ServerConfig(workers=3)) == 3


@pytest.mark.parametrize("number", ["0", "many", "257"])
def test_a_wrong_number_of_workers_is_refused(number):
    done = command("serving", "serve", "--workers", number)
    assert done.returncode == 2
    assert re.search(rf"error: --workers: .*got '{number}'", done.stderr)


# --- all as one


def test_all_workers_answer_as_one(tampered, sample, reference):
    """Connections spread, statistics are sums, and what a client loads or unloads is so on every connection."""
    images = sample[1].images.numpy()
    shutil.copytree(tampered / MODEL / "1", tampered / "other" / "1")
    edit_manifest(tampered / "other" / "1", model="other")
    words = ("--repository", tampered, "--model-control", "explicit", "--model", MODEL, "--workers", "2")
    with supervised(*words) as server, connections(server.address, 24) as channels:
        calls = [channel.unary_unary(INFER) for channel in channels]
        for rows in (1, 2, 3):
            for call in calls:
                answer = pb.ModelInferResponse.FromString(call(infer_request(images[:rows])))
                logits = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(rows, 10)
                assert logits.argmax(1).tolist() == reference[:rows].argmax(1).tolist()
        port = int(server.address.rpartition(":")[2])
        shares = [connected(pid, port) for pid in server.workers()]
        assert sum(shares) == 24
        assert min(shares) > 0
        for channel in channels[:8]:
            (counted,) = rpc(channel, "ModelStatistics").model_stats
            assert (counted.inference_stats.success.count, counted.inference_count) == (24 * 3, 24 * 6)
            assert {batch.batch_size: batch.compute_infer.count for batch in counted.batch_stats} == {
                1: 24,
                2: 24,
                3: 24,
            }
            parts = [
                getattr(counted.inference_stats, stage)
                for stage in ("queue", "compute_input", "compute_infer", "compute_output")
            ]
            assert sum(part.ns for part in parts) == counted.inference_stats.success.ns

        def infer_other(channel: grpc.Channel) -> grpc.StatusCode:
            request = pb.ModelInferRequest.FromString(infer_request(images[:1]))
            request.model_name = "other"
            return code_of(lambda: channel.unary_unary(INFER)(request.SerializeToString()))

        with ThreadPoolExecutor(4) as pool:
            for action, code, status in [
                ("Load", grpc.StatusCode.OK, SERVING),
                ("Unload", grpc.StatusCode.NOT_FOUND, NOT_SERVING),
                ("Load", grpc.StatusCode.OK, SERVING),
            ]:
                rpc(channels[0], f"RepositoryModel{action}", model_name="other")
                assert {infer_other(channel) for channel in channels} == {code}
                assert {health(channel, "other") for channel in channels} == {status}
                assert {rpc(c, "ModelReady", name="other").ready for c in channels} == {status == SERVING}
            # Many at once end in one state, the same everywhere.
            turns = ["Load", "Unload"] * 3
            list(pool.map(lambda turn: rpc(channels[1], f"RepositoryModel{turn}", model_name="other"), turns))
            assert len({infer_other(channel) for channel in channels}) == 1
        # A load that fails is the same error as with one process, and changes nothing anywhere.
        change_weight(tampered / MODEL / "1", 1.01)
        with pytest.raises(grpc.RpcError) as raised:
            rpc(channels[0], "RepositoryModelLoad", model_name=MODEL)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert raised.value.details().startswith(f"failed to load '{MODEL}', ")
        assert {code_of(lambda call=call: call(infer_request(images[:1]))) for call in calls} == {grpc.StatusCode.OK}
        server.process.terminate()
        assert server.end() == 0
    assert "Traceback" not in server.log


def test_a_worker_that_cannot_load_what_others_load_is_replaced_by_one_that_serves_it(tampered, sample):
    images = sample[1].images.numpy()
    words = ("--repository", tampered, "--model-control", "explicit", "--model", MODEL, "--workers", "2")
    with supervised(*words) as server, connections(server.address, 16) as channels:
        publish(tampered, 2)
        sick = server.workers()[1]
        _, hard = resource.prlimit(sick, resource.RLIMIT_NOFILE)
        for channel in channels:
            assert health(channel) == SERVING
        resource.prlimit(sick, resource.RLIMIT_NOFILE, (3, hard))  # it can open no file any more
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(grpc.RpcError) as raised:
            rpc(channels[0], "RepositoryModelLoad", model_name=MODEL)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert re.search(rf"worker 2 \(pid {sick}\) is replaced, all others succeeded", raised.value.details())
        server.logged(r"worker 2 \(pid \d+\) READY", 2)
        successor = server.workers(3)[2]
        with connections(server.address, 16) as fresh:
            assert {version(channel, images) for channel in fresh} == {"2"}
            assert connected(successor, port) > 0


def test_the_server_is_ready_when_every_worker_is_and_again_when_one_was_replaced(tampered, sample):
    images = sample[1].images.numpy()
    with supervised("--repository", tampered, "--workers", "2") as server:
        _, slow = server.workers()
        os.kill(slow, signal.SIGSTOP)
        (port,) = server.logged(r"2 workers on 127\.0\.0\.1:(\d+)")
        server.logged(r"worker 1 \(pid \d+\) READY")
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert health(channel) == health(channel, MODEL) == NOT_SERVING
            assert not rpc(channel, "ServerReady").ready
            assert not rpc(channel, "ModelReady", name=MODEL).ready
            assert " READY on " not in server.log
            os.kill(slow, signal.SIGCONT)
            assert server.address == f"127.0.0.1:{port}"
            assert health(channel) == health(channel, MODEL) == SERVING  # the READY line is true at once
            assert rpc(channel, "ServerReady").ready
            assert rpc(channel, "ModelReady", name=MODEL).ready
            # This connection is the first worker's: there was no other when it was made.
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            watch_model = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=MODEL))
            assert next(watch).status == next(watch_model).status == SERVING
            publish(tampered, 2)  # which no server of this kind follows, so neither does a successor
            os.kill(slow, signal.SIGKILL)
            assert next(watch).status == NOT_SERVING
            assert rpc(channel, "ModelReady", name=MODEL).ready
            channel.unary_unary(INFER)(infer_request(images[:1]))
            assert next(watch).status == SERVING
            watch_model.cancel()
        server.logged(rf"ERROR serving.supervisor: worker 2 \(pid {slow}\) was ended by signal 9; it is replaced at")
        server.logged(r"worker 2 \(pid \d+\) READY", 2)
        with connections(server.address, 12) as channels:
            assert {version(channel, images) for channel in channels} == {"1"}


def test_metrics_are_those_of_all_workers_and_stay_when_one_is_replaced(repository, sample):
    images = sample[1].images.numpy()
    with supervised("--repository", repository, "--workers", "2", "--metrics-port", "0") as server:
        (metrics,) = server.logged(r"metrics on http://(\S+)/metrics")
        with connections(server.address, 16) as channels:
            assert {version(channel, images) for channel in channels} == {"1"}
            got = scrape(metrics)
            assert got.one("parityserve_requests_total", model=MODEL, outcome="success") == 16
            assert got.one("parityserve_batch_size_sum", model=MODEL) == 16
            assert (got.one("parityserve_workers"), got.one("parityserve_ready")) == (2, 1)
            resident = got.one("process_resident_memory_bytes")
            os.kill(server.workers()[0], signal.SIGKILL)
            server.logged(r"worker 1 \(pid \d+\) READY", 2)
        got = scrape(metrics)
        assert got.one("parityserve_requests_total", model=MODEL, outcome="success") == 16
        assert (got.one("parityserve_workers"), got.one("parityserve_ready")) == (2, 1)
        assert got.one("process_resident_memory_bytes") < 1.5 * resident
        server.process.terminate()
        assert server.end() == 0
    assert "Traceback" not in server.log


# --- death and the end


def test_a_worker_killed_under_load_costs_our_clients_nothing(repository, sample, reference):
    images, want = sample[1].images.numpy(), reference.argmax(1).tolist()
    many = np.concatenate([images] * 6)  # 700 KB, which gRPC itself would not send twice
    with supervised("--repository", repository, "--workers", "2") as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.address)) for _ in range(4)]
        stopped = threading.Event()
        answered = [0] * len(clients)

        def load(number: int) -> None:
            batch, classes = (many, want * 6) if number % 2 else (images[:5], want[:5])
            while not stopped.is_set():
                result = clients[number].predict(batch)
                assert [prediction.class_id for prediction in result.predictions] == classes
                answered[number] += 1

        def answer_more() -> None:
            before = list(answered)
            wait_until(lambda: all(now > then for now, then in zip(answered, before, strict=True)) or any_failed())

        with ThreadPoolExecutor(len(clients)) as pool:
            running = [pool.submit(load, number) for number in range(len(clients))]

            def any_failed() -> bool:
                return any(future.done() for future in running)

            try:
                for kills in (1, 2):
                    answer_more()
                    pids = [pid for pid in server.workers() if alive(pid)]
                    os.kill(pids[0], signal.SIGKILL)
                    server.logged(r"worker \d \(pid \d+\) READY", 2 + kills)
                    answer_more()
            finally:
                stopped.set()
            for future in running:
                future.result()  # raises what a client raised
        server.process.terminate()
        assert server.end() == 0
    assert len(re.findall(r"was ended by signal 9; it is replaced", server.log)) == 2


def test_sigterm_under_load_answers_what_was_accepted(repository, sample):
    """Sent to every process, as a service manager does; a Ctrl-C in a terminal is the same but for the signal."""
    images = np.concatenate([sample[1].images.numpy()] * 4)
    request = infer_request(images)
    with supervised("--repository", repository, "--workers", "2") as server, connections(server.address, 8) as channels:
        answered = [0] * len(channels)

        def load(number: int) -> tuple[grpc.StatusCode, str]:
            call = channels[number].unary_unary(INFER)
            while True:
                try:
                    response = pb.ModelInferResponse.FromString(call(request, timeout=PATIENCE_S))
                except grpc.RpcError as error:
                    return error.code(), error.details()
                assert len(response.raw_output_contents[0]) == len(images) * 40
                answered[number] += 1

        with ThreadPoolExecutor(2 * len(channels)) as pool:
            running = [pool.submit(load, number % len(channels)) for number in range(2 * len(channels))]
            wait_until(lambda: min(answered) > 1)
            for pid in (*server.workers(), server.process.pid):
                os.kill(pid, signal.SIGTERM)
            ends = {future.result() for future in running}
        assert server.end() == 0
    for code, details in ends:  # of requests that no worker took any more
        assert code is grpc.StatusCode.UNAVAILABLE
        assert not re.search("closed|reset|recvmsg|broken", details, re.IGNORECASE), details
    assert "Traceback" not in server.log


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_signal_cuts_the_waiting_short(repository, workers):
    with supervised("--repository", repository, "--workers", workers, "--drain-delay-s", "1000") as server:
        with grpc.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == SERVING
            server.process.send_signal(signal.SIGINT)
            assert next(watch).status == NOT_SERVING  # and the server answers on
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(grpc.RpcError):
                next(watch)
        assert server.end() == 0
    assert server.log.count("serving.server: stopped") == workers


def test_workers_end_when_their_supervisor_is_killed(repository, sample):
    with supervised("--repository", repository, "--workers", "2") as server:
        with Client(server.address) as client:
            client.predict(sample[1].images[:1].numpy())
            server.process.kill()
            wait_until(lambda: not any(alive(pid) for pid in server.workers()))
        port = int(server.address.rpartition(":")[2])
    assert len(re.findall("the supervisor has ended: this worker stops", server.log)) == 2
    with reserved(ServerConfig(port=port)) as again:
        assert again == port


def test_workers_are_forked_where_there_is_one_thread(repository):
    """Locks that other threads hold would stay locked in what is forked."""
    with supervised("--repository", repository, "--workers", "2") as server:
        assert server.address  # all have started
        parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in server.workers()}
        (forker,) = parents
        assert forker != server.process.pid
        assert len(list(Path(f"/proc/{forker}/task").iterdir())) == 1


def test_a_worker_that_cannot_be_replaced_yet_is_replaced_later(tampered, sample):
    images = sample[1].images.numpy()
    words = ("--repository", tampered, "--workers", "2", "--model-control", "poll", "--poll-s", "0.1")
    with supervised(*words) as server, connections(server.address, 8) as channels:
        supervisor = server.process.pid
        limit = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (3, limit[1]))  # it can open no socket any more
        os.kill(server.workers()[0], signal.SIGKILL)
        server.logged(r"worker 1 cannot be started \(.*Too many open files\); it is replaced in 0\.5 s")
        assert sum(code_of(lambda c=channel: health(c)) is grpc.StatusCode.OK for channel in channels) > 0
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, limit)
        server.logged(r"worker 1 \(pid \d+\) READY", 2)
        with connections(server.address, 12) as fresh:  # the successor follows the folder as the other does
            assert {version(channel, images) for channel in fresh} == {"1"}
            publish(tampered, 2)
            wait_until(lambda: {version(channel, images) for channel in fresh} == {"2"})


def test_a_server_whose_workers_cannot_start_says_why(tampered, tmp_path):
    change_weight(tampered / MODEL / "1", 1.01)
    for repository, why in [(tampered, "no model may be served"), (tmp_path / "none", "No such file or directory")]:
        done = command("serving", "serve", "--repository", repository, "--port", "0", "--workers", "2")
        assert done.returncode == 1
        assert re.search(rf"^error: .*{why}", done.stderr.splitlines()[-1])
        assert "Traceback" not in done.stderr


def test_a_server_whose_worker_dies_again_and_again_before_it_is_ready_gives_up(repository):
    with supervised("--repository", repository, "--workers", "2") as server:
        for times in (1, 2, 3):
            pid = int(server.logged(r"worker 2 \(pid (\d+)\) started", times)[-1])
            os.kill(pid, signal.SIGKILL)
        assert server.end() == 1
    assert re.search(r"worker 2 .* was ended by signal 9; it is replaced in 0\.5 s", server.log)
    assert re.search(
        rf"error: worker 2 \(pid {pid}\) was ended by signal 9 before it was READY, as all of 3 did", server.log
    )
