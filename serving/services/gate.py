"""What new calls meet before they are parsed, while the server stops or has more to do than it can.

A client that has not heard yet that the server stops is told to try another one. And to refuse a call unparsed costs
much less than to parse and then refuse it: under overload that decides whether there is time left for the requests that
were accepted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, Generic, TypeVar

import grpc

from serving import errors, logs, rpc
from serving.errors import RequestError, Unavailable
from serving.services.statuses import to_status, trailing_metadata
from serving.statistics import Rpcs

STOPPING = "the server is stopping; try again, with another one"

Request = TypeVar("Request")


def refusal(error: Exception, method: str) -> grpc.RpcMethodHandler[Any, Any]:
    """Ends a call of any kind with the status of `error`, whatever it asks."""

    async def refuse(_: object, context: rpc.Call) -> None:
        def about() -> logs.Fields:
            return logs.about(method, context.peer(), context.invocation_metadata())

        code, details = to_status(error, about)
        context.set_code(code)  # as abort, without the cost of an exception
        context.set_details(details)
        context.set_trailing_metadata(trailing_metadata(code, details, error))

    return grpc.stream_stream_rpc_method_handler(refuse)


class Gate(grpc.GenericRpcHandler):
    """The first of the server's handlers: lets a call pass on to the others, unless it must be refused."""

    def __init__(self, inference: Collection[str], check_room: Callable[[], None], rpcs: Rpcs) -> None:
        """Open.

        Args:
            inference: the methods, `/service/method`, that need room in a model's queue for each call.
            check_room: raises RequestError when there can be none.
            rpcs: where what is refused for that is counted.
        """
        self.closed = False
        self._inference = inference
        self._check_room = check_room
        self._rpcs = rpcs
        self._open: set[Requests[Any]] = set()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Asked for each call; None leaves it to the next handler."""
        method = handler_call_details.method
        if self.closed:
            return refusal(Unavailable(STOPPING), method)
        if method in self._inference:
            try:
                self._check_room()
            except RequestError as error:
                self._rpcs.call_ended(method[1:], errors.STATUS[type(error)].name)
                return refusal(error, method)
        return None

    def close(self) -> None:
        """Refuse new calls, and read no more requests from streams: those that were read are answered."""
        self.closed = True
        for requests in self._open:
            requests.cut()

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
