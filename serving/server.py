"""Assemble the gRPC server, start it, report readiness, drain and stop it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import pickle
import signal
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos import classifier_pb2, open_inference
from serving import logs, rpc, transport
from serving.config import ServerConfig
from serving.control import Control, Local, Member, Readiness, Stop
from serving.errors import StartupError
from serving.repository import UNLOADED, Repository, State
from serving.security import TokenGuard, tls
from serving.services import handler
from serving.services.classifier import ClassifierService
from serving.services.direct import direct
from serving.services.gate import Gate
from serving.services.health import HealthService
from serving.services.open_inference import OpenInferenceService
from serving.services.overload import Overload
from serving.services.prepared import PreparedRequests
from serving.snapshot import Snapshot, collect
from serving.statistics import Rpcs

if TYPE_CHECKING:
    from serving.metrics import Endpoint
    from serving.tracing import Tracing

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# How long a thread that wants the interpreter's lock waits before the other must let go of it. A model's thread needs
# it for a moment between two batches, and mostly has it sooner: who must let go in the middle of its work has to wait
# for the lock in turn. With Python's own 5 ms a model would wait that long for what takes Python long.
_SWITCH_S = 1e-3

_CLASSIFIER = classifier_pb2.DESCRIPTOR.services_by_name["Classifier"]
_PROTOCOL = open_inference.POOL.FindServiceByName(open_inference.SERVICE)
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
_INFERENCE = frozenset({f"/{_CLASSIFIER.full_name}/Predict", f"/{_PROTOCOL.full_name}/ModelInfer"})
SERVICES = (_CLASSIFIER.full_name, _PROTOCOL.full_name)


class Server:
    """A gRPC server over a repository. Listens from `start` on, and is READY when `load` has returned."""

    def __init__(self, config: ServerConfig, member: Member | None = None) -> None:
        """Read the certificates and tokens. With `member`, one process of several that share the port.

        Raises:
            StartupError: a file of them is wrong.
        """
        self._config = config
        inbox = rpc.Inbox()
        self.repository = Repository(config, inbox.tell)
        self._rpcs = Rpcs()
        self._metrics: Endpoint | None = None
        self._polling: asyncio.Task[None] | None = None
        self._local = Local(self.repository, self._report, self._show, self.snapshot)
        self._member = member
        self._taken_over: set[tuple[str, str]] | None = None  # names and versions to serve, as others do
        self._control: Control = member or self._local
        self._shown: set[str] = set()  # the models that the health service was told of
        self._health = HealthService()
        self._gate = Gate(_INFERENCE, self.repository.check_room, self._rpcs)
        self._tls = tls(config)
        self._guard = TokenGuard(config.token_file) if config.token_file else None
        self._tracing = _tracing(config)
        watched = bool(self._guard or self._tracing)
        overload = Overload(self.repository, self._rpcs, self._gate, watched)
        prepared = PreparedRequests(self.repository)
        self._server = rpc.Server(
            [source.intercept for source in (self._guard, self._tracing) if source],
            transport.options(config, shared_port=member is not None),
            rpc.Limit(_INFERENCE, overload.refuse),
            None
            if watched or config.log_requests == "all"
            else direct(prepared, self._rpcs, self._gate, config.max_message_bytes),
            inbox,
        )
        self._classifier = ClassifierService(self.repository, config, self._rpcs)
        open_inference_service = OpenInferenceService(self.repository, config, self._rpcs, self._control, prepared)
        shared = (self._rpcs, self._gate, config)
        self._server.add_generic_rpc_handlers(
            (
                handler(self._health, _HEALTH, Rpcs(), self._gate, config),  # probes are not counted
                self._gate,
                handler(self._classifier, _CLASSIFIER, *shared),
                handler(open_inference_service, _PROTOCOL, *shared),
                _reflection(),
            )
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
        port = transport.listen(self._server, self._config, self._tls)
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
        statuses, labels = pickle.loads(models)
        self._taken_over = {(status.name, status.version) for status in statuses if status.state is State.READY}
        self.repository.adopt(statuses, labels)
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
        return collect(self.repository, self._rpcs, ready=self.repository.ready())

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
        for service in ("", *SERVICES):
            self._health.set(service, readiness.server)
        for name in {*readiness.models, *self._shown}:
            self._health.set(name, bool(readiness.models.get(name)))
        self._shown = set(readiness.models)

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
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hurry.wait(), self._config.drain_delay_s)
        self._gate.close()
        self._health.close()
        finishing = asyncio.create_task(self._server.stop(self._config.drain_s))
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait({finishing, hurried}, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not finishing.done():
            logger.warning("stopping at once: requests that still run are aborted")
            await self._server.stop(None)
        await finishing
        await asyncio.to_thread(self._classifier.close)
        await asyncio.to_thread(self.repository.close)
        if self._metrics:
            await asyncio.to_thread(self._metrics.close)
        if self._tracing:
            await asyncio.to_thread(self._tracing.close)


def _tracing(config: ServerConfig) -> Tracing | None:
    if config.trace_endpoint is None:
        return None
    try:
        from serving.tracing import Tracing  # only where it is asked for: it may not be installed
    except ImportError as error:
        raise StartupError(
            f"--trace-endpoint needs OpenTelemetry: pip install 'parityserve[tracing]' ({error})"
        ) from error
    return Tracing(config.trace_endpoint)


def _reflection() -> grpc.GenericRpcHandler:
    """grpcio-reflection, of everything in one pool: the protocol's own messages are in none of the others'."""
    pool = DescriptorPool()
    for file in (classifier_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR, _PROTOCOL.file):
        pool.AddSerializedFile(file.serialized_pb)
    names = (*SERVICES, _HEALTH.full_name, reflection.SERVICE_NAME)
    service = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names, pool=pool).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, {"ServerReflectionInfo": service})


def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal cuts the draining short.

    Raises:
        StartupError, DeviceError, BundleError: the server cannot start.
    """
    run(serve_here(config))


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine on the fastest event loop that there is, beside threads that run models."""
    sys.setswitchinterval(_SWITCH_S)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


async def serve_here(config: ServerConfig, member: Member | None = None) -> None:
    """As `serve`, on the loop that runs.

    Args:
        config: every setting.
        member: for one process of several; its supervisor stops it.
    """
    stop = member.stop if member else Stop()
    server = Server(config, member)
    _on_signals(server, stop, member is not None)
    if member and member.role.models:
        server.take_over(member.role.models)
    starting = asyncio.create_task(_start(server, config, member))
    asked = asyncio.create_task(stop.asked.wait())
    try:
        await asyncio.wait({starting, asked}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting  # raises what starting raised
        await asked
        logger.info(
            "stopping: answering on for %g s, then running requests may finish for %g s; a second signal ends it",
            *(config.drain_delay_s, config.drain_s),
        )
    except BaseException:
        stop.asked_again.set()  # nobody is served
        raise
    finally:
        starting.cancel()  # asked to stop so early, it goes no further
        await asyncio.gather(starting, return_exceptions=True)
        await server.stop(stop.asked_again)
    logger.info("stopped")


async def _start(server: Server, config: ServerConfig, member: Member | None) -> None:
    if member and member.role.models:  # in place of one that died: whoever is connected to it finds it READY
        await server.load()
        await server.start()
    else:  # whoever connects can ask how far it is
        address = await server.start()
        logger.info("listening on %s (%s), loading models from %s", address, server.security(), config.repository)
        await server.load()
    gc.freeze()  # what is there by now stays: the collector need not look through it again and again
    if member:
        await member.started()
    else:
        logs.started(address, server.repository.ready())


def _on_signals(server: Server, stop: Stop, is_worker: bool) -> None:
    """SIGTERM and SIGINT ask to stop, and ask again; SIGHUP has certificates and tokens read again.

    A worker is hurried by its supervisor alone: a signal may reach both, from a service manager that signals every
    process of a group, and then counts once.
    """
    if sys.platform == "win32":  # there, Ctrl-C raises KeyboardInterrupt
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.asked.set if is_worker else stop.ask)
    loop.add_signal_handler(signal.SIGHUP, server.reload)
