"""A gRPC connection reduced to what a load generator needs: HTTP/2 frames straight to and from a socket.

grpcio spends about 100 us of CPU on each call it makes, as much as a server does: a load generator built on it would
measure itself. Here every call is one `join` of prebuilt bytes. Answers' header blocks are decoded once for each
distinct block: the server is told to keep no table of headers, so equal bytes mean equal headers.

Frames: RFC 9113. What gRPC makes of them: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol, cast

from benchmarks.headers import CONNECTION_LOST, UNPROCESSED, Status, call_blocks, status_of

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, PADDED, PRIORITY, ACK = 1, 4, 8, 32, 1
HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 3, 4, 5
REFUSED_STREAM = 7  # an error code

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LARGEST_WINDOW = (1 << 31) - 1
TOP_UP = 1 << 30  # bytes received before a window is opened again
DEFAULT_WINDOW = 65535

_HEAD = struct.Struct(">HBBBI")  # length (in two parts), type, flags, stream
_SETTING = struct.Struct(">HI")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame."""
    return _HEAD.pack(len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload


def message(content: bytes) -> bytes:
    """`content` as a gRPC message: uncompressed, its length before it."""
    return b"\0" + len(content).to_bytes(4, "big") + content


def _split_head(block: bytes) -> tuple[bytes, bytes]:
    """A HEADERS frame up to the stream's number, and after it."""
    return len(block).to_bytes(3, "big") + bytes([HEADERS, END_HEADERS]), block


class Call:
    """One RPC. `body` is what has been received: all of it for a unary call, the unfinished message of a stream."""

    __slots__ = ("body", "received", "stream", "streamed", "tag", "window")

    def __init__(self, streamed: bool, tag: Any) -> None:
        self.streamed = streamed
        self.tag = tag  # the caller's own
        self.stream = 0  # once it is sent: the server may limit how many calls are under way
        self.window = 0  # bytes that may be sent
        self.received = 0  # bytes since the window was last opened
        self.body = b""


class Events(Protocol):
    """What a connection tells its user."""

    def answered(self, call: Call, body: bytes) -> None:
        """A message arrived on a streamed call, with its prefix."""

    def ended(self, call: Call, status: Status) -> None:
        """A call ended; a unary one has its answer, with its prefix, in `call.body`. UNPROCESSED: make it again."""

    def closing(self, connection: Connection) -> None:
        """No more calls can be made; those under way still end, each with a status."""


class Connection(asyncio.Protocol):
    """One HTTP/2 connection that makes calls of one method."""

    def __init__(self, events: Events, authority: str, path: str, metadata: Iterable[tuple[str, str]] = ()) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # the server's settings are here
        self.closed = asyncio.Event()
        self.open = True
        self.sent_bytes = 0
        self.received_bytes = 0
        self._events = events
        self._about = (authority, path, tuple(metadata))
        self._head = self._fields = b""  # of the next call: its HEADERS frame up to the stream's number, and the rest
        self._indexed = (b"", b"")  # the same for the calls after it
        self._next = 1
        self._calls: dict[int, Call] = {}
        self._waiting: deque[tuple[Call, bytes]] = deque()  # calls beyond the server's limit of concurrent streams
        self._blocked: deque[tuple[Call, memoryview, bool]] = deque()  # what the windows do not let out yet
        self._out: list[bytes] = []
        self._rest = b""
        self._gathering = False  # what is written waits for `flush`
        self._block: tuple[int, int, bytes] | None = None  # stream, flags and the beginning of a header block
        self._window = DEFAULT_WINDOW
        self._initial_window = DEFAULT_WINDOW
        self._max_frame = 16384
        self._max_streams = LARGEST_WINDOW
        self._received = 0

    def call(self, body: bytes, tag: Any = None) -> None:
        """Make a unary call with a prefixed message."""
        self._begin(Call(False, tag), body)

    def _begin(self, call: Call, body: bytes) -> None:
        if len(self._calls) >= self._max_streams:
            self._waiting.append((call, body))
            return
        stream = call.stream = self._next
        self._next += 2
        call.window = self._initial_window
        self._calls[stream] = call
        number = stream.to_bytes(4, "big")
        size = len(body)
        if size <= self._max_frame and size <= self._window and size <= self._initial_window and not self._blocked:
            self._window -= size
            data = size.to_bytes(3, "big") + b"\x00\x01"  # DATA that ends the stream
            self._write(b"".join((self._head, number, self._fields, data, number, body)))
            self._head, self._fields = self._indexed
            return
        self._write(b"".join((self._head, number, self._fields)))
        self._head, self._fields = self._indexed
        self._blocked.append((call, memoryview(body), True))
        self._unblock()

    def open_stream(self, tag: Any = None) -> Call:
        """Begin a streamed call."""
        stream = self._next
        self._next += 2
        call = self._calls[stream] = Call(True, tag)
        call.stream, call.window = stream, self._initial_window
        self._write(b"".join((self._head, stream.to_bytes(4, "big"), self._fields)))
        self._head, self._fields = self._indexed
        return call

    def send(self, call: Call, body: bytes, end: bool = False) -> None:
        """Send a prefixed message, or nothing but the end, on a streamed call."""
        size = len(body)
        if size <= self._max_frame and size <= self._window and size <= call.window and not self._blocked:
            self._window -= size
            call.window -= size
            self._write(frame(DATA, END_STREAM if end else 0, call.stream, body))
            return
        self._blocked.append((call, memoryview(body), end))
        self._unblock()

    def finish(self, call: Call) -> None:
        """Send no more on a streamed call; what was sent is still answered."""
        if not self._transport.is_closing():
            self.send(call, b"", end=True)

    def gather(self) -> None:
        """Everything that is sent from here on goes out in one write, with `flush`."""
        self._gathering = True

    def flush(self) -> None:
        """Send what was gathered."""
        self._gathering = False
        if self._out:
            joined = b"".join(self._out)
            self._out.clear()
            self.sent_bytes += len(joined)
            self._transport.write(joined)

    def close(self) -> None:
        """Close the connection; calls under way end with CONNECTION_LOST."""
        self._stop()
        self._transport.close()

    def abort(self) -> None:
        """Vanish, as a client does that is killed."""
        self._stop()
        self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not derived from asyncio's
        settings = _SETTING.pack(HEADER_TABLE_SIZE, 0) + _SETTING.pack(INITIAL_WINDOW_SIZE, LARGEST_WINDOW)
        wider = (LARGEST_WINDOW - DEFAULT_WINDOW).to_bytes(4, "big")
        self._write(PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW_UPDATE, 0, 0, wider))

    def data_received(self, data: bytes) -> None:
        self.received_bytes += len(data)
        if self._rest:
            data = self._rest + data
        self.gather()
        at, size, head = 0, len(data), _HEAD.unpack_from
        while size - at >= 9:
            high, low, kind, flags, stream = head(data, at)
            end = at + 9 + (high << 8 | low)
            if end > size:
                break
            payload = data[at + 9 : end]
            if kind == DATA:
                self._data(flags, stream, payload)
            elif kind == HEADERS:
                if flags != END_HEADERS:  # or they begin an answer, and say nothing that its end does not
                    self._headers(flags, stream, payload)
            else:
                self._control(kind, flags, stream, payload)
            at = end
        self._rest = data[at:]
        self.flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop()
        self._end_all(list(self._calls), CONNECTION_LOST)
        self.closed.set()
        if not self.ready.done():
            self.ready.set_exception(error or ConnectionError("the server closed the connection before its settings"))

    # Sending.

    def _write(self, data: bytes) -> None:
        self._out.append(data)
        if not self._gathering:
            self.flush()

    def _unblock(self) -> None:
        """Send what the windows allow, each stream's data in order."""
        still: deque[tuple[Call, memoryview, bool]] = deque()
        stuck: set[int] = set()
        for call, rest, end in self._blocked:
            if call.stream not in self._calls:  # ended by the server
                continue
            finished = False
            while call.stream not in stuck:
                size = min(len(rest), self._max_frame, self._window, call.window)
                if rest and size <= 0:
                    stuck.add(call.stream)
                    break
                finished = size == len(rest)
                self._window -= size
                call.window -= size
                self._write(frame(DATA, END_STREAM if finished and end else 0, call.stream, bytes(rest[:size])))
                rest = rest[size:]
                if finished:
                    break
            if not finished:
                still.append((call, rest, end))
        self._blocked = still

    # Receiving.

    def _data(self, flags: int, stream: int, payload: bytes) -> None:
        self._received += len(payload)
        if self._received > TOP_UP:
            self._write(frame(WINDOW_UPDATE, 0, 0, self._received.to_bytes(4, "big")))
            self._received = 0
        call = self._calls.get(stream)
        if call is None:
            return
        call.received += len(payload)
        if flags & PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        call.body = call.body + payload if call.body else payload
        if call.streamed:
            if call.received > TOP_UP:
                self._write(frame(WINDOW_UPDATE, 0, stream, call.received.to_bytes(4, "big")))
                call.received = 0
            while len(call.body) >= 5 and len(call.body) >= (size := 5 + int.from_bytes(call.body[1:5], "big")):
                body, call.body = call.body[:size], call.body[size:]
                self._events.answered(call, body)
        if flags & END_STREAM:
            self._end(stream, Status("UNKNOWN", "the call ended without a status"))

    def _headers(self, flags: int, stream: int, block: bytes) -> None:
        if flags & (PADDED | PRIORITY):
            end = len(block) - (block[0] if flags & PADDED else 0)
            block = block[(1 if flags & PADDED else 0) + (5 if flags & PRIORITY else 0) : end]
        if not flags & END_HEADERS:
            self._block = (stream, flags, block)
        elif flags & END_STREAM:
            self._end(stream, status_of(block))

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            self._settings(payload)
            self._write(frame(SETTINGS, ACK, 0))
            self._unblock()
        elif kind == PING and not flags & ACK:
            self._write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            more = int.from_bytes(payload, "big")
            if stream == 0:
                self._window += more
            elif call := self._calls.get(stream):
                call.window += more
            if self._blocked:
                self._unblock()
        elif kind == RST_STREAM:
            code = int.from_bytes(payload, "big")
            self._end(stream, UNPROCESSED if code == REFUSED_STREAM else Status("RST_STREAM", f"error code {code}"))
        elif kind == GOAWAY:
            last = int.from_bytes(payload[:4], "big")
            self._stop()
            self._end_all([stream for stream in self._calls if stream > last], UNPROCESSED)
            if not self._calls:
                self._transport.close()
        elif kind == CONTINUATION and self._block:
            whose, first, begun = self._block
            self._block = (whose, first, begun + payload)
            if flags & END_HEADERS:
                self._block = None
                self._headers(first & END_STREAM | END_HEADERS, whose, begun + payload)

    def _settings(self, payload: bytes) -> None:
        table = 4096
        for name, value in _SETTING.iter_unpack(payload):
            if name == INITIAL_WINDOW_SIZE:
                for call in self._calls.values():
                    call.window += value - self._initial_window
                self._initial_window = value
            elif name == MAX_FRAME_SIZE:
                self._max_frame = value
            elif name == MAX_CONCURRENT_STREAMS:
                self._max_streams = value
            elif name == HEADER_TABLE_SIZE:
                table = value
        if not self.ready.done():
            blocks = call_blocks(*self._about, table)
            (self._head, self._fields), self._indexed = (_split_head(block) for block in blocks)
            self.ready.set_result(None)

    def _end(self, stream: int, status: Status) -> None:
        call = self._calls.pop(stream, None)
        if call is None:
            return
        self._events.ended(call, status)
        if self._waiting and self.open:
            self._begin(*self._waiting.popleft())
        if not self.open and not self._calls:
            self._transport.close()

    def _end_all(self, streams: list[int], status: Status) -> None:
        for stream in streams:
            self._end(stream, status)

    def _stop(self) -> None:
        """Make no more calls, and say so once."""
        if self.open:
            self.open = False
            self._events.closing(self)
        while self._waiting:
            self._events.ended(self._waiting.popleft()[0], UNPROCESSED)
