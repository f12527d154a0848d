"""OpenTelemetry traces: a span for each call, in the trace that its caller began, and what it spent its time on.

Only where it is asked for is anything of OpenTelemetry imported. Its own variables, `OTEL_*`, are obeyed:
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving import __version__, rpc
from serving.statistics import Stages, observer

_CLOSE_S = 5.0

_UNTRACED = ("/grpc.health.v1.Health/", "/grpc.reflection.")  # probes would be most of what is traced

# https://opentelemetry.io/docs/specs/semconv/rpc/grpc/: the codes that are errors of the server.
_OUR_ERRORS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}


class Tracing:
    """Wraps every call in a span, and sends the spans to a collector."""

    def __init__(self, endpoint: str) -> None:
        """Send to `endpoint`, OTLP over gRPC: http://host:4317, or https:// for TLS."""
        name = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "parityserve"}
        self._provider = TracerProvider(
            shutdown_on_exit=False, resource=Resource.create({SERVICE_VERSION: __version__, **name})
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("parityserve", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Send what is not sent yet, if the collector answers; to be called off the event loop."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_CLOSE_S)

    def intercept(self, details: rpc.CallDetails, find: rpc.Find) -> rpc.Handler | None:
        """What answers a call, in a span."""
        handler = find(details)
        if handler is None or details.method.startswith(_UNTRACED):
            return handler
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary, details), response_serializer=handler.response_serializer
            )
        if not inspect.isasyncgenfunction(handler.stream_stream):
            return handler  # a refusal
        return grpc.stream_stream_rpc_method_handler(
            self._stream(handler.stream_stream, details), response_serializer=handler.response_serializer
        )

    def _unary(self, call: Callable[..., Any], details: rpc.CallDetails) -> Callable[..., Awaitable[Any]]:
        async def traced(data: bytes, context: rpc.Call) -> Any:
            with self._span(details, context):
                return await call(data, context)

        return traced

    def _stream(self, call: Callable[..., Any], details: rpc.CallDetails) -> Callable[..., AsyncIterator[Any]]:
        async def traced(source: AsyncIterator[bytes], context: rpc.Call) -> AsyncIterator[Any]:
            with self._span(details, context):
                async for response in call(source, context):
                    yield response

        return traced

    @contextmanager
    def _span(self, details: rpc.CallDetails, context: rpc.Call) -> Iterator[None]:
        """A span around a call, which has a task and so a context of its own: `observer` adds what inference takes."""
        carrier = {key: value for key, value in details.invocation_metadata if isinstance(value, str)}
        service, _, method = details.method.lstrip("/").rpartition("/")
        span = self._tracer.start_span(
            f"{service}/{method}",
            self._propagator.extract(carrier),
            SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        )
        observer.set(lambda start_ns, stages, end_ns: self._inference(span, start_ns, stages, end_ns))
        code = grpc.StatusCode.CANCELLED  # the caller has gone
        try:
            yield
            if not context.cancelled():
                code = grpc.StatusCode.OK
        except Exception:
            code = context.code()
            raise
        finally:
            span.set_attribute("rpc.grpc.status_code", code.value[0])
            if code in _OUR_ERRORS:
                span.set_status(StatusCode.ERROR, code.name)
            span.end()

    def _inference(self, parent: Span, start_ns: int, stages: Stages, end_ns: int) -> None:
        """What one request took: a stream has many in its span."""
        if not parent.is_recording():
            return
        since = time.time_ns() - time.monotonic_ns()  # 1970
        inference = self._tracer.start_span(
            "inference",
            set_span_in_context(parent),
            attributes={"parityserve.rows": stages.rows},
            start_time=start_ns + since,
        )
        within = set_span_in_context(inference)
        for name, begin, end in (
            ("queue", stages.queued_ns, stages.taken_ns),
            ("compute", stages.taken_ns, stages.computed_ns),
        ):
            self._tracer.start_span(name, within, start_time=begin + since).end(end + since)
        inference.end(end_ns + since)
