"""The server: where it listens, which handler answers a call, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple

import grpc

from serving.rpc.call import Call, Handler
from serving.rpc.connection import LINGERS_S, Connection
from serving.rpc.headers import CallDetails, Head, Metadata, trailers_only
from serving.rpc.inbox import Inbox
from serving.rpc.options import Options
from serving.rpc.outgoing import Outgoing

Find = Callable[[CallDetails], "Handler | None"]
Interceptor = Callable[[CallDetails, Find], "Handler | None"]

_BACKLOG = 1024  # connections that wait to be taken


class Refusal:
    """How calls end that no handler hears of; the same one may do so for many."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing_metadata: Metadata) -> None:
        self.code = code
        self.details = details
        self.trailing_metadata = trailing_metadata
        self.block = trailers_only(code.value[0], details, tuple(trailing_metadata))  # the headers that say it


class Limit(NamedTuple):
    """Which calls are refused before they are read: that costs least."""

    methods: Collection[str]  # `/service/method`; other calls wait as long as it takes
    refuse: Callable[[str, int], Refusal | None]  # asked for each, with how many have not come to their handlers yet


class Direct(NamedTuple):
    """What may see to unary calls before a handler is looked for."""

    methods: Collection[str]  # `/service/method`
    begin: Callable[[bytes, Call], bool]  # given the request; True: the call will be ended by `Call.end` or `Call.fail`


class Server:
    """Listens on ports and has calls answered by handlers, on the event loop that `start` is called on."""

    def __init__(
        self,
        interceptors: Sequence[Interceptor] = (),
        options: Options | None = None,
        limit: Limit | None = None,
        direct: Direct | None = None,
        inbox: Inbox | None = None,
    ) -> None:
        """Not listening yet.

        Args:
            interceptors: each is called for every call before it is read, the first one first, with what finds the
                handler otherwise; it gives the handler.
            options: how connections behave.
            limit: what is refused before anything else hears of it.
            direct: asked for calls of its methods; where it does not see to one, interceptors and handlers hear of it.
            inbox: where other threads have things done that concern calls; works from `start` on.
        """
        self.options = options or Options()
        self.inbox = inbox or Inbox()
        self.starting = 0  # calls of the methods of `limit` that have been read, and whose handlers do not run yet
        self._find: Find = self._handler
        for interceptor in reversed(interceptors):
            self._find = _around(interceptor, self._find)
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._limit = limit or Limit((), lambda *_: None)
        self._direct = direct or Direct((), lambda *_: False)
        self._sockets: list[tuple[socket.socket, ssl.SSLContext | None]] = []
        self._listening: list[asyncio.Server] = []
        self._connections: set[Connection] = set()
        self._empty = asyncio.Event()
        self.stopping = False
        self._tasks: set[asyncio.Task[None]] = set()

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """More handlers; the first that has one for a call answers it."""
        self._handlers += handlers

    def add_port(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Bind an address, in plain text or with TLS; returns the port.

        Raises:
            OSError: it cannot be bound.
        """
        if host == "0.0.0.0":
            with contextlib.suppress(OSError):  # IPv6 and IPv4 with one socket, where there is IPv6
                return self._listen_at(socket.AF_INET6, ("::", port, 0, 0), tls)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        problem: OSError | None = None
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                port = self._listen_at(family, (address[0], port, *address[2:]), tls)  # the same for every address
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                problem = error  # one of a name's addresses may not be this machine's
        if problem and not self._sockets:
            raise problem
        return port

    def _listen_at(self, family: int, address: Any, tls: ssl.SSLContext | None) -> int:
        bound = _bound(family, address, self.options.reuse_port)
        self._sockets.append((bound, tls))
        return int(bound.getsockname()[1])

    async def start(self) -> None:
        """Answer calls."""
        loop = self.inbox.loop = asyncio.get_running_loop()
        for bound, tls in self._sockets:
            patience_s = LINGERS_S if tls else None
            listening = await loop.create_server(
                lambda: Connection(self), sock=bound, backlog=_BACKLOG, ssl=tls, ssl_shutdown_timeout=patience_s
            )
            self._listening.append(listening)
        self._sockets.clear()

    async def stop(self, grace: float | None) -> None:
        """Take no more connections, let the calls that run finish for `grace` seconds, and end the rest."""
        self.stopping = True
        for bound, _ in self._sockets:
            bound.close()
        for listening in self._listening:
            listening.close()
        for connection in [*self._connections]:
            connection.go_away()
        with contextlib.suppress(TimeoutError):
            if self._connections:
                await asyncio.wait_for(self._empty.wait(), grace or 0)
        for connection in [*self._connections]:
            connection.abort("the server has stopped")
        if self._connections:
            await self._empty.wait()  # which is soon: they have been given up
        if self._tasks:
            await asyncio.wait(self._tasks)

    def run(self, answer: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is kept until it is done."""
        task = self.inbox.loop.create_task(answer)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # What connections tell.

    def opened(self, connection: Connection) -> None:
        """A client has connected."""
        self._connections.add(connection)
        self._empty.clear()

    def closed(self, connection: Connection) -> None:
        """It has gone, or was sent away."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def call(self, connection: Connection, outgoing: Outgoing, stream: int, head: Head) -> Call | bytes:
        """A new call, or the header block that refuses it unread."""
        method = head.details.method
        limited = method in self._limit.methods
        if limited and (refusal := self._limit.refuse(method, self.starting)):
            return refusal.block
        return Call(self, connection, outgoing, stream, head, limited)

    def begin(self, call: Call) -> None:
        """Look for a handler, unless there is one that wants the request first; streams begin at once."""
        if call.details.method not in self._direct.methods and (handler := self._found(call)):
            if handler.stream_stream:
                call.start(handler)
            else:
                call.handler = handler

    def complete(self, call: Call, data: bytes) -> None:
        """The only request of a call is there."""
        handler = call.handler
        if handler is None:
            try:
                if self._direct.begin(data, call):
                    return
            except Exception:
                call.fault()
                return
            handler = self._found(call)
        if handler:
            call.start(handler, data)

    def _found(self, call: Call) -> Handler | None:
        """The handler; None where the call was ended because there is none."""
        try:
            handler = self._find(call.details)
        except Exception:
            call.fault()
            return None
        if handler is None:
            call.fail(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        return handler

    def _handler(self, details: CallDetails) -> Handler | None:
        for handler in self._handlers:
            if found := handler.service(details):
                return found
        return None


def _around(interceptor: Interceptor, find: Find) -> Find:
    return lambda details: interceptor(details, find)


def _bound(family: int, address: Any, reuse_port: bool) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: somebody else does, or the address is not this machine's.
    """
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows, where SO_REUSEADDR would share the port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
        bound.bind(address)
        bound.listen(_BACKLOG)  # or two that are bound could both be
        bound.setblocking(False)
    except OSError:
        bound.close()
        raise
    return bound
