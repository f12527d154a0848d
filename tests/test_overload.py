"""What is refused before it is read, and that it is counted as what is refused later."""

import math

import grpc
import pytest
from conftest import MODEL, holding
from google.rpc import error_details_pb2, status_pb2

from protos import open_inference as pb
from serving.request_queue import Limits, Queue, Request
from serving.services.overload import Overload
from serving.statistics import Rpcs, Statistics
from serving.tensors import Layout

INFER = pb.RPCS["ModelInfer"].path
FULL = "model m: 2 requests wait already, the queue holds no more (--max-queue)"


class Waiting:
    """Waits, or has left."""

    left = False

    def gone(self):
        return self.left

    def answered(self, request):
        """Nobody listens."""


class Served:
    """A model's statistics, and itself for a scheduler: what is asked of one is its queue."""

    def __init__(self, queue: Queue, statistics: Statistics) -> None:
        self.statistics = statistics
        self.scheduler = self
        self.queue = queue
        self.refusal = queue.refusal


class Catalog:
    """One model with a queue for two requests."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.soon = []  # what the event loop's next turn will call
        self.statistics = Statistics()
        self.queue = Queue("m", Limits(8, max_queue=2), self.statistics, lambda: self.now_ns)
        self.only = Served(self.queue, self.statistics)

    def wait(self) -> Waiting:
        """One more request waits."""
        waiter = Waiting()
        self.queue.add(Request(Layout([]), (), 1, math.inf, self.now_ns, waiter))
        return waiter

    def turn(self) -> None:
        """The event loop's next one."""
        while self.soon:
            self.soon.pop()()


class Gate:
    closed = False


def make(watched: object = None):
    catalog, rpcs, gate = Catalog(), Rpcs(), Gate()
    judge = Overload(catalog, rpcs, gate, watched, lambda: catalog.now_ns, catalog.soon.append)
    return catalog, rpcs, gate, judge


def test_requests_on_their_way_to_the_queue_need_room_too():
    catalog, rpcs, _, judge = make()
    catalog.wait()
    assert judge.refuse(INFER, 0) is None
    assert judge.refuse(INFER, 1).details == FULL
    catalog.wait()
    assert judge.refuse(INFER, 0).details == FULL
    catalog.queue.take()
    assert judge.refuse(INFER, 0).details == FULL  # those that run count
    assert judge.refuse(INFER, 0) is judge.refuse(INFER, 0)
    catalog.turn()
    assert rpcs.ended == {(INFER[1:], "RESOURCE_EXHAUSTED"): 5}
    assert catalog.statistics.drops == {"queue_full": 5}
    assert catalog.statistics.fail.count == 5


def test_what_is_refused_in_one_turn_is_counted_together_and_with_its_model():
    catalog, rpcs, _, judge = make()
    before, after = catalog, Catalog()
    for one in (before, after):
        one.wait()
        one.wait()
    for method, count in (("/a.Service/One", 2), ("/a.Service/Other", 1)):
        for _ in range(count):
            judge.refuse(method, 0)
    assert len(catalog.soon) == 1
    assert not rpcs.ended
    catalog.only = after.only  # the model is replaced
    judge.refuse("/a.Service/One", 0)
    catalog.turn()
    judge.refuse("/a.Service/One", 0)
    catalog.turn()
    assert rpcs.ended == {("a.Service/One", "RESOURCE_EXHAUSTED"): 4, ("a.Service/Other", "RESOURCE_EXHAUSTED"): 1}
    assert (before.statistics.fail.count, after.statistics.fail.count) == (3, 2)


def test_who_left_makes_room():
    catalog, rpcs, _, judge = make()
    catalog.wait().left = True
    catalog.wait()
    assert judge.refuse(INFER, 0) is None
    assert len(catalog.queue) == 1
    assert catalog.statistics.drops == {"cancelled": 1}
    assert not rpcs.ended


def test_a_refusal_says_when_to_try_again():
    catalog, _, _, judge = make()
    catalog.wait()
    catalog.wait()

    def retry_s() -> float:
        refusal = judge.refuse(INFER, 0)
        status = status_pb2.Status.FromString(dict(refusal.trailing_metadata)["grpc-status-details-bin"])
        assert (status.code, status.message) == (refusal.code.value[0], refusal.details)
        info = error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(info)
        return info.retry_delay.ToTimedelta().total_seconds()

    assert retry_s() == 0.01
    catalog.now_ns = 9_999_999
    assert retry_s() == 0.01  # one answer for all that come within a hundredth of a second
    catalog.now_ns = 250_000_000
    assert retry_s() == 0.25


def test_what_must_see_every_call_does():
    catalog, _, _, judge = make(watched=object())
    catalog.wait()
    catalog.wait()
    assert judge.refuse(INFER, 0) is None


def test_a_closed_gate_says_what_becomes_of_calls():
    catalog, _, gate, judge = make()
    catalog.wait()
    catalog.wait()
    gate.closed = True
    assert judge.refuse(INFER, 0) is None


def test_a_server_refuses_and_counts(repository, monkeypatch):
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
        for _ in range(5):
            with pytest.raises(grpc.RpcError, match=f"model {MODEL}: 1 requests wait already") as refused:
                infer(b"not a request", timeout=10)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        (served,) = [status.served for status in server.server.repository.statuses()]
        assert served.statistics.fail.count == 5
        assert served.statistics.drops["queue_full"] == 5
        ended = server.server.snapshot().rpcs.ended
        assert ended[INFER[1:], "RESOURCE_EXHAUSTED"] == 5
        backend.released.set()
        assert first.result()
        assert infer(request.SerializeToString(), timeout=10)
