"""What is refused on gRPC's thread, and that it is counted as what the event loop refuses is."""

import math
import time
from concurrent.futures import Future

import grpc
import pytest
from conftest import MODEL, holding, wait_until
from google.rpc import error_details_pb2, status_pb2

from protos import open_inference as pb
from serving.scheduler import Limits, Queue, Request
from serving.services import overload
from serving.services.overload import Overload
from serving.statistics import Rpcs, Statistics

INFER = pb.RPCS["ModelInfer"].path
FULL = "model m: 2 requests wait already, the queue holds no more (--max-queue)"


class Served:
    def __init__(self, queue: Queue, statistics: Statistics) -> None:
        self.queue, self.statistics = queue, statistics


class Catalog:
    """One model with a queue for two requests."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.statistics = Statistics()
        self.queue = Queue("m", Limits(8, max_queue=2), self.statistics, lambda: self.now_ns)
        self.served = Served(self.queue, self.statistics)

    def wait(self) -> None:
        """One more request waits."""
        request = Request({}, 1, math.inf, self.now_ns)
        request.future = Future()
        self.queue.add(request)

    def refusal(self, coming: int):
        error = self.queue.refusal(coming)
        return error and (self.served, error)


class Gate:
    closed = False


@pytest.fixture
def looked(monkeypatch):
    """The loop needs to look at no queue."""
    monkeypatch.setattr(overload, "_LOOK_NS", 10**15)


def make(watched: object = None, max_queue: int = 2):
    catalog, rpcs, gate = Catalog(), Rpcs(), Gate()
    judge = Overload(catalog, rpcs, gate, max_queue, watched)
    return catalog, rpcs, gate, judge


def test_requests_on_their_way_to_the_queue_need_room_too(looked):
    catalog, _, _, judge = make()
    catalog.wait()
    assert judge.refuse(1, 0) is None
    assert judge.refuse(1, 1) is None  # the one that the loop is told of
    assert judge.refuse(1, 1).details == FULL
    catalog.wait()
    assert judge.refuse(0, 0).details == FULL
    catalog.queue.take()
    assert judge.refuse(0, 0).details == FULL  # those that run count
    assert judge.refuse(0, 0) is judge.refuse(0, 0)


def test_a_refusal_says_when_to_try_again(looked):
    catalog, _, _, judge = make()
    catalog.wait()
    catalog.wait()
    judge.refuse(0, 0)

    def retry_s() -> float:
        refusal = judge.refuse(0, 0)
        status = status_pb2.Status.FromString(dict(refusal.trailing_metadata)["grpc-status-details-bin"])
        assert (status.code, status.message) == (refusal.code.value[0], refusal.details)
        info = error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(info)
        return info.retry_delay.ToTimedelta().total_seconds()

    assert retry_s() == 0.01
    catalog.now_ns = 250_000_000
    assert retry_s() == 0.25


def test_the_loop_is_told_of_a_call_now_and_then(monkeypatch):
    catalog, _, _, judge = make()
    catalog.wait()
    catalog.wait()
    monkeypatch.setattr(overload, "_LOOK_NS", 50_000_000)
    assert judge.refuse(0, 0) is None
    start = time.monotonic()
    while judge.refuse(0, 0):
        assert time.monotonic() < start + 10
    assert time.monotonic() - start >= 0.04


def test_what_must_see_every_call_does(looked):
    catalog, _, _, judge = make(watched=object())
    catalog.wait()
    catalog.wait()
    assert judge.refuse(0, 0) is None
    assert judge.refuse(0, 0) is None
    assert judge.refuse(64, 0).details.startswith("more calls wait than the server can come to (--max-queue)")


def test_a_closed_gate_says_what_becomes_of_calls(looked):
    catalog, _, gate, judge = make()
    catalog.wait()
    catalog.wait()
    judge.refuse(0, 0)
    gate.closed = True
    assert judge.refuse(0, 0) is None


@pytest.mark.parametrize(("max_queue", "most"), [(2, 64), (100, 100)])
def test_so_many_events_may_wait_for_the_loop(max_queue, most):
    _, rpcs, _, judge = make(max_queue=max_queue)
    assert judge.refuse(most - 1, 0) is None
    refusal = judge.refuse(most, 0)
    assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    refusal.counted(INFER)
    assert rpcs.ended[INFER[1:], "RESOURCE_EXHAUSTED"] == 1


def test_a_server_refuses_and_counts(repository, monkeypatch, looked):
    with (
        holding(repository, monkeypatch, max_queue=1, drain_s=10.0) as (server, backend),
        grpc.insecure_channel(server.address) as channel,
    ):
        infer = channel.unary_unary(INFER)
        request = pb.ModelInferRequest(model_name=MODEL)
        request.inputs.add(name="image", datatype="UINT8", shape=[1, 1, 28, 28])
        request.raw_input_contents.append(bytes(784))
        first = infer.future(request.SerializeToString(), timeout=60)
        assert backend.started.wait(10)
        for _ in range(5):  # the first of them by the loop
            with pytest.raises(grpc.RpcError, match=f"model {MODEL}: 1 requests wait already") as refused:
                infer(b"not a request", timeout=10)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        (served,) = [status.served for status in server.server.repository.statuses()]
        wait_until(lambda: served.statistics.fail.count == 5)
        assert served.statistics.drops["queue_full"] == 5
        ended = server.server.snapshot().rpcs.ended
        assert ended[INFER[1:], "RESOURCE_EXHAUSTED"] == 5
        backend.released.set()
        assert first.result()
        assert infer(request.SerializeToString(), timeout=10)
