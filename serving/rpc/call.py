"""One call: what its handler may ask of it, and what becomes of it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, NoReturn, Protocol, TypeAlias

import grpc

from serving.rpc import frames, messages
from serving.rpc.headers import Head, Metadata, trailers, trailers_only
from serving.rpc.options import Options
from serving.rpc.outgoing import Outgoing
from serving.rpc.stream import AHEAD_BYTES, Requests

logger = logging.getLogger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_SMALL = 1 << 12  # bytes of a piece of a request, which the next is added to: many small ones would take much memory
_TURN = 32  # answers of a stream, after which others have theirs
WINDOW = 1 << 20  # bytes that a client may send for a call before it is told that there is room for more


class Aborted(Exception):
    """Ends a handler whose call was given a status that is an error."""


class Carrier(Protocol):
    """What a call needs of its connection."""

    peer: str  # the client's address

    def hold(self, size: int) -> bool:
        """Keep so many bytes more of requests, or fewer; whether there is room for them."""

    def reset(self, call: Call, code: int) -> None:
        """End a call whose client has broken the protocol."""


class Host(Protocol):
    """What a call needs of its server."""

    options: Options
    starting: int

    def complete(self, call: Call, data: bytes) -> None:
        """The only request of a call is there."""

    def run(self, answer: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is kept until it is done."""


class Call:
    """What a handler knows as its context. Everything but `cancelled` belongs to the event loop."""

    # As most calls leave it: what a call does not need costs it nothing.
    handler: Handler | None = None  # of a unary call, where it was found before the request was there
    half_closed = False  # the client sends no more
    unsent: deque[memoryview] | None = None  # answers that the windows do not let out yet
    last: bytes | None = None  # the header block that comes after them
    deadline_ns: float = math.inf  # as `time.monotonic_ns()` counts; the event loop's clock moves in steps
    _expiry: asyncio.TimerHandle | None = None
    _room = WINDOW  # bytes that may be received
    _parts: list[bytes] | None = None  # of the only request
    _held = 0  # bytes of requests that the connection keeps
    _answers = 0  # of a stream, that were sent
    _requests: Requests | None = None  # of a stream
    _sender: asyncio.Future[None] | None = None  # waits until answers were sent
    _task: asyncio.Task[None] | None = None
    _starting = False  # counted in the server's `starting`
    _begun = False  # whether anything was sent
    _over = False  # whether it was ended from here
    _gone = False  # whether nobody waits any more
    _code = grpc.StatusCode.OK
    _details = ""
    _trailing: Metadata = ()

    def __init__(
        self, host: Host, connection: Carrier, outgoing: Outgoing, stream: int, head: Head, limited: bool
    ) -> None:
        """Begun.

        Args:
            host: the server.
            connection: that it came over.
            outgoing: what is sent over that.
            stream: its number there.
            head: what its headers say.
            limited: to be counted in the server's `starting`.
        """
        self.details = head.details
        self.stream = stream
        self.window = outgoing.first_window  # bytes that may be sent
        self._host = host
        self._connection = connection
        self._outgoing = outgoing
        self._encoding = head.encoding
        self._limited = limited
        if head.timeout_s is not None:
            self.deadline_ns = time.monotonic_ns() + 1e9 * head.timeout_s

    # What handlers use, as `grpc.aio.ServicerContext` has it.

    def invocation_metadata(self) -> Metadata:
        """What the client sent with the call."""
        return self.details.invocation_metadata

    def peer(self) -> str:
        """The client's address, such as ipv4:127.0.0.1:50000."""
        return self._connection.peer

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None where the call has none."""
        return None if self.deadline_ns == math.inf else max(0.0, self.deadline_ns - time.monotonic_ns()) / 1e9

    def cancelled(self) -> bool:
        """Whether the client has gone or does not wait any more; from any thread."""
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

    # How a call is answered.

    def start(self, handler: Handler, data: bytes | None = None) -> None:
        """Have a handler answer: a unary one its only request, which must be given, a stream whatever comes."""
        self.watch()
        if handler.stream_stream:
            parse = handler.request_deserializer
            requests = self._requests = Requests(self, self._encoding, self._host.options.max_message_bytes, parse)
            if data is not None:
                requests.received(messages.prefixed(data), ends=True)
            self._task = self._host.run(self._guarded(self._stream, handler, requests))
        else:
            assert data is not None
            self._starting = self._limited
            self._host.starting += self._starting
            self._task = self._host.run(self._guarded(self._unary, handler, data))

    def fail(self, code: grpc.StatusCode, details: str, trailing_metadata: Metadata = ()) -> None:
        """End the call with this status, where no handler does."""
        self._code, self._details, self._trailing = code, details, trailing_metadata
        self.end()

    def fault(self) -> None:
        """End the call in the handling of an exception that was not foreseen."""
        logger.exception("unexpected error in %s", self.details.method)
        self.fail(grpc.StatusCode.UNKNOWN, "internal error")

    def end(self, answer: bytes | None = None) -> None:
        """Send the status, after the answer where there is one; nobody waits until it is sent."""
        if self._over or self._gone:
            return
        if answer is not None and len(answer) > self._host.options.max_answer_bytes:
            problem, answer = self._too_large(answer), None
            self._code, self._details, self._trailing = grpc.StatusCode.RESOURCE_EXHAUSTED, problem, ()
        self._over = True
        outgoing = self._outgoing
        if answer is not None and self._code is grpc.StatusCode.OK and not self._trailing:
            outgoing.answer(self, answer)
            return
        status = (int(self._code.value[0]), self._details, tuple(self._trailing))
        if answer is not None:
            self._begin()
            outgoing.send(self, answer)
        outgoing.end(self, trailers(*status) if self._begun else trailers_only(*status))

    async def _guarded(self, answer: Callable[[Handler, Any], Awaitable[None]], handler: Handler, asked: Any) -> None:
        try:
            await answer(handler, asked)
        except Aborted:
            self.end()
        except asyncio.CancelledError:  # not by `leave`: what it waited for was
            self.fail(grpc.StatusCode.CANCELLED, "")
            raise
        except Exception:
            self.fault()

    async def _unary(self, handler: Handler, data: bytes) -> None:
        self._has_started()
        answer: Callable[[Any, Call], Awaitable[Any]] = handler.unary_unary  # type: ignore[assignment]  # of threads
        request = handler.request_deserializer(data) if handler.request_deserializer else data
        self.end(_encoded(await answer(request, self), handler))

    async def _stream(self, handler: Handler, requests: Requests) -> None:
        answer: Callable[[Requests, Call], Any] = handler.stream_stream  # type: ignore[assignment]  # of threads
        answers = answer(requests, self)
        if hasattr(answers, "__aiter__"):
            async with aclosing(answers):
                async for response in answers:
                    self._begin()
                    encoded = _encoded(response, handler)
                    if len(encoded) > self._host.options.max_answer_bytes:
                        await self.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, self._too_large(encoded))
                    self._outgoing.send(self, encoded)
                    await self._take_turns()
        else:
            await answers
        self.end()

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._outgoing.begin(self)

    def _too_large(self, answer: bytes) -> str:
        most = self._host.options.max_answer_bytes
        return f"the answer has {len(answer)} bytes, of which at most {most} may be sent"

    async def _take_turns(self) -> None:
        """Wait until the client has taken most of the answers."""
        while self.unsent and sum(map(len, self.unsent)) >= AHEAD_BYTES and not self._gone:
            self._sender = asyncio.get_running_loop().create_future()
            try:
                await self._sender
            finally:
                self._sender = None
        await self._outgoing.room()
        self._answers += 1
        if self._answers % _TURN == 0:
            await asyncio.sleep(0)  # or a handler that never waits would leave no time to others

    # What its connection tells.

    def received(self, payload: bytes, size: int, ends: bool) -> None:
        """Bytes of a request came, in a frame of `size`; with `ends`, no more will."""
        if ends and self._parts is None and self._requests is None and payload[:1] == b"\0":
            length, most = len(payload) - messages.PREFIX_BYTES, self._host.options.max_message_bytes
            if int.from_bytes(payload[1 : messages.PREFIX_BYTES], "big") == length <= most:
                self.half_closed = True  # the only request, in one piece, as most are
                self._host.complete(self, payload[messages.PREFIX_BYTES :])
                return
        self._room -= size
        if self._room < 0:
            self._connection.reset(self, frames.FLOW_CONTROL_ERROR)
            return
        self.half_closed = ends
        try:
            if self._requests:
                self._hold(len(payload))
                self._requests.received(payload, ends)
            else:
                self._collect(payload, ends)
        except messages.Unreadable as problem:
            self.refuse(problem)

    def sent(self) -> None:
        """The windows have let out all answers there were."""
        if self._sender and not self._sender.done():
            self._sender.set_result(None)

    def leave(self) -> None:
        """Nobody waits for the answer any more."""
        self._gone = True
        if self._task:
            self._task.cancel()

    def expel(self, text: str) -> None:
        """End the call because the server wants no more of it."""
        self.fail(grpc.StatusCode.UNAVAILABLE, text)
        self.leave()

    def forgotten(self) -> None:
        """It has been ended, or its client has gone."""
        if self._starting:
            self._has_started()
        if self._held:
            self.taken(self._held)
        if self._expiry:
            self._expiry.cancel()
            self._expiry = None

    def watch(self) -> None:
        """End it at its deadline."""
        if self._expiry is None and (remaining_s := self.time_remaining()) is not None:
            self._expiry = asyncio.get_running_loop().call_later(remaining_s, self._expire)

    def _has_started(self) -> None:
        """Its handler runs, or never will."""
        self._host.starting -= self._starting
        self._starting = False

    def _expire(self) -> None:
        if self._over:  # its answers wait for the client's window
            self._connection.reset(self, frames.CANCEL)
            return
        self.fail(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed")
        self.leave()

    def _collect(self, payload: bytes, ends: bool) -> None:
        """The only request, piece by piece."""
        most = self._host.options.max_message_bytes
        if self._parts is None:
            self._parts = []
        parts = self._parts
        if parts and len(parts[-1]) < _SMALL:
            parts[-1] += payload
        elif payload:
            parts.append(payload)
        self._hold(len(payload))
        size = messages.size(parts[0], most) if parts and len(parts[0]) >= messages.PREFIX_BYTES else 0
        if size and self._held > size:
            raise self._wants_one("more")
        if not ends:
            self.widen()
            return
        if not size or self._held < size:
            raise self._wants_one("the beginning of one" if parts else "none")
        data = b"".join(parts)
        parts.clear()
        self.taken(size)
        self._host.complete(self, messages.content(data, self._encoding, most))

    def _wants_one(self, got: str) -> messages.Unreadable:
        problem = f"{self.details.method} needs one request, got {got}"
        return messages.Unreadable(grpc.StatusCode.UNIMPLEMENTED, problem)

    def _hold(self, size: int) -> None:
        self._held += size
        if not self._connection.hold(size):
            problem = "the unfinished requests of this connection take too much memory"
            raise messages.Unreadable(grpc.StatusCode.RESOURCE_EXHAUSTED, problem)

    # What its stream of requests tells, too.

    def taken(self, size: int) -> None:
        """Bytes of a request need not be kept any more."""
        size = min(size, self._held)  # a call that was forgotten holds none
        self._held -= size
        self._connection.hold(-size)

    def refuse(self, problem: messages.Unreadable) -> None:
        """End the call because of a request that cannot be taken in."""
        self.fail(problem.code, str(problem))
        self.leave()

    def widen(self) -> None:
        """Let the client send more, where it may send little."""
        if self._room < WINDOW // 2 and not self.half_closed and not self._gone:
            self._outgoing.more(self.stream, WINDOW - self._room)
            self._room = WINDOW


def _encoded(response: Any, handler: Handler) -> bytes:
    return handler.response_serializer(response) if handler.response_serializer else response
