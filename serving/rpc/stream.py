"""The messages of a stream: the pump reads ahead of whoever wants them, and sends on while the next is made."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from grpc._cython import cygrpc  # type: ignore[attr-defined]  # types-grpcio has none of it

from serving.rpc.inbox import Inbox

NO_FLAGS = 0
_AHEAD = 16  # messages that may wait, each way
_AHEAD_BYTES = 1 << 16  # one more is read while those that wait are fewer


class Requests:
    """A stream's requests, as they come in; the pump reads nothing before the first is asked for."""

    def __init__(self, core: Any, inbox: Inbox, parse: Callable[[bytes], Any] | None) -> None:
        self._core = core
        self._inbox = inbox
        self._parse = parse
        self._read: deque[bytes | None] = deque()  # None is the end
        self._bytes_in = 0  # counted by the pump
        self._bytes_out = 0  # counted by the loop
        self._idle = True  # nothing was asked of the core; set by the pump, unset by the loop
        self._reader: asyncio.Future[None] | None = None  # waits for the next

    def __aiter__(self) -> Requests:
        return self

    async def __anext__(self) -> Any:
        while not self._read:
            self._go_on()
            self._reader = self._inbox.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if (data := self._read.popleft()) is None:
            self._read.append(None)  # for who asks again
            raise StopAsyncIteration
        self._bytes_out += len(data)
        self._go_on()
        return self._parse(data) if self._parse else data

    def _go_on(self) -> None:
        """On the loop: have the next one read, if the pump has stopped and there is room."""
        if self._idle and self._room():
            self._idle = False
            self._receive()

    def _room(self) -> bool:
        return len(self._read) < _AHEAD and self._bytes_in - self._bytes_out < _AHEAD_BYTES

    def _receive(self) -> None:
        self._core.start_server_batch((cygrpc.ReceiveMessageOperation(NO_FLAGS),), self._received)

    def _received(self, event: Any) -> None:
        """On the pump."""
        data: bytes | None = event.batch_operations[0].message()
        self._read.append(data)
        if data is not None:
            self._bytes_in += len(data)
            if self._room():
                self._receive()
            else:
                self._idle = True
        self._inbox.tell(self._wake)

    def _wake(self, _: None) -> None:
        if self._reader is None:
            self._go_on()
        elif not self._reader.done():
            self._reader.set_result(None)


class Answers:
    """A stream's answers, on their way out one after the other."""

    def __init__(self, core: Any, inbox: Inbox, beginning: Callable[[], tuple[Any, ...]]) -> None:
        """`beginning` gives the operations that have to come before the first answer."""
        self._core = core
        self._inbox = inbox
        self._beginning = beginning
        self._lock = threading.Lock()  # of the next two
        self._waiting: deque[bytes] = deque()
        self._sending = False  # whether the core has one
        self._sender: asyncio.Future[None] | None = None  # waits for room, or for all to be sent

    async def send(self, data: bytes) -> None:
        """Send the next; returns when there is room for another."""
        with self._lock:
            is_next, self._sending = not self._sending, True
            if not is_next:
                self._waiting.append(data)
        if is_next:
            self._start(data)
        await self._until(self._has_room)

    async def sent(self) -> None:
        """Return when all have been sent, or the client has gone."""
        await self._until(lambda: not self._sending)

    def _has_room(self) -> bool:
        with self._lock:
            return len(self._waiting) < _AHEAD and sum(map(len, self._waiting)) < _AHEAD_BYTES

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._sender = self._inbox.loop.create_future()
            try:
                if not holds():  # or the pump was quicker, and has told nobody
                    await self._sender
            finally:
                self._sender = None

    def _start(self, data: bytes) -> None:
        send = cygrpc.SendMessageOperation(data, NO_FLAGS)
        self._core.start_server_batch((*self._beginning(), send), self._sent)

    def _sent(self, event: Any) -> None:
        """On the pump."""
        with self._lock:
            if not event.success:  # nobody waits for the others
                self._waiting.clear()
            data = self._waiting.popleft() if self._waiting else None
            self._sending = data is not None
        if data is not None:
            self._start(data)
        if self._sender is not None:
            self._inbox.tell(self._wake)

    def _wake(self, _: None) -> None:
        if self._sender is not None and not self._sender.done():
            self._sender.set_result(None)
