"""One call: what its handler may ask of it, and what becomes of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, NoReturn, Protocol, TypeAlias

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # types-grpcio has none of it

from serving.rpc.inbox import Inbox
from serving.rpc.stream import NO_FLAGS, Answers, Requests

logger = logging.getLogger(__name__)

Metadata = Sequence[tuple[str, str | bytes]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Direct: TypeAlias = "Callable[[bytes, Call], bool]"

_NEVER_S = 1e12  # 30,000 years: a deadline after that is none


class CallDetails(grpc.HandlerCallDetails):
    """Which method is called, and with which metadata."""

    def __init__(self, method: str, invocation_metadata: Metadata) -> None:
        self.method = method
        self.invocation_metadata = tuple(invocation_metadata)


class Aborted(Exception):
    """Ends a handler whose call was given a status that is an error."""


class Host(Protocol):
    """What a call needs of its server."""

    inbox: Inbox
    limited_calls: int
    calls_told: int
    calls_run: int

    @property
    def direct(self) -> Direct | None:
        """What may see to a call that was read first."""

    @property
    def find(self) -> Callable[[CallDetails], Handler | None]:
        """What finds the handler."""

    def run(self, answer: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is kept until it is done."""


class Call:
    """What a handler knows as its context."""

    __slots__ = (
        "_answers",
        "_code",
        "_core",
        "_counted",
        "_deadline",
        "_details",
        "_direct",
        "_first",
        "_gone",
        "_server",
        "_started",
        "_task",
        "_trailing",
        "details",
    )

    def __init__(self, server: Host, event: Any, method: str, counted: bool) -> None:
        self.details = CallDetails(method, event.invocation_metadata)
        self._server = server
        self._core = event.call
        self._deadline: float = event.call_details.deadline  # seconds since 1970
        self._counted = counted  # in `limited_calls`
        self._direct = False  # whether no handler hears of it
        self._first: Any = None  # the event that has the first request, where the pump has read it
        self._task: asyncio.Task[None] | None = None
        self._answers: Answers | None = None  # of a stream
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

    def fail(self, code: grpc.StatusCode, details: str, trailing_metadata: Metadata) -> None:
        """End the call with this status, where no handler does: from any thread."""
        self._code, self._details, self._trailing = code, details, trailing_metadata
        self.end()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call with this status, and the handler with an exception."""
        self._code, self._details, self._trailing = code, details, trailing_metadata
        raise Aborted(details)

    # The core's side of it.

    def begin(self, read: bool) -> None:
        """On the pump: be told when the client goes, and read the first request where that is asked for."""
        self._server.limited_calls += self._counted
        self._core.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(NO_FLAGS),), self._closed)
        if read:
            self._core.start_server_batch((cygrpc.ReceiveMessageOperation(NO_FLAGS),), self._read)
        else:
            self._server.inbox.tell(self._run, None)

    def _read(self, event: Any) -> None:
        direct = self._server.direct
        if direct and not self._gone and (data := event.batch_operations[0].message()) is not None:
            self._direct = self._seen_to(direct, data)
            if self._direct:
                return
        self._server.calls_told += 1
        self._server.inbox.tell(self._run_first, event)

    def _seen_to(self, direct: Direct, data: bytes) -> bool:
        try:
            return direct(data, self)
        except Exception:
            self._failed()
            self.end()
            return True

    def _failed(self) -> None:
        """In the handling of an exception that was not foreseen."""
        logger.exception("unexpected error in %s", self.details.method)
        self._code, self._details = grpc.StatusCode.UNKNOWN, "internal error"

    def _run_first(self, event: Any) -> None:
        self._server.calls_run += 1
        self._run(event)

    def _closed(self, event: Any) -> None:
        self._server.limited_calls -= self._counted
        if event.batch_operations[0].cancelled():
            self._gone = True
            if not self._direct:
                self._server.inbox.tell(self._leave)

    def _leave(self, _: None) -> None:
        """On the loop: nobody waits for the answer any more."""
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
            self._failed()
        if self._answers:
            await self._answers.sent()
        self.end()

    async def _unary(self, handler: Handler) -> None:
        answer: Callable[[Any, Call], Awaitable[Any]] = handler.unary_unary  # type: ignore[assignment]  # of threads
        event, self._first = self._first, None  # or the request would be kept as long as the call
        if event is None:
            event = await self._perform(cygrpc.ReceiveMessageOperation(NO_FLAGS))
        if (data := event.batch_operations[0].message()) is None:
            await self.abort(grpc.StatusCode.UNIMPLEMENTED, f"{self.details.method} needs one request, got none")
        request = handler.request_deserializer(data) if handler.request_deserializer else data
        self.end(_encoded(await answer(request, self), handler))

    async def _stream(self, handler: Handler) -> None:
        answer: Callable[[Requests, Call], Any] = handler.stream_stream  # type: ignore[assignment]  # of threads
        inbox = self._server.inbox
        answers = answer(Requests(self._core, inbox, handler.request_deserializer), self)
        if not hasattr(answers, "__aiter__"):
            await answers
            return
        self._answers = Answers(self._core, inbox, self._beginning)
        async with aclosing(answers):
            async for response in answers:
                await self._answers.send(_encoded(response, handler))

    def _beginning(self) -> tuple[Any, ...]:
        """What has to be sent before anything else, once."""
        if self._started:
            return ()
        self._started = True
        return (cygrpc.SendInitialMetadataOperation((), NO_FLAGS),)

    def _perform(self, *operations: Any) -> asyncio.Future[Any]:
        """Have the core do something; the future is of its event."""
        future = self._server.inbox.loop.create_future()

        def done(event: Any) -> None:
            self._server.inbox.tell(_set, (future, event))

        self._core.start_server_batch(operations, done)
        return future

    def end(self, answer: bytes | None = None) -> None:
        """Send the status, after the answer where there is one. From any thread; nobody waits until it is sent."""
        send = () if answer is None else (cygrpc.SendMessageOperation(answer, NO_FLAGS),)
        number: int = self._code.value[0]
        status = cygrpc.SendStatusFromServerOperation(self._trailing, number, self._details.encode(), NO_FLAGS)
        self._core.start_server_batch((*self._beginning(), *send, status), nothing)


def _encoded(response: Any, handler: Handler) -> bytes:
    return handler.response_serializer(response) if handler.response_serializer else response


def _set(waited: tuple[asyncio.Future[Any], Any]) -> None:
    future, event = waited
    if not future.done():
        future.set_result(event)


def nothing(_: Any) -> None:
    """What the end of an operation needs that nobody waits for."""
