"""What a server has done and how it stands, for Prometheus, over HTTP. `docs/metrics.md` lists every metric."""

from __future__ import annotations

import logging
import os
import platform
import socket
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from itertools import accumulate
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from prometheus_client.core import (
    CollectorRegistry,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from serving import __version__
from serving.config import ServerConfig
from serving.errors import StartupError
from serving.repository import State
from serving.snapshot import Snapshot
from serving.statistics import DROP_REASONS, DURATION_BOUNDS_NS, Statistics

logger = logging.getLogger(__name__)

BATCH_BOUNDS = tuple(2**power for power in range(11))  # rows
MAX_REASON = 300  # characters of why a version may not be served

_VERSION = ("model", "version")
_RPC = ("method", "code")
_TIMEOUT_S = 10.0  # for a client of the endpoint that sends nothing
_POLL_S = 0.1  # `Endpoint.close` may take as long


def render(snapshot: Snapshot, accept: str = "") -> tuple[bytes, str]:
    """The metrics, and their content type: OpenMetrics where the Accept header asks for it, else Prometheus' text."""
    registry = CollectorRegistry()
    registry.register(_Families(snapshot))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Families(Collector):
    """Every metric of a snapshot, as the library asks for them."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        """Nothing: there is nothing else in the registry to clash with."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        yield from _server(self._snapshot)
        yield from _process(self._snapshot)
        yield from _versions(self._snapshot)
        yield from _requests(self._snapshot)
        yield from _histograms(self._snapshot)


def _server(snapshot: Snapshot) -> Iterator[Metric]:
    build = {"version": __version__, "python": platform.python_version()}
    yield InfoMetricFamily("parityserve_build", "Versions of the server and of Python.", build)
    yield GaugeMetricFamily("parityserve_ready", "1 when the server reports itself as SERVING.", snapshot.ready)
    yield GaugeMetricFamily("parityserve_workers", "Processes that serve.", snapshot.workers)
    rpcs = CounterMetricFamily("parityserve_rpcs", "RPCs that ended, by gRPC status.", labels=_RPC)
    errors = CounterMetricFamily("parityserve_stream_errors", "Answers in streams that are errors.", labels=_RPC)
    for family, counted in ((rpcs, snapshot.rpcs.ended), (errors, snapshot.rpcs.stream_errors)):
        for labels, count in sorted(counted.items()):
            family.add_metric(labels, count)
        yield family


def _process(snapshot: Snapshot) -> Iterator[Metric]:
    process = snapshot.process
    yield CounterMetricFamily("process_cpu_seconds", "User and system CPU time.", process.cpu_s)
    for name, text, value in (
        ("process_resident_memory_bytes", "Resident memory.", process.resident_bytes),
        ("process_open_fds", "Open file descriptors.", process.open_fds),
        ("process_start_time_seconds", "When the process was started, since 1970.", process.started_s),
    ):
        if value:  # 0: the system does not tell
            yield GaugeMetricFamily(name, text, value)


def _versions(snapshot: Snapshot) -> Iterator[Metric]:
    """How each version stands."""
    info = InfoMetricFamily("parityserve_model", "What a version runs on, read back from it.", labels=_VERSION)
    ready = GaugeMetricFamily("parityserve_model_ready", "1 for a version that answers requests.", labels=_VERSION)
    failed = GaugeMetricFamily(
        "parityserve_model_load_failed", "1 for a version that may not be served.", labels=(*_VERSION, "reason")
    )
    golden = GaugeMetricFamily(
        "parityserve_golden_max_abs", "Largest difference to the golden answers when loaded.", labels=_VERSION
    )
    depth = GaugeMetricFamily("parityserve_queue_depth", "Requests that wait for the model.", labels=_VERSION)
    running = GaugeMetricFamily("parityserve_requests_running", "Requests that the model runs.", labels=_VERSION)
    held = GaugeMetricFamily("parityserve_queue_bytes", "Bytes of the inputs of both.", labels=_VERSION)
    for key, version in sorted(snapshot.versions.items()):
        ready.add_metric(key, version.state is State.READY)
        if version.state is State.UNAVAILABLE:
            failed.add_metric((*key, _short(version.reason)), 1)
        for found in sorted(version.runs_on):
            info.add_metric(key, found._asdict() | {"verified": str(found.verified).lower()})
        if version.golden_max_abs is not None:
            golden.add_metric(key, version.golden_max_abs)
        if version.runs_on:
            depth.add_metric(key, version.waiting)
            running.add_metric(key, version.running)
            held.add_metric(key, version.nbytes)
    yield from (info, ready, failed, golden, depth, running, held)


def _short(reason: str) -> str:
    return reason if len(reason) <= MAX_REASON else f"{reason[: MAX_REASON - 1]}…"


def _requests(snapshot: Snapshot) -> Iterator[Metric]:
    """What became of each version's requests, and where the time of the answered ones went."""
    requests = CounterMetricFamily(
        "parityserve_requests", "Inference requests to a version that is served.", labels=(*_VERSION, "outcome")
    )
    dropped = CounterMetricFamily(
        "parityserve_requests_dropped",
        "Failed requests that were dropped before the model ran.",
        labels=(*_VERSION, "reason"),
    )
    stages = CounterMetricFamily(
        "parityserve_request_stage_seconds", "Where the answered requests' time went.", labels=(*_VERSION, "stage")
    )
    for key, counted in sorted(snapshot.statistics.items()):
        requests.add_metric((*key, "success"), counted.success.count)
        requests.add_metric((*key, "failure"), counted.fail.count)
        for reason in DROP_REASONS:
            dropped.add_metric((*key, reason), counted.drops[reason])
        for stage, ns in (
            ("queue", counted.queue.ns),
            ("compute_input", counted.compute_input_ns),
            ("compute_infer", counted.compute_infer_ns),
            ("compute_output", counted.compute_output_ns),
        ):
            stages.add_metric((*key, stage), ns / 1e9)
    yield from (requests, dropped, stages)


def _histograms(snapshot: Snapshot) -> Iterator[Metric]:
    request = HistogramMetricFamily(
        "parityserve_request_duration_seconds", "From decoding a request to its encoded answer.", labels=_VERSION
    )
    queue = HistogramMetricFamily(
        "parityserve_queue_duration_seconds", "That an answered request waited for the model.", labels=_VERSION
    )
    compute = HistogramMetricFamily("parityserve_compute_duration_seconds", "One run of the model.", labels=_VERSION)
    batch = HistogramMetricFamily("parityserve_batch_size", "Rows in one run of the model.", labels=_VERSION)
    for key, counted in sorted(snapshot.statistics.items()):
        for family, histogram in ((request, counted.success), (queue, counted.queue), (compute, counted.runs)):
            bounds = [bound / 1e9 for bound in DURATION_BOUNDS_NS]
            family.add_metric(key, _cumulative(bounds, histogram.buckets), histogram.ns / 1e9)
        batch.add_metric(key, _cumulative(BATCH_BOUNDS, _batch_buckets(counted)), counted.inference_count)
    yield from (request, queue, compute, batch)


def _batch_buckets(counted: Statistics) -> list[int]:
    buckets = [0] * (len(BATCH_BOUNDS) + 1)
    for rows, batch in counted.batches.items():
        buckets[bisect_left(BATCH_BOUNDS, rows)] += batch.compute_infer.count
    return buckets


def _cumulative(bounds: Iterable[float], counts: Iterable[int]) -> list[tuple[str, float]]:
    """Prometheus' buckets: how many were at most as large as each bound, as text, and how many there were in all."""
    return list(zip(map(floatToGoString, (*bounds, float("inf"))), accumulate(counts), strict=True))


class Endpoint:
    """An HTTP server on a thread of its own: `/metrics`, and `/live` and `/ready` for probes without gRPC."""

    def __init__(self, host: str, port: int, snapshot: Callable[[], Snapshot]) -> None:
        """Listen and answer from now on.

        Args:
            host: address to listen on.
            port: 0 for any free one.
            snapshot: gives what to tell; called for every request, by a thread of the endpoint.

        Raises:
            StartupError: the address cannot be listened on.
        """
        try:
            self._server = _HttpServer(host, port, snapshot)
        except OSError as error:
            raise StartupError(
                f"cannot listen on {host}:{port} for metrics: {error.strerror or error}; choose another with "
                "--metrics-port and --metrics-host"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start(config: ServerConfig, port: int, snapshot: Callable[[], Snapshot]) -> Endpoint:
    """The endpoint of a server, on `port` of the address that its configuration names; raises what `Endpoint` does."""
    endpoint = Endpoint(config.metrics_host or config.host, port, snapshot)
    logger.info("metrics on http://%s/metrics", endpoint.address)
    return endpoint


class _HttpServer(ThreadingMixIn, TCPServer):
    """Not http.server's, which looks its own name up when it starts."""

    allow_reuse_address = os.name == "posix"  # elsewhere that would allow two servers on one port
    daemon_threads = True

    def __init__(self, host: str, port: int, snapshot: Callable[[], Snapshot]) -> None:
        self.snapshot = snapshot
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        super().__init__(address, _Handler)  # type: ignore[arg-type]  # of IPv6 it is longer

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  # socketserver names them
        """A client that went away is not worth a traceback on the terminal."""
        logger.debug("metrics: a request from %s ended early", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _HttpServer
    server_version = "parityserve"
    sys_version = ""
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        """Answer one request."""
        path = self.path.partition("?")[0]
        status, content_type = HTTPStatus.OK, "text/plain; charset=utf-8"
        try:
            match path:
                case "/metrics":
                    body, content_type = render(self.server.snapshot(), self.headers.get("Accept", ""))
                case "/live":
                    body = b"live\n"
                case "/ready":
                    ready = self.server.snapshot().ready
                    status, body = (
                        (HTTPStatus.OK, b"ready\n") if ready else (HTTPStatus.SERVICE_UNAVAILABLE, b"not ready\n")
                    )
                case _:
                    status, body = HTTPStatus.NOT_FOUND, b"not found; there are /metrics, /live and /ready\n"
        except Exception:
            logger.exception("metrics: %s cannot be answered", path)
            status, body = HTTPStatus.INTERNAL_SERVER_ERROR, b"internal error\n"
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Scrapes are no news."""
        logger.debug("metrics: %s %s", self.address_string(), format % arguments)
