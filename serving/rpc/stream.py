"""The requests of a stream, as they come in."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from serving.rpc import messages

AHEAD_BYTES = 1 << 16  # that may wait, each way, before the other side is held up


class Source(Protocol):
    """The call that a stream's requests are of."""

    def widen(self) -> None:
        """Let the client send more."""

    def taken(self, size: int) -> None:
        """Bytes of a request need not be kept any more."""

    def refuse(self, problem: messages.Unreadable) -> None:
        """End the call."""


class Requests:
    """Read ahead of whoever wants them, until so many bytes wait that the client has to."""

    def __init__(self, source: Source, encoding: str, max_bytes: int, parse: Callable[[bytes], Any] | None) -> None:
        """None yet.

        Args:
            source: the call.
            encoding: of those that are compressed.
            max_bytes: of each.
            parse: what makes the request of its bytes.
        """
        self._source = source
        self._encoding = encoding
        self._max_bytes = max_bytes
        self._parse = parse
        self._whole: deque[bytes] = deque()  # as they came: unpacked, they may be a thousand times as much
        self._waiting_bytes = 0  # of those, with their prefixes
        self._rest = bytearray()  # the beginning of the next
        self._ended = False
        self._reader: asyncio.Future[None] | None = None  # waits for the next

    def received(self, payload: bytes, ends: bool) -> None:
        """Take in what came.

        Raises:
            Unreadable: a message is too large.
        """
        rest = self._rest
        rest += payload
        at = 0
        while len(rest) - at >= messages.PREFIX_BYTES:
            end = at + messages.size(bytes(rest[at : at + messages.PREFIX_BYTES]), self._max_bytes)
            if end > len(rest):
                break
            self._whole.append(bytes(rest[at:end]))
            self._waiting_bytes += end - at
            at = end
        del rest[:at]
        self._ended |= ends
        if self._reader and not self._reader.done() and (self._whole or ends):
            self._reader.set_result(None)
        self._go_on()

    def __aiter__(self) -> Requests:
        return self

    async def __anext__(self) -> Any:
        while not self._whole:
            if self._ended:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        data = self._whole.popleft()
        self._waiting_bytes -= len(data)
        self._source.taken(len(data))
        self._go_on()
        try:
            message = messages.content(data, self._encoding, self._max_bytes)
        except messages.Unreadable as problem:
            self._source.refuse(problem)
            raise asyncio.CancelledError from problem  # as the task is: it is no error of whoever asked for it
        return self._parse(message) if self._parse else message

    def _go_on(self) -> None:
        if self._waiting_bytes < AHEAD_BYTES and not self._ended:
            self._source.widen()
