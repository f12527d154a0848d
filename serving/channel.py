"""Calls in both directions between two processes."""

from __future__ import annotations

import asyncio
import itertools
import logging
import pickle
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from serving.errors import ParityserveError, Unavailable

logger = logging.getLogger(__name__)

Handler = Callable[..., Awaitable[Any]]

_SIZE = struct.Struct("!I")


class Gone(Unavailable):
    """The process at the other end of a channel has ended, or ended before it answered."""


class Channel:
    """Calls in both directions between two processes, over a socket that only these two have.

    Messages are pickled: both ends are the same program, and no one else can write to the socket. They arrive in the
    order in which they were sent; the calls of one end run concurrently at the other.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handlers: Mapping[str, Handler]):
        self._reader = reader
        self._writer = writer
        self._handlers = handlers
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, end: socket.socket, handlers: Mapping[str, Handler]) -> Channel:
        """Take over one end of a socket pair; `handlers` answer the other end's calls, by their names."""
        return cls(*await asyncio.open_unix_connection(sock=end), handlers)

    def call(self, method: str, *arguments: Any) -> asyncio.Future[Any]:
        """Have the other end's handler called; the message is on its way when this returns.

        The result raises what the handler raised: an error of ours as it is, any other as a RuntimeError with its
        text, and `Gone` when the other process ends first.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._reading.done():
            future.set_exception(Gone("the process has ended"))
            return future
        number = next(self._numbers)
        self._waiting[number] = future
        self._send((number, method, arguments))
        return future

    def tell(self, method: str) -> None:
        """As `call`, without waiting for what comes of it; a process that has ended need not hear it."""
        self.call(method).add_done_callback(lambda future: future.exception())

    async def closed(self) -> None:
        """Return when the other process has ended, and all that it sent has been read."""
        await asyncio.wait({self._reading})

    def _send(self, message: object) -> None:
        data = pickle.dumps(message)
        self._writer.write(_SIZE.pack(len(data)) + data)

    async def _read(self) -> None:
        try:
            while True:
                (size,) = _SIZE.unpack(await self._reader.readexactly(_SIZE.size))
                number, method, content = pickle.loads(await self._reader.readexactly(size))
                if method is None:
                    self._settle(number, *content)
                else:
                    task = asyncio.create_task(self._answer(number, method, content))
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)
        except (asyncio.IncompleteReadError, ConnectionError):  # the other process has ended
            pass
        finally:
            for number in list(self._waiting):
                self._settle(number, None, Gone("the process ended before it answered"))
            self._writer.close()

    def _settle(self, number: int, answer: object, error: Exception | None) -> None:
        future = self._waiting.pop(number)
        if future.done():  # nobody waits any more
            return
        if error is None:
            future.set_result(answer)
        else:
            future.set_exception(error)

    async def _answer(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        answer: object = None
        problem: Exception | None = None
        try:
            answer = await self._handlers[method](*arguments)
        except ParityserveError as error:
            problem = error
        except Exception as error:
            logger.exception("unexpected error while answering another process")
            problem = RuntimeError(f"{type(error).__name__}: {error}")
        if not self._writer.is_closing():
            self._send((number, None, (answer, problem)))
