"""Traces, as a collector gets them."""

import contextlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from conftest import MODEL, running
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc
from test_cli import ROOT, command, environment

from protos import open_inference as pb

INFER = pb.RPCS["ModelInfer"].path
STREAM = pb.RPCS["ModelStreamInfer"].path
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = ((("traceparent", f"00-{TRACE}-{PARENT}-{flag}"),) for flag in ("01", "00"))


class Collector(otlp_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self):
        self.spans = []
        self.resource = {}

    def Export(self, request, context):
        for resource in request.resource_spans:
            self.resource = {item.key: item.value.string_value for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return otlp.ExportTraceServiceResponse()

    def named(self, name):
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def collector():
    """A collector, and its endpoint."""
    servicer = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    otlp_grpc.add_TraceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"http://127.0.0.1:{port}"
    server.stop(None)


@contextlib.contextmanager
def traced(repository, endpoint, **settings):
    """A channel to a server that sends its traces; all are sent when the block ends."""
    with (
        running(repository, trace_endpoint=endpoint, **settings) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        yield channel


def infer_request(model=MODEL, rows=1):
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="image", datatype="UINT8", shape=[rows, 1, 28, 28])
    request.raw_input_contents.append(bytes(784 * rows))
    return request.SerializeToString()


def attributes(span):
    return {item.key: item.value.string_value or item.value.int_value for item in span.attributes}


def test_a_call_is_a_span_of_its_callers_trace_with_queue_and_compute(repository, collector):
    servicer, endpoint = collector
    with traced(repository, endpoint) as channel:
        for _ in range(2):  # decoded in full, and prepared
            channel.unary_unary(INFER)(infer_request(rows=3), metadata=SAMPLED, timeout=30)
    assert len(servicer.spans) == 2 * 4
    assert {span.trace_id.hex() for span in servicer.spans} == {TRACE}
    assert servicer.resource["service.name"] == "parityserve"
    for call in servicer.named(INFER[1:]):
        assert call.parent_span_id.hex() == PARENT
        assert call.kind == call.SPAN_KIND_SERVER
        assert attributes(call) == {
            "rpc.system": "grpc",
            "rpc.service": pb.SERVICE,
            "rpc.method": "ModelInfer",
            "rpc.grpc.status_code": 0,
        }
        (inference,) = (span for span in servicer.named("inference") if span.parent_span_id == call.span_id)
        assert attributes(inference) == {"parityserve.rows": 3}
        (waited, computed) = (
            span
            for name in ("queue", "compute")
            for span in servicer.named(name)
            if span.parent_span_id == inference.span_id
        )
        moments = [inference.start_time_unix_nano, waited.start_time_unix_nano, waited.end_time_unix_nano]
        moments += [computed.start_time_unix_nano, computed.end_time_unix_nano, inference.end_time_unix_nano]
        assert moments == sorted(moments)
        # The clock of the stages is another than that of the span around them: near enough to be seen as inside.
        assert call.start_time_unix_nano - 10**7 < moments[0] < moments[-1] < call.end_time_unix_nano + 10**7


def test_a_stream_is_a_span_with_an_inference_for_each_request(repository, collector):
    servicer, endpoint = collector
    with traced(repository, endpoint) as channel:
        requests = iter([infer_request(), infer_request("cats"), infer_request()])
        assert len(list(channel.stream_stream(STREAM)(requests, metadata=SAMPLED, timeout=30))) == 3
    (call,) = servicer.named(STREAM[1:])
    assert attributes(call)["rpc.grpc.status_code"] == 0
    inferences = servicer.named("inference")
    assert [span.parent_span_id for span in inferences] == [call.span_id] * 2


@pytest.mark.parametrize(("model", "code", "is_error"), [("cats", 5, False), ("broken", 13, True)])
def test_a_refused_call_has_its_status(repository, collector, monkeypatch, model, code, is_error):
    servicer, endpoint = collector
    with running(repository, trace_endpoint=endpoint) as server, grpc.insecure_channel(server.address) as channel:
        (status,) = server.server.repository.statuses()
        if model == "broken":
            monkeypatch.setattr(status.served.scheduler, "_run", lambda inputs: {})
        with pytest.raises(grpc.RpcError):
            channel.unary_unary(INFER)(infer_request(MODEL if is_error else model), metadata=SAMPLED, timeout=30)
    (call,) = servicer.spans
    assert attributes(call)["rpc.grpc.status_code"] == code
    assert (call.status.code == call.status.STATUS_CODE_ERROR) == is_error


def test_a_caller_that_left_is_cancelled(repository, collector, monkeypatch):
    servicer, endpoint = collector
    running_now, go_on = threading.Event(), threading.Event()
    with running(repository, trace_endpoint=endpoint) as server, grpc.insecure_channel(server.address) as channel:
        (status,) = server.server.repository.statuses()
        run = status.served.scheduler._run

        def held(inputs):
            running_now.set()
            assert go_on.wait(60)
            return run(inputs)

        monkeypatch.setattr(status.served.scheduler, "_run", held)
        call = channel.unary_unary(INFER).future(infer_request(), metadata=SAMPLED)
        assert running_now.wait(60)
        call.cancel()
        patience = time.monotonic() + 60
        while not server.server.snapshot().rpcs.ended[INFER[1:], "CANCELLED"]:
            assert time.monotonic() < patience
            time.sleep(0.01)
        go_on.set()
    (span,) = servicer.spans
    assert attributes(span)["rpc.grpc.status_code"] == grpc.StatusCode.CANCELLED.value[0]


def test_what_is_not_sampled_or_a_probe_is_not_sent(repository, collector):
    servicer, endpoint = collector
    with traced(repository, endpoint) as channel:
        channel.unary_unary(INFER)(infer_request(), metadata=UNSAMPLED, timeout=30)
        channel.unary_unary("/grpc.health.v1.Health/Check")(b"", metadata=SAMPLED, timeout=30)
        channel.unary_unary(INFER)(infer_request(), timeout=30)  # begins a trace of its own
    (call,) = servicer.named(INFER[1:])
    assert call.trace_id.hex() != TRACE
    assert not call.parent_span_id
    assert len(servicer.spans) == 4


def test_a_collector_that_is_not_there_harms_nobody(repository):
    with traced(repository, "http://127.0.0.1:1") as channel:
        answer = channel.unary_unary(INFER)(infer_request(), metadata=SAMPLED, timeout=30)
    assert pb.ModelInferResponse.FromString(answer).model_name == MODEL  # and the server has stopped


def test_calls_without_a_token_are_not_traced(repository, collector, tmp_path):
    servicer, endpoint = collector
    (tmp_path / "tokens").write_text("a-token")
    with traced(repository, endpoint, token_file=tmp_path / "tokens") as channel:
        with pytest.raises(grpc.RpcError):
            channel.unary_unary(INFER)(infer_request(), metadata=SAMPLED, timeout=30)
        metadata = (*SAMPLED, ("authorization", "Bearer a-token"))
        channel.unary_unary(INFER)(infer_request(), metadata=metadata, timeout=30)
    assert len(servicer.named(INFER[1:])) == 1


WITHOUT = """
import asyncio, sys
from serving.config import ServerConfig
from serving.server import Server

async def main():
    server = Server(ServerConfig(repository={repository!r}, port=0))
    await server.start()
    await server.stop()

asyncio.run(main())
print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
"""


def test_without_traces_nothing_of_opentelemetry_is_imported(repository):
    code = WITHOUT.format(repository=str(repository))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_server_without_opentelemetry_says_what_to_install(repository, tmp_path):
    script = tmp_path / "without.py"
    script.write_text(
        "import sys\nsys.modules['opentelemetry'] = None\nfrom serving.__main__ import main\nsys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, script, "serve", "--repository", repository, "--trace-endpoint", "http://127.0.0.1:1"],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "--trace-endpoint needs OpenTelemetry: pip install 'parityserve[tracing]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_endpoint_that_is_no_url_is_refused():
    done = command("serving", "serve", "--trace-endpoint", "localhost:4317")
    assert done.returncode == 2
    assert "--trace-endpoint: Input should be http://HOST:PORT or https://HOST:PORT, got 'local" in done.stderr
