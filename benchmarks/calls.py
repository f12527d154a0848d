"""Connect to a server, and make one call by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from benchmarks.headers import Status
from benchmarks.http2 import Call, Connection, Events, message
from protos import open_inference as pb

CONNECT_S = 10.0  # how long a connection may take
ANSWER_S = 30.0  # and the answer to a call by itself
READY_S = 60.0  # and a server that answers until all its processes do


async def connect(events: Events, target: str, path: str, metadata: Iterable[tuple[str, str]] = ()) -> Connection:
    """Connect to `target`, host:port, for calls of the method `path`.

    Raises:
        OSError: nothing listens there, or what does speaks no HTTP/2.
    """
    host, _, port = target.rpartition(":")
    connection: Connection | None = None
    try:
        async with asyncio.timeout(CONNECT_S):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(events, target, path, metadata), host.strip("[]"), int(port)
            )
            await connection.ready
    except BaseException as error:
        if connection:
            connection.abort()
        if isinstance(error, TimeoutError):
            raise TimeoutError(f"{target}: no HTTP/2 settings within {CONNECT_S:g} s") from error
        raise
    return connection


async def ask(target: str, path: str, request: bytes) -> bytes:
    """One unary call by itself.

    Raises:
        OSError: the target cannot be connected to, or does not answer.
        ValueError: the answer is an error of gRPC's; the text says which.
    """
    answer: asyncio.Future[tuple[Status, bytes]] = asyncio.get_running_loop().create_future()

    class One:
        def answered(self, call: Call, body: bytes) -> None: ...

        def ended(self, call: Call, status: Status) -> None:
            if not answer.done():
                answer.set_result((status, call.body[5:]))

        def closing(self, connection: Connection) -> None: ...

    connection = await connect(One(), target, path)
    try:
        connection.call(message(request))
        async with asyncio.timeout(ANSWER_S):
            status, body = await answer
    except TimeoutError as error:
        raise TimeoutError(f"{target}: {path}: no answer within {ANSWER_S:g} s") from error
    finally:
        connection.abort()
        await connection.closed.wait()
    if status.name != "OK":
        raise ValueError(f"{target}: {path}: {status.name}: {status.message}")
    return body


async def all_ready(target: str) -> None:
    """Return when a server is ready with all its processes, of which one may answer earlier.

    Raises:
        OSError: it is not, for `READY_S` seconds, or cannot be connected to.
        ValueError: it does not say.
    """
    rpc = pb.RPCS["ServerReady"]
    try:
        async with asyncio.timeout(READY_S):
            while not pb.ServerReadyResponse.FromString(await ask(target, rpc.path, b"")).ready:
                await asyncio.sleep(0.05)
    except TimeoutError as error:
        raise TimeoutError(f"{target}: not ready within {READY_S:g} s") from error


def new_loop() -> asyncio.AbstractEventLoop:
    """The fastest event loop that is installed."""
    try:
        import uvloop
    except ImportError:  # it is not made for every platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
