"""The server: ports, the pump, and which handler answers a call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # types-grpcio has none of it

from serving.rpc.call import Call, CallDetails, Direct, Handler, Metadata, nothing
from serving.rpc.inbox import Inbox
from serving.rpc.stream import NO_FLAGS

logger = logging.getLogger(__name__)

Find = Callable[[CallDetails], "Handler | None"]
Interceptor = Callable[[CallDetails, Find], "Handler | None"]

_ASKED = 32  # calls that the core may hand over at once


class Refusal(NamedTuple):
    """How a call ends that no handler hears of."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: Metadata


class Limit(NamedTuple):
    """Which calls are refused on the pump: what the loop does not hear of costs it nothing."""

    methods: Collection[str]  # `/service/method`; other calls wait as long as it takes
    refuse: Callable[[str, int, int], Refusal | None]  # asked for each on the pump, with what `Server.waiting` gives


class Server:
    """Listens on ports and has calls answered by handlers, on the event loop that `start` is called on."""

    def __init__(
        self,
        interceptors: Sequence[Interceptor] = (),
        options: Sequence[tuple[str, int]] = (),
        read_first: Collection[str] = (),
        limit: Limit | None = None,
        direct: Direct | None = None,
    ) -> None:
        """Not listening yet.

        Args:
            interceptors: each is called for every call before it is read, the first one first, with what finds the
                handler otherwise; it gives the handler.
            options: the core's channel arguments.
            read_first: methods of one request, `/service/method`, that are read before a handler is looked for: one
                hand-over less. What could be refused unread should not be among them, save to save that time.
            limit: what is refused before the loop hears of it.
            direct: asked on the pump for each call that was read first, with its request. True: the call will be ended
                by `Call.end` or `Call.fail`, on whichever thread, and no interceptor or handler hears of it. Must not
                block.
        """
        self.inbox = Inbox()
        self.find: Find = self._find
        for interceptor in reversed(interceptors):
            self.find = _around(interceptor, self.find)
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._read_first = frozenset(read_first)
        with _starting_threads_that_wait():
            self._core = cygrpc.Server(tuple((name.encode(), value) for name, value in options), False)
            self._queue = cygrpc.CompletionQueue()
        self._core.register_completion_queue(self._queue)
        self.limited_calls = 0  # of the methods of `limit`, that began before `drain` and have not ended; by the pump
        self._draining = False
        self.calls_told = 0  # of the calls that are read first; counted by the pump
        self.calls_run = 0  # of those; counted by the loop
        self._tasks: set[asyncio.Task[None]] = set()
        self._pump = threading.Thread(target=self._poll, name="grpc-pump", daemon=True)
        self._limit = limit
        self.direct = direct
        self._asking = threading.Lock()  # the core fails when it is asked for a call after its shutdown
        self._stopping = False
        self._stopped = asyncio.Event()

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """More handlers; the first that has one for a call answers it."""
        self._handlers += handlers

    def add_insecure_port(self, address: str) -> int:
        """Bind an address `host:port` in plain text; returns the port.

        Raises:
            RuntimeError: it cannot be bound.
        """
        return _bound(address, self._core.add_http2_port(address.encode()))

    def add_secure_port(self, address: str, credentials: grpc.ServerCredentials) -> int:
        """As `add_insecure_port`, with TLS."""
        core = credentials._credentials  # type: ignore[attr-defined]
        return _bound(address, self._core.add_http2_port(address.encode(), core))

    async def start(self) -> None:
        """Answer calls."""
        self.inbox.loop = asyncio.get_running_loop()
        with _starting_threads_that_wait():
            self._core.start()
            for _ in range(_ASKED):
                self._ask()
            self._pump.start()

    async def stop(self, grace: float | None) -> None:
        """Take no more calls, let those that run finish for `grace` seconds, and cancel the rest."""
        if not self._pump.is_alive():
            return
        with self._asking:
            if not self._stopping:
                self._stopping = True
                self._core.shutdown(self._queue, self._shut_down)
        try:
            await asyncio.wait_for(self._stopped.wait(), grace or 0)
        except TimeoutError:
            self._core.cancel_all_calls()
            await self._stopped.wait()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.to_thread(self._pump.join)

    def run(self, answer: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is kept until it is done."""
        task = self.inbox.loop.create_task(answer)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def drain(self) -> Callable[[], int]:
        """What tells how many calls of the methods of `limit` still run that have begun by now."""
        self._draining = True
        return lambda: self.limited_calls

    def waiting(self) -> tuple[int, int]:
        """On the pump: how many events wait for the loop, and how many of them are calls that were read first."""
        return len(self.inbox), self.calls_told - self.calls_run

    def _poll(self) -> None:
        """The pump: every event of the core, until there will be no more."""
        poll = self._queue.poll
        while True:
            event = poll()
            if event.completion_type == cygrpc.CompletionType.queue_shutdown:
                return
            try:
                event.tag(event)
            except Exception:  # the other calls must go on
                logger.exception("unexpected error in the server")
            del event  # or a call would live until the next event comes

    def _called(self, event: Any) -> None:
        if not event.success:  # the server stops
            return
        self._ask()
        method = event.call_details.method.decode()
        limit = self._limit
        limited = limit is not None and method in limit.methods
        if limit and limited and (refusal := limit.refuse(method, *self.waiting())):
            _refuse(event.call, refusal)
        else:
            counted = limited and not self._draining
            Call(self, event, method, counted).begin(read=method in self._read_first)

    def _ask(self) -> None:
        """Let the core hand over one more call."""
        with self._asking:
            if not self._stopping:
                self._core.request_call(self._queue, self._queue, self._called)

    def _shut_down(self, _: Any) -> None:
        """Every call has ended."""
        self._queue.shutdown()
        self.inbox.tell(lambda _: self._stopped.set())

    def _find(self, details: CallDetails) -> Handler | None:
        for handler in self._handlers:
            if found := handler.service(details):
                return found
        return None


@contextlib.contextmanager
def _starting_threads_that_wait() -> Iterator[None]:
    """Threads that are started meanwhile interrupt no other that computes, such as a model's, but wait their turn.

    They have a little to do for each event, and in overload there are thousands a second. Where a core is idle nothing
    changes: https://man7.org/linux/man-pages/man7/sched.7.html, SCHED_BATCH.
    """
    if sys.platform != "linux" or os.sched_getscheduler(0) != os.SCHED_OTHER:  # what somebody chose stays
        yield
        return
    with contextlib.suppress(PermissionError):  # a sandbox may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _refuse(core: Any, refusal: Refusal) -> None:
    """On the pump: end a call unread, with one event of the core."""
    number, details = refusal.code.value[0], refusal.details.encode()
    operations = (
        cygrpc.ReceiveCloseOnServerOperation(NO_FLAGS),
        cygrpc.SendInitialMetadataOperation((), NO_FLAGS),
        cygrpc.SendStatusFromServerOperation(refusal.trailing_metadata, number, details, NO_FLAGS),
    )
    core.start_server_batch(operations, nothing)


def _around(interceptor: Interceptor, find: Find) -> Find:
    return lambda details: interceptor(details, find)


def _bound(address: str, port: int) -> int:
    if port == 0:
        raise RuntimeError(f"{address} cannot be bound")
    return port
