"""Assemble the gRPC server, start it, report readiness, drain and stop it."""

from __future__ import annotations

import asyncio
import gc
import logging
import pickle
import signal
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos import classifier_pb2, open_inference
from serving.config import ServerConfig
from serving.control import Control, Local, Member, Readiness, Stop
from serving.errors import StartupError, cannot_listen
from serving.repository import UNLOADED, Repository, State
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

Result = TypeVar("Result")

_CLASSIFIER = classifier_pb2.DESCRIPTOR.services_by_name["Classifier"]
SERVICES = (_CLASSIFIER.full_name, open_inference.SERVICE)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """A gRPC server over a repository. Listens from `start` on, and is READY when `load` has returned."""

    def __init__(self, config: ServerConfig, member: Member | None = None) -> None:
        """With `member`, one process of several that share the port."""
        self._config = config
        self.repository = Repository(config)
        self._rpcs = Rpcs()
        self._stopping = False
        self._metrics: Endpoint | None = None
        self._polling: asyncio.Task[None] | None = None
        self._local = Local(self.repository, self._report, self._show, self.snapshot)
        self._member = member
        self._taken_over: set[tuple[str, str]] | None = None  # names and versions to serve, as others do
        self._control: Control = member or self._local
        self._showing = asyncio.Lock()
        self._shown: set[str] = set()  # the models that the health service was told of
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                # Alone, a port in use is an error, not a second server on it; the supervisor sees to that for several.
                ("grpc.so_reuseport", 1 if member else 0),
            ]
        )
        self._classifier = ClassifierService(self.repository, config, self._rpcs)
        open_inference_service = OpenInferenceService(self.repository, config, self._rpcs, self._control)
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
        if self._taken_over is None:
            self.repository.scan()
            self._join()
        try:
            port = self._server.add_insecure_port(self._config.address)
        except RuntimeError as error:
            raise cannot_listen(self._config.address) from error
        self._serve_metrics()
        await self._report()
        await self._server.start()
        return self._config.model_copy(update={"port": port}).address

    def take_over(self, models: bytes) -> None:
        """Before `load`, which then comes before `start`: serve what the other processes of the server do.

        Args:
            models: what the `Local.models` of one of them gave.

        Raises:
            BundleError: the repository has nothing to serve.
        """
        statuses = pickle.loads(models)
        self._taken_over = {(status.name, status.version) for status in statuses if status.state is State.READY}
        self.repository.adopt(statuses)
        self._join()

    def _join(self) -> None:
        """From here on, what concerns all processes reaches this one: its repository knows what it should have."""
        if self._member:
            self._member.join(self._local)

    def _serve_metrics(self) -> None:
        if self._config.metrics_port is None or self._member:  # the supervisor has them for all
            return
        from serving.metrics import start  # a server without it saves the time and memory of the libraries

        self._metrics = start(self._config, self._config.metrics_port, self.snapshot)

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
            StartupError: not one model may be served; or, having taken over, not every one that the others serve.
        """
        await asyncio.to_thread(self.repository.load_all)
        statuses = self.repository.statuses()
        failed = [status for status in statuses if status.state is State.UNAVAILABLE and status.reason != UNLOADED]
        if self._taken_over is not None:
            failed = [status for status in failed if (status.name, status.version) in self._taken_over]
        if failed and (self._taken_over is not None or not any(status.state is State.READY for status in statuses)):
            reasons = "; ".join(f"{status.name} version {status.version}: {status.reason}" for status in failed)
            raise StartupError(f"{'no' if self._taken_over is None else 'not every'} model may be served: {reasons}")
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
        """Have the models' states shown, after they changed."""
        await self._control.report()

    async def _show(self, readiness: Readiness) -> None:
        """Tell the health service: "" and the services are as the server is, and each model under its name."""
        async with self._showing:  # the last to come must be the last to be shown
            for service in ("", *SERVICES):
                await self._health.set(service, SERVING if readiness.server else NOT_SERVING)
            for name in {*readiness.models, *self._shown}:
                await self._health.set(name, SERVING if readiness.models.get(name) else NOT_SERVING)
            self._shown = set(readiness.models)

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

    async def hurry(self) -> None:
        """Abort the requests that still run while `stop` waits for them."""
        await self._server.stop(None)


def _reflected() -> DescriptorPool:
    """Everything that reflection tells of, in one pool: the protocol's own messages are in none of the others'."""
    pool = DescriptorPool()
    protocol = open_inference.POOL.FindServiceByName(open_inference.SERVICE).file
    for file in (classifier_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR, protocol):
        pool.AddSerializedFile(file.serialized_pb)
    return pool


def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal cuts the draining short.

    Raises:
        StartupError, DeviceError, BundleError: the server cannot start.
    """
    run(serve_here(config))


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine on the fastest event loop that there is."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


async def serve_here(config: ServerConfig, member: Member | None = None) -> None:
    """As `serve`, on the loop that runs.

    Args:
        config: every setting.
        member: for one process of several; its supervisor stops it.
    """
    stop = member.stop if member else Stop()
    _on_signals(stop, member is not None)
    server = Server(config, member)
    if member and member.role.models:
        server.take_over(member.role.models)
    try:
        starting = asyncio.create_task(_start(server, config, member))
        asked = asyncio.create_task(stop.asked.wait())
        await asyncio.wait({starting, asked}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting  # raises what starting raised
        await asked
        logger.info("stopping: running requests may finish for %g s", config.drain_s)
    finally:
        hurrying = asyncio.create_task(_hurry(server, stop))
        await server.stop()
        hurrying.cancel()
    logger.info("stopped")


async def _start(server: Server, config: ServerConfig, member: Member | None) -> None:
    if member and member.role.models:  # in place of one that died: whoever is connected to it finds it READY
        await server.load()
        await server.start()
    else:  # whoever connects can ask how far it is
        address = await server.start()
        logger.info("listening on %s, loading models from %s", address, config.repository)
        await server.load()
    gc.freeze()  # what is there by now stays: the collector need not look through it again and again
    if member:
        await member.started()
    else:
        logger.info("%s on %s", "READY" if server.repository.ready() else "NOT READY, see the errors above", address)


async def _hurry(server: Server, stop: Stop) -> None:
    await stop.asked_again.wait()
    logger.warning("stopping at once: requests that still run are aborted")
    await server.hurry()


def _on_signals(stop: Stop, is_worker: bool) -> None:
    """SIGTERM and SIGINT ask to stop, and ask again.

    A worker is hurried by its supervisor alone: a signal may reach both, from a service manager that signals every
    process of a group, and then counts once.
    """
    if sys.platform != "win32":  # there, Ctrl-C raises KeyboardInterrupt
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.asked.set if is_worker else stop.ask)
