"""What a server logs of itself and of requests, as text and as JSON."""

import contextlib
import json
import logging
import re
from pathlib import Path

import grpc
import pytest
from conftest import MODEL, running
from test_cli import command, serving

from protos import classifier_pb2
from protos import open_inference as pb
from serving import logs
from serving.config import ServerConfig

INFER = pb.RPCS["ModelInfer"].path
STREAM = pb.RPCS["ModelStreamInfer"].path
PREDICT = "/classifier.v1.Classifier/Predict"


def infer_request(request_id: str = "", model: str = MODEL, **fields) -> bytes:
    request = pb.ModelInferRequest(model_name=model, id=request_id, **fields)
    request.inputs.add(name="image", datatype="UINT8", shape=[1, 1, 28, 28])
    request.raw_input_contents.append(bytes(784))
    return request.SerializeToString()


@pytest.fixture
def records(caplog):
    """What was logged of requests: their fields, with the message."""
    caplog.set_level(logging.INFO, "serving")

    def read() -> list[dict]:
        return [
            {"message": record.getMessage(), "level": record.levelname, **record.fields}
            for record in caplog.records
            if hasattr(record, "fields")
        ]

    return read


@pytest.fixture(autouse=True)
def _allowance(monkeypatch):
    """No test uses up what another may log."""
    monkeypatch.setattr(logs, "_refusals", logs._Allowance(logs.REFUSED_PER_S))


def call(address: str, path: str, data: bytes, metadata=()) -> None:
    with grpc.insecure_channel(address) as channel, contextlib.suppress(grpc.RpcError):
        channel.unary_unary(path)(data, metadata=metadata, timeout=30)


# --- requests


@pytest.mark.parametrize(
    ("path", "data", "metadata", "request_id"),
    [
        (INFER, infer_request("mine", "cats"), (), "mine"),
        (INFER, infer_request("mine", "cats"), (("x-request-id", "theirs"),), "mine"),
        (INFER, infer_request("", "cats"), (("x-request-id", "theirs"),), "theirs"),
        (INFER, infer_request("", "cats"), (), None),
        (PREDICT, classifier_pb2.PredictRequest(model="cats", id="ours").SerializeToString(), (), "ours"),
    ],
)
def test_a_refused_request_is_logged_with_its_id(served, records, path, data, metadata, request_id):
    call(served, path, data, metadata)
    (record,) = records()
    assert record["level"] == "INFO"
    assert (record["method"], record["code"], record.get("request_id")) == (path[1:], "NOT_FOUND", request_id)
    assert record["message"].startswith("Request for unknown model: 'cats' is not found")
    assert re.match(r"ipv[46]:\S+:\d+", record["peer"])


def test_a_refused_request_of_a_stream_is_logged_with_its_id(served, records):
    with grpc.insecure_channel(served) as channel:
        requests = [infer_request("first", "cats"), infer_request("second"), infer_request("third", "dogs")]
        assert len(list(channel.stream_stream(STREAM)(iter(requests)))) == 3
    assert [(record["request_id"], record["code"]) for record in records()] == [
        ("first", "NOT_FOUND"),
        ("third", "NOT_FOUND"),
    ]


def test_a_failed_request_is_logged_with_its_id_and_a_traceback(repository, records, caplog, monkeypatch):
    with running(repository) as server:
        (status,) = server.server.repository.statuses()

        def broken(inputs):
            raise RuntimeError("out of luck")

        monkeypatch.setattr(status.served.scheduler, "_run", broken)
        call(server.address, INFER, infer_request("mine"))
    (record,) = records()
    assert (record["level"], record["request_id"], record["method"]) == ("ERROR", "mine", INFER[1:])
    assert "out of luck" in caplog.text


def test_who_has_no_token_is_logged(repository, records, tmp_path):
    (tmp_path / "tokens").write_text("secret-token")
    with running(repository, token_file=tmp_path / "tokens") as server:
        call(server.address, INFER, infer_request(), (("x-request-id", "a"), ("authorization", "Bearer other-token")))
    (record,) = records()
    assert (record["code"], record["request_id"], record["method"]) == ("UNAUTHENTICATED", "a", INFER[1:])
    assert "token" in record["message"]
    assert "secret-token" not in str(record)
    assert "other-token" not in str(record)


def test_a_request_that_is_answered_is_logged_only_where_asked_for(served, repository, records):
    call(served, INFER, infer_request("quiet"))
    assert records() == []
    with running(repository, log_requests="all") as server:
        call(server.address, INFER, infer_request("loud"))
        with grpc.insecure_channel(server.address) as channel:
            assert len(list(channel.stream_stream(STREAM)(iter([infer_request()] * 3)))) == 3
        server.stop()  # which waits for the calls
    one, stream = records()
    assert (one["method"], one["code"], one["request_id"], one["answers"]) == (INFER[1:], "OK", "loud", 1)
    assert one["ms"] > 0
    assert (stream["method"], stream["code"], stream["answers"]) == (STREAM[1:], "OK", 3)


def test_of_many_refusals_few_are_logged_and_the_rest_counted(records, monkeypatch):
    now = 10.0
    monkeypatch.setattr("serving.logs.time.monotonic", lambda: now)
    for _ in range(1000):
        logs.refused("RESOURCE_EXHAUSTED", "full", dict)
    assert len(records()) == logs.REFUSED_PER_S
    now = 11.0
    logs.refused("RESOURCE_EXHAUSTED", "full", dict)
    logs.refused("RESOURCE_EXHAUSTED", "full", dict)
    assert [record.get("withheld") for record in records()[-2:]] == [1000 - logs.REFUSED_PER_S, None]


def test_the_id_is_found_in_any_message():
    data = infer_request("ü" * 100, parameters={"a": pb.InferParameter(int64_param=2**60)})
    assert logs.text_field(data, 3) == "ü" * 100
    assert logs.text_field(b"\x08\x96\x01" + b"\x11" + bytes(8) + b"\x1d" + bytes(4) + b"\x1a\x02ab", 3) == "ab"
    for damaged in (b"", b"\xff" * 20, b"\x1a\xff\xff\xff\xff\x0fab", b"\x1b", data[:-900], b"\x80"):
        assert isinstance(logs.text_field(damaged, 3), str)


# --- lines


def record(message: str, fields: dict | None = None, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    made = logging.LogRecord("serving.x", logging.INFO, "file", 1, message, (), info)
    if fields:
        made.fields = fields
    return made


def test_text_lines():
    assert logs.Text().format(record("hello")).endswith(" INFO serving.x: hello")
    assert logs.Text(3).format(record("hello")).endswith(" INFO worker 3: serving.x: hello")
    assert logs.Text().format(record("no", {"code": "X", "ms": 1.5})).endswith(" serving.x: no (code=X ms=1.5)")


def test_what_a_client_sent_cannot_break_a_line():
    evil = "a\n2026-01-01 INFO serving: READY\r\x1b[31m\u2028"
    for made in (record(evil, {"code": "X"}), record("x", {"request_id": evil})):
        for line in (logs.Text().format(made), logs.Json().format(made)):
            assert len(line.splitlines()) == 1
            assert "\x1b" not in line


def test_json_lines():
    try:
        raise ValueError("wrong")
    except ValueError as error:
        line = logs.Json(2).format(record("hello", {"request_id": "ü", "ms": 1.5}, error))
    read = json.loads(line)
    assert read["message"] == "hello"
    assert (read["level"], read["logger"], read["worker"]) == ("INFO", "serving.x", 2)
    assert (read["request_id"], read["ms"]) == ("ü", 1.5)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", read["time"])
    assert "ValueError: wrong" in read["exception"]
    assert "exception" not in json.loads(logs.Json().format(record("hello")))


@pytest.fixture
def kept_logging():
    """Put back what `configure` changes for the whole process."""
    root, ours = logging.getLogger(), logging.getLogger("serving")
    before = root.handlers[:], root.level, ours.level, logs.requests.level
    yield
    root.handlers[:], level, our_level, requests_level = before
    root.setLevel(level)
    ours.setLevel(our_level)
    logs.requests.setLevel(requests_level)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, ["info", "refused", "error"]),
        ({"log_level": "debug"}, ["debug", "info", "refused", "error"]),
        ({"log_level": "error"}, ["error"]),
        ({"log_requests": "none"}, ["info", "error"]),
    ],
)
def test_levels(kept_logging, capsys, settings, shown):
    logs.configure(ServerConfig(log_format="json", **settings))
    logger = logging.getLogger("serving.x")
    logger.debug("debug")
    logger.info("info")
    logs.refused("NOT_FOUND", "refused", dict)
    logger.error("error")
    logging.getLogger("another.library").debug("never")
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == shown


def test_a_servers_whole_log_is_json(repository):
    words = ["--repository", repository, "--device", "cpu", "--log-format", "json", "--log-requests", "all"]
    with serving(*words) as (process, found):
        address = found.rstrip('"}')
        call(address, INFER, infer_request("mine"))
        call(address, INFER, infer_request("wrong", "cats"))
        process.terminate()
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert process.wait(60) == 0
    told = {line["request_id"]: line["code"] for line in lines if "request_id" in line}
    assert told == {"mine": "OK", "wrong": "NOT_FOUND"}
    assert lines[-1]["message"] == "stopped"


def test_the_documents_line_of_the_log_is_what_a_server_writes(repository, records):
    text = (Path(__file__).parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^```json\n(\{.*\})\n```", text, re.MULTILINE)
    shown = json.loads(line)
    request = pb.ModelInferRequest(model_name=MODEL, id=shown["request_id"])
    request.inputs.add(name="image", datatype="UINT8", shape=[1, 28, 28])
    request.raw_input_contents.append(bytes(784))
    with running(repository) as server:
        call(server.address, INFER, request.SerializeToString())
    (found,) = records()
    for key in ("message", "level", "code", "method", "request_id"):
        assert str(found[key]).replace(f"'{MODEL}'", "'mnist'") == shown[key]


def test_why_a_server_does_not_start_is_json_too(tmp_path):
    done = command("serving", "serve", "--repository", tmp_path, "--log-format", "json")
    assert done.returncode == 1
    (line,) = (json.loads(line) for line in done.stderr.splitlines())
    assert line["level"] == "CRITICAL"
    assert "no model" in line["message"]
