"""Assemble the gRPC server, start it, report readiness, drain and stop it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from typing import TYPE_CHECKING

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos import classifier_pb2, open_inference
from serving.config import ServerConfig
from serving.errors import StartupError
from serving.repository import Repository, State
from serving.security import TokenGuard, tls
from serving.services import handler
from serving.services.classifier import ClassifierService
from serving.services.gate import Gate
from serving.services.health import HealthService
from serving.services.open_inference import OpenInferenceService
from serving.snapshot import Snapshot, collect
from serving.statistics import Rpcs

if TYPE_CHECKING:
    from serving.metrics import Endpoint

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop

logger = logging.getLogger(__name__)

_CLASSIFIER = classifier_pb2.DESCRIPTOR.services_by_name["Classifier"]
_PROTOCOL = open_inference.POOL.FindServiceByName(open_inference.SERVICE)
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
SERVICES = (_CLASSIFIER.full_name, _PROTOCOL.full_name)

# A server that stops refuses calls until none came for so long, in so many rounds at most: see `serving.services.gate`.
_QUIET_S = 0.05
_ROUNDS = 20

_INT_MAX = 2**31 - 1


class Server:
    """A gRPC server over a repository. Listens from `start` on, and is READY when `load` has returned."""

    def __init__(self, config: ServerConfig) -> None:
        """Read the certificates and tokens.

        Raises:
            StartupError: a file of them is wrong.
        """
        self._config = config
        self.repository = Repository(config)
        self._rpcs = Rpcs()
        self._metrics: Endpoint | None = None
        self._polling: asyncio.Task[None] | None = None
        self._reported: set[str] = set()  # the models that the health service was told of
        self._health = HealthService()
        self._gate = Gate()
        self._tls = tls(config)
        self._guard = TokenGuard(config.token_file) if config.token_file else None
        self._server = grpc.aio.server(
            interceptors=[self._guard] if self._guard else None,
            options=_options(config),
        )
        self._classifier = ClassifierService(self.repository, config, self._rpcs)
        open_inference_service = OpenInferenceService(self.repository, config, self._rpcs, self._report)
        shared = (self._rpcs, self._gate, config.max_message_bytes)
        self._server.add_generic_rpc_handlers(
            (
                # The health service goes on being answered when the gate is closed.
                handler(self._health, _HEALTH, *shared),
                self._gate,
                handler(self._classifier, _CLASSIFIER, *shared),
                handler(open_inference_service, _PROTOCOL, *shared),
            )
        )
        reflection.enable_server_reflection(
            (*SERVICES, _HEALTH.full_name, reflection.SERVICE_NAME), self._server, _reflected()
        )

    async def start(self) -> str:
        """Listen, NOT_SERVING as yet; returns the address `host:port` with the port that was bound.

        Raises:
            StartupError: the address cannot be listened on.
            BundleError: the repository has nothing to serve.
        """
        self.repository.scan()
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        address = f"{host}:{self._config.port}"
        try:
            if self._tls:
                port = self._server.add_secure_port(address, self._tls.credentials)
            else:
                port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise StartupError(
                f"cannot listen on {address}: in use, or not this machine's address; choose another with --port"
            ) from error
        self._serve_metrics()
        await self._report()
        await self._server.start()
        return f"{host}:{port}"

    def _serve_metrics(self) -> None:
        if self._config.metrics_port is None:
            return
        from serving.metrics import Endpoint  # a server without it saves the time and memory of the libraries

        self._metrics = Endpoint(
            self._config.metrics_host or self._config.host, self._config.metrics_port, self.snapshot
        )
        logger.info("metrics on http://%s/metrics", self._metrics.address)

    @property
    def metrics_address(self) -> str | None:
        """Where the metrics are, `host:port` with the port that was bound; None where there are none."""
        return self._metrics.address if self._metrics else None

    def snapshot(self) -> Snapshot:
        """The server as it stands, for its metrics; from any thread."""
        return collect(self.repository, self._rpcs, ready=self.repository.ready())

    async def load(self) -> None:
        """Load every model and report what became READY.

        Raises:
            DeviceError: the device asked for cannot be used.
            StartupError: not one model may be served.
        """
        await asyncio.to_thread(self.repository.load_all)
        statuses = self.repository.statuses()
        if statuses and not any(status.state is State.READY for status in statuses):
            reasons = "; ".join(f"{status.name} version {status.version}: {status.reason}" for status in statuses)
            raise StartupError(f"no model may be served: {reasons}")
        await self._report()
        if self._config.model_control == "poll":
            self._polling = asyncio.create_task(self._poll())

    async def _poll(self) -> None:
        """Keep what is served in step with the repository's folder."""
        while True:
            await asyncio.sleep(self._config.poll_s)
            try:
                if await asyncio.to_thread(self.repository.poll):
                    await self._report()
            except Exception:  # the next look may do better; without it nothing would ever be loaded again
                logger.exception("unexpected error while looking for new versions")

    async def _report(self) -> None:
        """Tell the health service: "" and the services are SERVING when every model is, each model under its name."""
        ready = self.repository.ready()
        for service in ("", *SERVICES):
            self._health.set(service, ready)
        answering = self.repository.answering()
        for name in {*answering, *self._reported}:
            self._health.set(name, bool(answering.get(name)))
        self._reported = set(answering)

    def reload(self) -> None:
        """Read the certificates and tokens again; those that are wrong now stay as they were."""
        for source in (self._tls, self._guard):
            if source:
                source.files.reload()

    def security(self) -> str:
        """How calls are protected, for the log."""
        transport = "plain text" if self._tls is None else "mutual TLS" if self._config.tls_client_ca else "TLS"
        return f"{transport}, {'tokens' if self._guard else 'no tokens'}"

    async def stop(self, hurry: asyncio.Event | None = None) -> None:
        """Report that the server is not ready, answer on for `drain_delay_s`, let what runs finish, close the models.

        What is not finished `drain_s` seconds after new calls are refused, or when `hurry` is set, is cancelled.
        A second time, nothing is left to do.
        """
        if self._gate.closed:
            return
        hurry = hurry or asyncio.Event()
        if self._polling:
            self._polling.cancel()
        self.repository.retire()
        self._health.stop()
        await _pause(self._config.drain_delay_s, hurry)
        self._gate.close()
        for _ in range(_ROUNDS):
            refused = self._gate.refused
            await _pause(_QUIET_S, hurry)
            if self._gate.refused == refused:
                break
        self._health.close()
        finishing = asyncio.create_task(self._server.stop(self._config.drain_s))
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait({finishing, hurried}, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not finishing.done():
            await self._server.stop(None)
        await finishing
        await asyncio.to_thread(self._classifier.close)
        await asyncio.to_thread(self.repository.close)
        if self._metrics:
            await asyncio.to_thread(self._metrics.close)


async def _pause(seconds: float, hurry: asyncio.Event) -> None:
    """Wait, but not when in a hurry."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(hurry.wait(), seconds)


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    """gRPC's settings: https://grpc.github.io/grpc/core/group__grpc__arg__keys.html."""
    options = {
        # A message over our limit is refused by us, in words that help; gRPC only guards the memory.
        "grpc.max_receive_message_length": min(2 * config.max_message_bytes, _INT_MAX),
        "grpc.max_send_message_length": config.max_message_bytes,
        "grpc.so_reuseport": 0,  # a port in use is an error, not a second server on it
        "grpc.keepalive_time_ms": _ms(config.keepalive_time_s),
        "grpc.keepalive_timeout_ms": _ms(config.keepalive_timeout_s),
        "grpc.keepalive_permit_without_calls": 1,  # pings find dead connections that have no calls too
        "grpc.http2.max_pings_without_data": 0,  # our own pings are not limited
        "grpc.http2.min_ping_interval_without_data_ms": _ms(config.min_ping_interval_s),
    }
    if config.max_connection_age_s:
        options["grpc.max_connection_age_ms"] = _ms(config.max_connection_age_s)
        options["grpc.max_connection_age_grace_ms"] = _ms(config.max_connection_age_grace_s)
    return list(options.items())


def _ms(seconds: float) -> int:
    return min(round(1000 * seconds), _INT_MAX)


def _reflected() -> DescriptorPool:
    """Everything that reflection tells of, in one pool: the protocol's own messages are in none of the others'."""
    pool = DescriptorPool()
    for file in (classifier_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR, _PROTOCOL.file):
        pool.AddSerializedFile(file.serialized_pb)
    return pool


def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain, until a second one; on the fastest event loop that there is.

    Raises:
        StartupError, DeviceError, BundleError: the server cannot start.
    """
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(config))


async def _serve(config: ServerConfig) -> None:
    stopping, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    if sys.platform != "win32":  # there, Ctrl-C raises KeyboardInterrupt
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: (hurry if stopping.is_set() else stopping).set())
    server = Server(config)
    if hasattr(signal, "SIGHUP"):
        loop.add_signal_handler(signal.SIGHUP, server.reload)
    try:
        address = await server.start()
        logger.info("listening on %s (%s), loading models from %s", address, server.security(), config.repository)
        loading = asyncio.create_task(server.load())
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait({loading, stop}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            await loading  # raises what the load raised
            gc.freeze()  # what is there by now stays: the collector need not look through it again and again
            logger.info(
                "%s on %s", "READY" if server.repository.ready() else "NOT READY, see the errors above", address
            )
        await stop
        logger.info(
            "stopping: answering on for %g s, then running requests may finish for %g s; a second signal ends it",
            *(config.drain_delay_s, config.drain_s),
        )
    except BaseException:
        hurry.set()  # nobody is served
        raise
    finally:
        await server.stop(hurry)
    logger.info("stopped")
