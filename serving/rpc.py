"""A gRPC server for asyncio that costs less than half of what `grpc.aio` does for each call.

`grpc.aio` runs several tasks for a call, and wakes the event loop for each of the core's events. This server takes
them from the core's completion queue on a thread of its own, the pump, which does what needs no decision; the loop is
told once for all that came meanwhile. It has what this project's services need of `grpc.aio.Server` and no more, under
the same names. One more thing differs: a batch of operations that fails gives its memory back
(https://github.com/grpc/grpc/issues/43360).

`grpc._cython.cygrpc` is not public. It is what both of grpcio's own servers are written in, `grpc._server` alike to
this one; nothing else here knows of it, and the versions of grpcio that are tested are named in pyproject.toml.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, NoReturn, TypeAlias

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # types-grpcio has none of it

logger = logging.getLogger(__name__)

Metadata = Sequence[tuple[str, str | bytes]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Find = Callable[["CallDetails"], "Handler | None"]
Interceptor = Callable[["CallDetails", Find], "Handler | None"]

_NO_FLAGS = 0
_NEVER_S = 1e12  # 30,000 years: a deadline after that is none
_ASKED = 32  # calls that the core may hand over at once
_DRAINED = 256  # events that are handled before the loop has a turn
_COUNTED_S = 0.01  # refused calls are counted so late: to wake the loop for each would cost more than to refuse it


class CallDetails(grpc.HandlerCallDetails):
    """Which method is called, and with which metadata."""

    def __init__(self, method: str, invocation_metadata: Metadata) -> None:
        self.method = method
        self.invocation_metadata = tuple(invocation_metadata)


class Refusal(NamedTuple):
    """How a call ends that no handler hears of."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: Metadata
    counted: Callable[[str], None]  # told the method, on the loop


class Limit(NamedTuple):
    """Which calls are refused on the pump: what the loop does not hear of costs it nothing."""

    methods: Collection[str]  # `/service/method`; other calls wait as long as it takes
    refuse: Callable[[int, int], Refusal | None]  # asked for each, on the pump, with what `Server.waiting` gives


class Aborted(Exception):
    """Ends a handler whose call was given a status that is an error."""


class Call:
    """One call: what a handler knows as its context, and where a stream's requests come from."""

    __slots__ = (
        "_code",
        "_core",
        "_deadline",
        "_details",
        "_first",
        "_gone",
        "_server",
        "_started",
        "_task",
        "_trailing",
        "details",
        "parse",
    )

    def __init__(self, server: Server, event: Any, method: str) -> None:
        self.details = CallDetails(method, event.invocation_metadata)
        self.parse: Callable[[bytes], Any] | None = None
        self._server = server
        self._core = event.call
        self._deadline: float = event.call_details.deadline  # seconds since 1970
        self._first: Any = None  # the event that has the first request, where the pump has read it
        self._task: asyncio.Task[None] | None = None
        self._gone = False
        self._started = False  # whether initial metadata were sent
        self._code: grpc.StatusCode = grpc.StatusCode.OK
        self._details = ""
        self._trailing: Metadata = ()

    # What handlers use, as `grpc.aio.ServicerContext` has it.

    def invocation_metadata(self) -> Metadata:
        """What the client sent with the call."""
        return self.details.invocation_metadata

    def peer(self) -> str:
        """The client's address, such as ipv4:127.0.0.1:50000."""
        return str(self._core.peer().decode())

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None where the call has none."""
        return None if self._deadline > _NEVER_S else max(0.0, self._deadline - time.time())

    def cancelled(self) -> bool:
        """Whether the client has gone or does not wait any more."""
        return self._gone

    def code(self) -> grpc.StatusCode:
        """The status that was set, OK before."""
        return self._code

    def set_code(self, code: grpc.StatusCode) -> None:
        """End with this status."""
        self._code = code

    def set_details(self, details: str) -> None:
        """End with this text."""
        self._details = details

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        """End with these metadata."""
        self._trailing = trailing_metadata

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call with this status, and the handler with an exception."""
        self._code, self._details, self._trailing = code, details, trailing_metadata
        raise Aborted(details)

    # The requests.

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        if self._first is not None:
            event, self._first = self._first, None
        else:
            event = await self._perform(cygrpc.ReceiveMessageOperation(_NO_FLAGS))
        if (data := event.batch_operations[0].message()) is None:
            raise StopAsyncIteration
        return self.parse(data) if self.parse else data

    # The core's side of it.

    def begin(self, read: bool) -> None:
        """On the pump: be told when the client goes, and read the first request where that is asked for."""
        self._core.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._closed)
        if read:
            self._core.start_server_batch((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), self._read)
        else:
            self._server.tell(self._run, None)

    def _read(self, event: Any) -> None:
        self._server.calls_told += 1
        self._server.tell(self._run_first, event)

    def _run_first(self, event: Any) -> None:
        self._server.calls_run += 1
        self._run(event)

    def _closed(self, event: Any) -> None:
        if event.batch_operations[0].cancelled():
            self._server.tell(self._leave, None)

    def _leave(self, _: None) -> None:
        """On the loop: nobody waits for the answer any more."""
        self._gone = True
        if self._task:
            self._task.cancel()

    def _run(self, first: Any) -> None:
        """On the loop: have the call answered."""
        self._first = first
        if not self._gone:
            self._task = self._server.run(self._answer())

    async def _answer(self) -> None:
        try:
            handler = self._server.find(self.details)
            if handler is None:
                self._code, self._details = grpc.StatusCode.UNIMPLEMENTED, "Method not found!"
            elif handler.unary_unary:
                await self._unary(handler)
                return
            else:
                await self._stream(handler)
        except Aborted:
            pass
        except Exception:
            logger.exception("unexpected error in %s", self.details.method)
            self._code, self._details = grpc.StatusCode.UNKNOWN, "internal error"
        self._end()

    async def _unary(self, handler: Handler) -> None:
        self.parse = handler.request_deserializer
        answer: Callable[[Any, Call], Awaitable[Any]] = handler.unary_unary  # type: ignore[assignment]  # of threads
        async for request in self:
            self._end(_encoded(await answer(request, self), handler))
            return
        await self.abort(grpc.StatusCode.UNIMPLEMENTED, f"{self.details.method} needs one request, got none")

    async def _stream(self, handler: Handler) -> None:
        self.parse = handler.request_deserializer
        answer: Callable[[Call, Call], Any] = handler.stream_stream  # type: ignore[assignment]  # of threads
        answers = answer(self, self)
        if not hasattr(answers, "__aiter__"):
            await answers
            return
        async with aclosing(answers):
            async for response in answers:
                send = cygrpc.SendMessageOperation(_encoded(response, handler), _NO_FLAGS)
                await self._perform(*self._beginning(), send)

    def _beginning(self) -> tuple[Any, ...]:
        """What has to be sent before anything else, once."""
        if self._started:
            return ()
        self._started = True
        return (cygrpc.SendInitialMetadataOperation((), _NO_FLAGS),)

    def _perform(self, *operations: Any) -> asyncio.Future[Any]:
        """Have the core do something; the future is of its event."""
        future = self._server.loop.create_future()

        def done(event: Any) -> None:
            self._server.tell(_set, (future, event))

        self._core.start_server_batch(operations, done)
        return future

    def _end(self, answer: bytes | None = None) -> None:
        """Send the status, after the answer where there is one. Nobody waits until it is sent."""
        send = () if answer is None else (cygrpc.SendMessageOperation(answer, _NO_FLAGS),)
        number: int = self._code.value[0]
        status = cygrpc.SendStatusFromServerOperation(self._trailing, number, self._details.encode(), _NO_FLAGS)
        self._core.start_server_batch((*self._beginning(), *send, status), _nothing)


def _encoded(response: Any, handler: Handler) -> bytes:
    return handler.response_serializer(response) if handler.response_serializer else response


def _set(waited: tuple[asyncio.Future[Any], Any]) -> None:
    future, event = waited
    if not future.done():
        future.set_result(event)


def _nothing(_: Any) -> None: ...


class Server:
    """Listens on ports and has calls answered by handlers, on the event loop that `start` is called on."""

    def __init__(
        self,
        interceptors: Sequence[Interceptor] = (),
        options: Sequence[tuple[str, int]] = (),
        read_first: Collection[str] = (),
        limit: Limit | None = None,
    ) -> None:
        """Not listening yet.

        Args:
            interceptors: each is called for every call before it is read, the first one first, with what finds the
                handler otherwise; it gives the handler.
            options: the core's channel arguments.
            read_first: methods, `/service/method`, whose first request is read before a handler is looked for: one
                hand-over less. What could be refused unread should not be among them, save to save that time.
            limit: what is refused before the loop hears of it.
        """
        self.loop: asyncio.AbstractEventLoop
        self.find: Find = self._find
        for interceptor in reversed(interceptors):
            self.find = _around(interceptor, self.find)
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._read_first = frozenset(read_first)
        self._core = cygrpc.Server(tuple((name.encode(), value) for name, value in options), False)
        self._queue = cygrpc.CompletionQueue()
        self._core.register_completion_queue(self._queue)
        self._inbox: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._told = False  # whether the loop will look into the inbox
        self.calls_told = 0  # of the calls that are read first; counted by the pump
        self.calls_run = 0  # of those; counted by the loop
        self._tasks: set[asyncio.Task[None]] = set()
        self._pump = threading.Thread(target=self._poll, name="grpc-pump", daemon=True)
        self._limit = limit
        self._refused: deque[tuple[Refusal, str]] = deque()  # that are not counted yet, and their methods
        self._counting = False  # whether they will be
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
        self.loop = asyncio.get_running_loop()
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
        task = self.loop.create_task(answer)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def tell(self, callback: Callable[[Any], None], argument: Any) -> None:
        """On the pump: have something called on the loop."""
        self._inbox.append((callback, argument))
        if not self._told:
            self._told = True
            self.loop.call_soon_threadsafe(self._listen)

    def waiting(self) -> tuple[int, int]:
        """On the pump: how many events wait for the loop, and how many of them are calls that were read first."""
        return len(self._inbox), self.calls_told - self.calls_run

    def _listen(self) -> None:
        self._told = False  # what comes from here on tells again
        inbox = self._inbox
        for _ in range(min(len(inbox), _DRAINED)):
            callback, argument = inbox.popleft()
            callback(argument)
        if inbox and not self._told:
            self._told = True
            self.loop.call_soon(self._listen)

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
        if limit and method in limit.methods and (refusal := limit.refuse(*self.waiting())):
            self._refuse(event.call, refusal, method)
        else:
            Call(self, event, method).begin(read=method in self._read_first)

    def _refuse(self, core: Any, refusal: Refusal, method: str) -> None:
        """On the pump: end a call unread, with one event of the core and at most one for the loop."""
        number, details = refusal.code.value[0], refusal.details.encode()
        operations = (
            cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),
            cygrpc.SendInitialMetadataOperation((), _NO_FLAGS),
            cygrpc.SendStatusFromServerOperation(refusal.trailing_metadata, number, details, _NO_FLAGS),
        )
        core.start_server_batch(operations, _nothing)
        self._refused.append((refusal, method))
        if not self._counting:
            self._counting = True
            self.tell(self._count_soon, None)

    def _count_soon(self, _: None) -> None:
        self.loop.call_later(_COUNTED_S, self._count)

    def _count(self) -> None:
        self._counting = False  # what comes from here on tells again
        while self._refused:
            refusal, method = self._refused.popleft()
            refusal.counted(method)

    def _ask(self) -> None:
        """Let the core hand over one more call."""
        with self._asking:
            if not self._stopping:
                self._core.request_call(self._queue, self._queue, self._called)

    def _shut_down(self, _: Any) -> None:
        """Every call has ended."""
        self._queue.shutdown()
        self.tell(lambda _: self._stopped.set(), None)

    def _find(self, details: CallDetails) -> Handler | None:
        for handler in self._handlers:
            if found := handler.service(details):
                return found
        return None


def _around(interceptor: Interceptor, find: Find) -> Find:
    return lambda details: interceptor(details, find)


def _bound(address: str, port: int) -> int:
    if port == 0:
        raise RuntimeError(f"{address} cannot be bound")
    return port
