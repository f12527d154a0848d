"""Assemble the gRPC server, start it, report readiness, drain and stop it."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from typing import TYPE_CHECKING

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos import classifier_pb2, open_inference
from serving.config import ServerConfig
from serving.errors import StartupError
from serving.repository import Repository, State
from serving.services import handler
from serving.services.classifier import ClassifierService
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
SERVICES = (_CLASSIFIER.full_name, open_inference.SERVICE)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """A gRPC server over a repository. Listens from `start` on, and is READY when `load` has returned."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self.repository = Repository(config)
        self._rpcs = Rpcs()
        self._stopping = False
        self._metrics: Endpoint | None = None
        self._polling: asyncio.Task[None] | None = None
        self._reported: set[str] = set()  # the models that the health service was told of
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server on it
            ]
        )
        self._classifier = ClassifierService(self.repository, config, self._rpcs)
        open_inference_service = OpenInferenceService(self.repository, config, self._rpcs, self._report)
        protocol = open_inference.POOL.FindServiceByName(open_inference.SERVICE)
        self._server.add_generic_rpc_handlers(
            (
                handler(self._classifier, _CLASSIFIER, self._rpcs),
                handler(open_inference_service, protocol, self._rpcs),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server, _reflected()
        )

    async def start(self) -> str:
        """Listen, NOT_SERVING as yet; returns the address `host:port` with the port that was bound.

        Raises:
            StartupError: the address cannot be listened on.
            BundleError: the repository has nothing to serve.
        """
        self.repository.scan()
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        try:
            port = self._server.add_insecure_port(f"{host}:{self._config.port}")
        except RuntimeError as error:
            raise StartupError(
                f"cannot listen on {host}:{self._config.port}: in use, or not this machine's address; "
                "choose another with --port"
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
        return collect(self.repository, self._rpcs, ready=self.repository.ready() and not self._stopping)

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
            await self._health.set(service, SERVING if ready else NOT_SERVING)
        answering = self.repository.answering()
        for name in {*answering, *self._reported}:
            await self._health.set(name, SERVING if answering.get(name) else NOT_SERVING)
        self._reported = set(answering)

    async def stop(self) -> None:
        """Report NOT_SERVING, let running requests finish for at most `drain_s` seconds, then close the models."""
        self._stopping = True
        if self._polling:
            self._polling.cancel()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._config.drain_s)
        await asyncio.to_thread(self._classifier.close)
        await asyncio.to_thread(self.repository.close)
        if self._metrics:
            await asyncio.to_thread(self._metrics.close)


def _reflected() -> DescriptorPool:
    """Everything that reflection tells of, in one pool: the protocol's own messages are in none of the others'."""
    pool = DescriptorPool()
    protocol = open_inference.POOL.FindServiceByName(open_inference.SERVICE).file
    for file in (classifier_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR, protocol):
        pool.AddSerializedFile(file.serialized_pb)
    return pool


def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain; on the fastest event loop that there is.

    Raises:
        StartupError, DeviceError, BundleError: the server cannot start.
    """
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(config))


async def _serve(config: ServerConfig) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    if sys.platform != "win32":  # there, Ctrl-C raises KeyboardInterrupt
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
    server = Server(config)
    try:
        address = await server.start()
        logger.info("listening on %s, loading models from %s", address, config.repository)
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
        logger.info("stopping: running requests may finish for %g s", config.drain_s)
    finally:
        await server.stop()
    logger.info("stopped")
