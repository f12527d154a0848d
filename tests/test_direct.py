"""Calls that are answered without a task: that they are, and that all else is as it is for other calls."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from conftest import MODEL, Held, Running, holding, running, wait_until

from protos import open_inference as pb
from serving import rpc
from serving.statistics import Statistics

INFER = pb.RPCS["ModelInfer"].path
METHOD = INFER[1:]


def message(value: int = 0, request_id: str = "", images: int = 1) -> bytes:
    request = pb.ModelInferRequest(model_name=MODEL, id=request_id)
    request.inputs.add(name="image", datatype="UINT8", shape=[images, 1, 28, 28])
    request.raw_input_contents.append(bytes([value]) * 784 * images)
    return request.SerializeToString()


def statistics(server: Running) -> Statistics:
    (status,) = server.server.repository.statuses()
    return status.served.statistics


def ended(server: Running) -> dict[str, int]:
    return {code: count for (method, code), count in server.server.snapshot().rpcs.ended.items() if method == METHOD}


@contextmanager
def asked_before(repository, monkeypatch, **settings) -> Iterator[tuple[Running, Held, grpc.UnaryUnaryMultiCallable]]:
    """A server whose model is held, and that has answered a request already: the next ones need no parsing."""
    with (
        holding(repository, monkeypatch, **settings) as (server, backend),
        grpc.insecure_channel(server.address) as channel,
    ):
        infer = channel.unary_unary(INFER)
        backend.released.set()
        infer(message(), timeout=20)
        backend.released.clear()
        backend.started.clear()
        yield server, backend, infer


def test_no_task_has_a_part_in_it(repository, monkeypatch):
    tasks = []
    run = rpc.Server.run
    monkeypatch.setattr(rpc.Server, "run", lambda server, answer: tasks.append(answer) or run(server, answer))
    with running(repository) as server, grpc.insecure_channel(server.address) as channel:
        infer = channel.unary_unary(INFER)
        by_tasks = [infer(message(value, request_id), timeout=20) for value, request_id in ((0, "one"), (200, "two"))]
        assert len(tasks) == 1  # the first one taught how the others are answered
        assert [infer(message(value, name), timeout=20) for value, name in ((0, "one"), (200, "two"))] == by_tasks
        assert pb.ModelInferResponse.FromString(infer(message(7, "another"), timeout=20)).id == "another"
        assert len(tasks) == 1
        assert ended(server) == {"OK": 5}
        assert statistics(server).success.count == 5


@pytest.mark.parametrize("settings", [{"log_requests": "all"}, {"token_file": "token"}])
def test_what_must_see_every_call_does(repository, settings, tmp_path, caplog):
    metadata = ()
    if "token_file" in settings:
        (tmp_path / "token").write_text("a" * 40)
        (tmp_path / "token").chmod(0o600)
        settings = {"token_file": tmp_path / "token"}
        metadata = (("authorization", "Bearer " + "a" * 40),)
    caplog.set_level(logging.INFO)
    with running(repository, **settings) as server, grpc.insecure_channel(server.address) as channel:
        infer = channel.unary_unary(INFER)
        for _ in range(3):
            infer(message(), timeout=20, metadata=metadata)
        if metadata:
            with pytest.raises(grpc.RpcError) as raised:
                infer(message(), timeout=20)
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
        else:
            assert [record.getMessage() for record in caplog.records].count("answered") == 3


def test_a_message_over_the_limit_is_refused_although_only_its_id_is_longer(repository):
    size = len(message(request_id="x", images=6))
    with (
        running(repository, max_message_bytes=size + 3) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        infer = channel.unary_unary(INFER)
        for length in (1, 4):
            infer(message(request_id="x" * length, images=6), timeout=20)
        with pytest.raises(grpc.RpcError, match="--max-message-bytes") as raised:
            infer(message(request_id="x" * 5, images=6), timeout=20)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_who_leaves_is_not_run_for(repository, monkeypatch):
    with asked_before(repository, monkeypatch) as (server, backend, infer):
        first = infer.future(message(), timeout=30)
        assert backend.started.wait(10)
        waiting, scheduler = infer.future(message(), timeout=30), server.server.repository.get(MODEL).scheduler
        wait_until(lambda: len(scheduler.queue) == 1)
        waiting.cancel()
        (batch,) = scheduler.queue._waiting
        wait_until(batch.requests[0].waiter.gone)
        backend.released.set()
        assert first.result()
        wait_until(lambda: ended(server) == {"OK": 2, "CANCELLED": 1})
        assert backend.runs == 2
        counted = statistics(server)
        assert (counted.drops, counted.fail.count, counted.success.count) == ({"cancelled": 1}, 1, 2)


def test_who_leaves_while_the_model_runs_is_counted_too(repository, monkeypatch):
    with asked_before(repository, monkeypatch) as (server, backend, infer):
        leaving = infer.future(message(), timeout=30)
        assert backend.started.wait(10)
        scheduler = server.server.repository.get(MODEL).scheduler
        leaving.cancel()
        probe = infer.future(message(), timeout=30)  # comes after it over the same connection
        wait_until(lambda: len(scheduler.queue) == 1)
        backend.released.set()
        assert probe.result()
        assert ended(server) == {"OK": 2, "CANCELLED": 1}
        counted = statistics(server)
        assert (counted.drops, counted.fail.count, counted.success.count) == ({}, 1, 2)


def test_who_has_no_time_left_is_not_run_for(repository, monkeypatch):
    with asked_before(repository, monkeypatch) as (server, backend, infer):
        first = infer.future(message(), timeout=30)
        assert backend.started.wait(10)
        with pytest.raises(grpc.RpcError) as raised:
            infer(message(), timeout=0.2)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        backend.released.set()
        assert first.result()
        wait_until(lambda: statistics(server).fail.count == 1)
        assert backend.runs == 2
        assert statistics(server).drops.total() == 1  # as expired or as cancelled: gRPC's clock and ours both count


def test_an_error_of_the_model_is_internal_and_not_told(repository, monkeypatch, caplog):
    with asked_before(repository, monkeypatch) as (server, backend, infer):

        def fail(inputs):
            raise ArithmeticError("a secret")

        monkeypatch.setattr(backend._backend, "run", fail, raising=False)
        backend.released.set()
        with pytest.raises(grpc.RpcError) as raised:
            infer(message(), timeout=20)
        assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.INTERNAL, "internal error")
        assert "a secret" in caplog.text
        assert ended(server) == {"OK": 1, "INTERNAL": 1}
        assert statistics(server).fail.count == 1


def test_an_answer_of_another_length_is_never_sent(repository, monkeypatch, caplog):
    with asked_before(repository, monkeypatch) as (server, backend, infer):
        monkeypatch.setattr(
            backend._backend,
            "run",
            lambda inputs: {name: np.zeros((1, 9), np.float32) for name in ("logits", "probabilities")},
        )
        backend.released.set()
        with pytest.raises(grpc.RpcError) as raised:
            infer(message(), timeout=20)
        assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.INTERNAL, "internal error")
        assert "has 36 bytes, its shape in the model needs 40" in caplog.text
        assert (statistics(server).fail.count, statistics(server).success.count) == (1, 1)


def test_a_full_queue_refuses(repository, monkeypatch):
    with asked_before(repository, monkeypatch, max_queue_bytes=800) as (server, backend, infer):
        first = infer.future(message(), timeout=30)
        assert backend.started.wait(10)
        with pytest.raises(grpc.RpcError, match="--max-queue-bytes") as raised:
            infer(message(), timeout=20)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        backend.released.set()
        assert first.result()
        assert ended(server) == {"OK": 2, "RESOURCE_EXHAUSTED": 1}
        assert statistics(server).drops == {"queue_bytes": 1}
