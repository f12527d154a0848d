"""What a connection sends: frames that come together go together, and no more than the client's windows let out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from serving.rpc import frames, messages
from serving.rpc.frames import Fault, frame, number
from serving.rpc.headers import RESPONSE, TRAILERS_OK
from serving.rpc.inbox import Inbox

_MOST_RESIZED = 100  # times in a second that a client may change the windows of all calls
_LARGE = 1 << 14  # bytes that go at once: many of them would take much memory
_TABLE = 4096  # bytes of a client's table of headers, unless it says otherwise

_RESPONSE_HEAD = frames.head(frames.HEADERS, frames.END_HEADERS, len(RESPONSE))
_LAST = frames.END_STREAM | frames.END_HEADERS
_OK_HEAD = frames.head(frames.HEADERS, _LAST, len(TRAILERS_OK))


class Sending(Protocol):
    """A call, as far as its answers go."""

    stream: int
    window: int  # bytes that may be sent
    unsent: deque[memoryview] | None  # answers that the windows do not let out yet
    last: bytes | None  # the header block that comes after them

    def sent(self) -> None:
        """The windows have let out all answers there were."""

    def watch(self) -> None:
        """They have not, and may never do so: the call has to end at its deadline."""


class Outgoing:
    """Of one connection."""

    def __init__(self, transport: asyncio.Transport, inbox: Inbox, closed: Callable[[int], None]) -> None:
        """Nothing yet.

        Args:
            transport: takes bytes.
            inbox: knows whether answers of a batch are being given.
            closed: told of a stream whose last frame was sent.
        """
        self.first_window = frames.DEFAULT_WINDOW  # of a new stream
        self.gathering = False  # what is written waits for `flush`
        self.answered = False  # anything but a reply to a frame, since this was set to False
        self._transport = transport
        self._inbox = inbox
        self._closed = closed
        self._socket = _plain_socket(transport)
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._window = frames.DEFAULT_WINDOW  # bytes that may be sent
        self._max_frame = frames.DEFAULT_MAX_FRAME
        self._table = b""  # what the next header block must say of the client's table
        self._resized, self._resized_s = 0, 0.0  # how often, since when
        self._blocked: dict[int, Sending] = {}  # those that have more to send than the windows let out
        self._refusal = self._refusal_head = b""  # the last one
        self._size = 0  # of the last call's only answer
        self._before = self._prefix = b""  # what frames one of that size
        self._ended = False  # nothing more may be said
        self._room = asyncio.Event()  # the socket takes more
        self._room.set()

    def write(self, data: bytes) -> None:
        """Send something, with all else that one read from the socket, one batch of answers or one turn gives."""
        out = self._out
        out.append(data)
        if self.gathering:
            return
        afterwards = self._inbox.afterwards
        if afterwards is not None:
            if len(out) == 1:
                afterwards.append(self.flush)
        elif len(data) >= _LARGE:
            self.flush()
        elif len(out) == 1:
            self._loop.call_soon(self.flush)  # tasks that are answered together write one after the other

    def flush(self) -> None:
        """Send what was gathered."""
        out = self._out
        if out:
            data = out[0] if len(out) == 1 else b"".join(out)
            out.clear()
            if not self._ended and not self._transport.is_closing():
                self._write(data)

    def end_all(self) -> None:
        """Send what was gathered, and nothing after it."""
        self.flush()
        self._ended = True

    def _write(self, data: bytes) -> None:
        """Past the transport, where nothing waits in it: uvloop's keeps the interpreter's lock while the system writes.

        That was a third of the time that the event loop had the lock, and a model's thread waited for it.
        """
        sent = 0
        if self._socket is not None and not self._transport.get_write_buffer_size():
            with contextlib.suppress(OSError):  # it takes nothing now, or has broken: the transport will find out
                sent = os.write(self._socket, data)
        if sent < len(data):
            self._transport.write(memoryview(data)[sent:] if sent else data)

    # Calls' answers.

    def refuse(self, stream: int, block: bytes) -> None:
        """The header block that is all that a call gets."""
        self.answered = True
        if block is not self._refusal or self._table:
            self._refusal, self._refusal_head = block, frames.head(frames.HEADERS, _LAST, len(block))
            self.write(self._framed(frames.END_STREAM, stream, block))
        else:  # as most are, one after the other
            self.write(b"".join((self._refusal_head, number(stream), block)))

    def answer(self, call: Sending, message: bytes) -> None:
        """The only answer of a call, and its end."""
        size = messages.PREFIX_BYTES + len(message)
        if size > self._window or size > call.window or size > self._max_frame or self._table:
            self.begin(call)
            self.send(call, message)
            self.end(call, TRAILERS_OK)
            return
        self._window -= size
        self.answered = True
        if size != self._size:  # as few answers have that follow each other
            self._size = size
            self._before = RESPONSE + frames.head(frames.DATA, 0, size)
            self._prefix = messages.prefix(len(message))
        stream = number(call.stream)
        parts = (_RESPONSE_HEAD, stream, self._before, stream, self._prefix, message, _OK_HEAD, stream, TRAILERS_OK)
        self.write(b"".join(parts))
        self._closed(call.stream)

    def begin(self, call: Sending) -> None:
        """The headers before the first answer."""
        self.write(self._framed(0, call.stream, RESPONSE))

    def send(self, call: Sending, message: bytes) -> None:
        """One answer, as far as the windows let it out."""
        if call.unsent is None:
            call.unsent = deque()
        call.unsent.append(memoryview(messages.prefixed(message)))
        self._send(call)

    async def room(self) -> None:
        """Wait until the socket takes more."""
        await self._room.wait()

    def has_room(self, room: bool) -> None:
        """Whether it does, as the transport tells."""
        if room:
            self._room.set()
        else:
            self._room.clear()

    def end(self, call: Sending, block: bytes) -> None:
        """The header block that ends a call, behind the answers that wait."""
        call.last = block
        self._send(call)

    def forget(self, call: Sending) -> None:
        """Send nothing more of a call."""
        if call.unsent:
            self._blocked.pop(call.stream, None)
            call.unsent = None

    def reset(self, stream: int, code: int) -> None:
        """End a call without a status; or, with NO_ERROR, after it: its client need not send the rest."""
        self.write(frame(frames.RST_STREAM, 0, stream, number(code)))

    def more(self, stream: int, size: int) -> None:
        """Let a client send so many bytes more, for a call or, with 0, for all of them."""
        self.write(frame(frames.WINDOW_UPDATE, 0, stream, number(size)))

    def _send(self, call: Sending) -> None:
        """What the windows let out."""
        self.answered = True
        out: list[bytes] = []
        unsent = call.unsent
        while unsent:
            size = min(len(unsent[0]), self._max_frame, self._window, call.window)
            if size <= 0:
                break
            self._window -= size
            call.window -= size
            out.append(frame(frames.DATA, 0, call.stream, bytes(unsent[0][:size])))
            if size == len(unsent[0]):
                unsent.popleft()
            else:
                unsent[0] = unsent[0][size:]
        if not unsent and call.last is not None:
            out.append(self._framed(frames.END_STREAM, call.stream, call.last))
        if out:
            self.write(b"".join(out))
        if unsent:
            self._blocked[call.stream] = call
            call.watch()
            return
        self._blocked.pop(call.stream, None)
        if call.last is not None:
            self._closed(call.stream)
        call.sent()

    def _framed(self, flags: int, stream: int, block: bytes) -> bytes:
        """The frames of a header block."""
        if self._table:
            block, self._table = self._table + block, b""
        most = self._max_frame
        if len(block) <= most:
            return frame(frames.HEADERS, flags | frames.END_HEADERS, stream, block)
        out = [frame(frames.HEADERS, flags, stream, block[:most])]
        for at in range(most, len(block), most):
            last = frames.END_HEADERS * (at + most >= len(block))
            out.append(frame(frames.CONTINUATION, last, stream, block[at : at + most]))
        return b"".join(out)

    # What the client allows.

    def widen(self, more: int) -> None:
        """The connection's window is wider.

        Raises:
            Fault: wider than may be, or not at all.
        """
        if not more:
            raise Fault(frames.PROTOCOL_ERROR, "a window widened by nothing")
        self._window += more
        if self._window > frames.LARGEST:
            raise Fault(frames.FLOW_CONTROL_ERROR, f"a window of {self._window} bytes")
        self._flush_blocked()

    def widen_call(self, call: Sending, more: int) -> bool:
        """A call's window is wider; whether that may be."""
        call.window += more
        if not more or call.window > frames.LARGEST:
            return False
        if call.stream in self._blocked:
            self._send(call)
        return True

    def set(self, payload: bytes, calls: Iterable[Sending]) -> None:
        """The client's settings, which are acknowledged; they hold for the calls that are open, too.

        Raises:
            Fault: they may not be so.
        """
        values = frames.read_settings(payload)
        if any(name == frames.HEADER_TABLE_SIZE and value < _TABLE for name, value in values):
            self._table = b"\x20"  # none is used
        settings = dict(values)
        self._max_frame = settings.get(frames.MAX_FRAME_SIZE, self._max_frame)
        more = settings.get(frames.INITIAL_WINDOW_SIZE, self.first_window) - self.first_window
        if more:
            self._resize(more, calls)
        self.write(frame(frames.SETTINGS, frames.ACK, 0))
        if more > 0:
            self._flush_blocked()

    def _resize(self, more: int, calls: Iterable[Sending]) -> None:
        """Change the windows of all calls."""
        now_s = self._loop.time()
        if now_s - self._resized_s >= 1:
            self._resized, self._resized_s = 0, now_s
        self._resized += 1
        if self._resized > _MOST_RESIZED:
            raise Fault(frames.ENHANCE_YOUR_CALM, "windows that do not stay")
        self.first_window += more
        for call in calls:
            call.window += more
            if call.window > frames.LARGEST:
                raise Fault(frames.FLOW_CONTROL_ERROR, f"a window of {call.window} bytes")

    def _flush_blocked(self) -> None:
        for call in [*self._blocked.values()]:
            if self._window <= 0:
                break
            self._send(call)


def _plain_socket(transport: asyncio.Transport) -> int | None:
    """The descriptor of a transport's socket; None where bytes are not sent as they are, and on Windows."""
    found = transport.get_extra_info("socket")
    if found is None or transport.get_extra_info("ssl_object") is not None or sys.platform == "win32":
        return None
    return int(found.fileno())
