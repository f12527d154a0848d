"""What new calls and open streams meet while the server stops.

gRPC's own shutdown cancels every call that has arrived and is not handled yet: under load, many. So calls are refused
here first, with a status that tells clients to try another server, until hardly any arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar

import grpc

from serving import errors, logs
from serving.errors import Unavailable

STOPPING = "the server is stopping; try again, with another one"

_QUIET_S = 0.05
_ROUNDS = 20  # so many times that at most, for clients that do not mind being refused

Request = TypeVar("Request")


def refusal(error: Exception, method: str) -> grpc.RpcMethodHandler[Any, Any]:
    """Ends a call of any kind with the status of `error`, without reading it."""

    async def refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        def about() -> logs.Fields:
            return logs.about(method, context.peer(), context.invocation_metadata() or ())

        await context.abort(*errors.to_status(error, about))

    return grpc.stream_stream_rpc_method_handler(refuse)


class Gate(grpc.GenericRpcHandler):
    """The first of the server's handlers: lets every call pass on to the others until it is closed."""

    def __init__(self) -> None:
        self.closed = False
        self._refused = 0
        self._open: set[Requests[Any]] = set()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Called by gRPC for each call; None leaves it to the next handler."""
        if not self.closed:
            return None
        self._refused += 1
        return refusal(Unavailable(STOPPING), handler_call_details.method)

    async def close(self, hurry: asyncio.Event) -> None:
        """Refuse new calls, and read no more requests from streams: those that were read are answered.

        Returns when no more calls came for a moment, or when in a hurry.
        """
        self.closed = True
        for requests in self._open:
            requests.cut()
        for _ in range(_ROUNDS):
            refused = self._refused
            await pause(_QUIET_S, hurry)
            if self._refused == refused:
                break

    def requests(self, source: AsyncIterator[bytes], parse: Callable[[bytes], Request]) -> Requests[Request]:
        """A stream's requests as they come in, until its client ends it or the gate is closed."""
        requests = Requests(source, parse, self._open)
        if self.closed:
            requests.cut()
        return requests


class Requests(Generic[Request]):
    """The requests of one stream. Leaving its `with` block forgets it."""

    def __init__(
        self, source: AsyncIterator[bytes], parse: Callable[[bytes], Request], open_ones: set[Requests[Any]]
    ) -> None:
        self.is_cut = False
        self._source = source
        self._parse = parse
        self._reader: asyncio.Task[Any] | None = None  # waits for the next request
        self._open = open_ones

    def __enter__(self) -> Requests[Request]:
        self._open.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.discard(self)

    def __aiter__(self) -> Requests[Request]:
        return self

    async def __anext__(self) -> Request:
        if self.is_cut:
            raise StopAsyncIteration
        self._reader = asyncio.current_task()
        try:
            data = await anext(self._source)
        except asyncio.CancelledError:
            if not (self.is_cut and self._reader and self._reader.uncancel() == 0):  # or it is cancelled by others
                raise
            raise StopAsyncIteration from None
        finally:
            self._reader = None
        return self._parse(data)

    def cut(self) -> None:
        """End the iteration, now where it waits for a request."""
        self.is_cut = True
        if self._reader:
            self._reader.cancel()


async def pause(seconds: float, hurry: asyncio.Event) -> None:
    """Wait, but not when in a hurry."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(hurry.wait(), seconds)
