"""What new calls meet before they are parsed, while the server stops or has more to do than it can.

gRPC's own shutdown cancels every call that has arrived and is not handled yet: under load, many. So calls are refused
here first, with a status that tells clients to try another server, until hardly any arrive. And to refuse a call
unparsed costs much less than to parse and then refuse it: under overload that decides whether there is time left for
the requests that were accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, Generic, TypeVar

import grpc

from serving import errors, logs, rpc
from serving.errors import RequestError, Unavailable
from serving.services.statuses import to_status, trailing_metadata
from serving.statistics import Rpcs

STOPPING = "the server is stopping; try again, with another one"

_ROUND_S = 0.05
_QUIET = 4  # rounds without a call that end it, where there were calls before
_ROUNDS = 20  # in which nothing runs; they end it in any case: there are clients that do not mind being refused

Request = TypeVar("Request")


def refusal(error: Exception, method: str) -> grpc.RpcMethodHandler[Any, Any]:
    """Ends a call of any kind with the status of `error`, whatever it asks."""

    async def refuse(_: object, context: rpc.Call) -> None:
        def about() -> logs.Fields:
            return logs.about(method, context.peer(), context.invocation_metadata() or ())

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
        self._refused = 0
        self._open: set[Requests[Any]] = set()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Called by gRPC for each call; None leaves it to the next handler."""
        method = handler_call_details.method
        if self.closed:
            self._refused += 1
            return refusal(Unavailable(STOPPING), method)
        if method in self._inference:
            try:
                self._check_room()
            except RequestError as error:
                self._rpcs.call_ended(method[1:], errors.STATUS[type(error)].name)
                return refusal(error, method)
        return None

    async def close(self, hurry: asyncio.Event, running: Callable[[], int], most_s: float) -> None:
        """Refuse new calls, and read no more requests from streams: those that were read are answered.

        Whoever gets an answer may call again at once. So this returns when no call runs and no more came for a moment:
        after `most_s` seconds at the latest, or when in a hurry.

        Args:
            hurry: set by whoever will not wait.
            running: how many calls for inference that came before have not ended, streams aside.
            most_s: how long calls may go on running.
        """
        self.closed = True
        for requests in self._open:
            requests.cut()
        until = time.monotonic() + most_s
        needed, quiet, rounds = 1, 0, 0
        while quiet < needed and rounds < _ROUNDS and time.monotonic() < until and not hurry.is_set():
            refused = self._refused
            runs = running()
            await pause(_ROUND_S, hurry)
            if runs or self._refused != refused:
                needed, quiet = _QUIET, 0
            else:
                quiet += 1
            rounds += not runs

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
