"""The limits of messages and connections, over real ones."""

import grpc
import numpy as np
import pytest
from conftest import MODEL, running
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import open_inference as pb
from serving.client import Client, predict_request
from serving.errors import QueueFull

LIMIT = 5000
OWN = ("grpc.use_local_subchannel_pool", 1)  # a connection that no other test has pinged on


def infer_request(size: int) -> bytes:
    """A request of so many bytes exactly."""
    request = pb.ModelInferRequest(model_name=MODEL, raw_input_contents=[b""])
    request.raw_input_contents[0] = bytes(size - request.ByteSize() - 1)  # one more for the length
    assert request.ByteSize() == size
    return request.SerializeToString()


@pytest.fixture(scope="module")
def small(repository):
    with running(repository, max_message_bytes=LIMIT) as server:
        yield server.address


@pytest.mark.parametrize("streaming", [False, True])
def test_a_message_over_the_limit_is_told_which_option_it_is(small, streaming):
    path = pb.RPCS["ModelStreamInfer" if streaming else "ModelInfer"].path

    def call(size):
        request = infer_request(size)
        list(channel.stream_stream(path)(iter([request])) if streaming else [channel.unary_unary(path)(request)])

    with grpc.insecure_channel(small) as channel:
        for size in (LIMIT + 1, 2 * LIMIT):
            with pytest.raises(grpc.RpcError) as raised:
                call(size)
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert raised.value.details() == (
                f"got a message of {size} bytes, want at most {LIMIT} (--max-message-bytes)"
            )
        with pytest.raises(grpc.RpcError) as raised:
            call(2 * LIMIT + 1)  # gRPC's own, for what it will not even hold
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        if not streaming:
            with pytest.raises(grpc.RpcError) as raised:
                call(LIMIT)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # it was read


def test_the_client_raises_the_servers_text(small):
    with Client(small) as client, pytest.raises(QueueFull, match=r"want at most 5000 \(--max-message-bytes\)"):
        client.predict(np.zeros((7, 28, 28), np.uint8))
    assert len(predict_request(np.zeros((7, 28, 28), np.uint8)).SerializeToString()) > LIMIT


def watched(address: str, timeout_s: float, *options: tuple[str, int]) -> grpc.RpcError:
    """How a connection with nothing but one silent stream ends."""
    with grpc.insecure_channel(address, [OWN, *options]) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        with pytest.raises(grpc.RpcError) as raised:
            list(watch)
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert check.status == health_pb2.HealthCheckResponse.SERVING  # over another connection
    return raised.value


PINGS = (("grpc.keepalive_time_ms", 100), ("grpc.http2.max_pings_without_data", 0))


def test_who_pings_too_often_is_cut_off(repository):
    with running(repository) as server:
        ended = watched(server.address, 60, *PINGS)
    assert (ended.code(), ended.details()) == (grpc.StatusCode.UNAVAILABLE, "Too many pings")


def test_how_often_clients_may_ping_is_a_setting(repository):
    with running(repository, min_ping_interval_s=0) as server:
        ended = watched(server.address, 6, *PINGS)
    assert ended.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_connection_of_age_is_closed(repository):
    with running(repository, max_connection_age_s=0.5, max_connection_age_grace_s=0.1) as server:
        ended = watched(server.address, 60)
    assert (ended.code(), ended.details()) == (grpc.StatusCode.UNAVAILABLE, "max connection age")
