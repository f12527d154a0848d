"""One HTTP/2 connection: frames in and out, windows, and what is asked of a peer that is silent or too eager."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol, cast

from serving.rpc import frames, messages
from serving.rpc.call import WINDOW, Call
from serving.rpc.frames import Fault, frame, number
from serving.rpc.headers import MAX_BYTES, RESPONSE, TRAILERS_OK, Head, Reader
from serving.rpc.inbox import Inbox
from serving.rpc.options import Options

MAX_STREAMS = 4096  # calls of one connection at a time; clients let others wait
_MAX_FRAME = 1 << 18
_TOP_UP = 1 << 29  # bytes after which the connection's own window, which never holds anybody up, is opened again
_BUFFERED = 1 << 20  # bytes that may wait for the socket before a client that reads nothing is read no more
_MOST_RESIZED = 100  # times in a second that a client may change the windows of all calls
_MOST_HELD = 4  # of the largest messages, that the unread and unfinished requests of all calls may come to
_STRIKES = 2  # pings that may come too early

_RESPONSE_HEAD = frames.head(frames.HEADERS, frames.END_HEADERS, len(RESPONSE))
_TRAILERS = frames.END_STREAM | frames.END_HEADERS
_OK_HEAD = frames.head(frames.HEADERS, _TRAILERS, len(TRAILERS_OK))

_ALIVE = b"alive..."  # what the server's own pings say
_LAST = b"last...."

_TABLE = 4096  # bytes of a client's table of headers, unless it says otherwise
_WHY = 200  # bytes of an explanation


class Host(Protocol):
    """What a connection needs of its server."""

    options: Options
    inbox: Inbox

    def opened(self, connection: Connection) -> None:
        """A client has connected."""

    def closed(self, connection: Connection) -> None:
        """It has gone, or was sent away."""

    def call(self, connection: Connection, stream: int, head: Head, window: int) -> Call | bytes:
        """A new call, or the header block that refuses it unread."""

    def begin(self, call: Call) -> None:
        """A call may be looked at."""


class Connection(asyncio.Protocol):
    """A client's connection."""

    def __init__(self, host: Host) -> None:
        self.peer = ""
        self.calls: dict[int, Call] = {}
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._out: list[bytes] = []  # frames that go out together
        self._reading = False  # what came is being taken in
        self._greeted = False  # the client's preface was there
        self._rest = b""  # of what came: the beginning of a frame
        self._block: tuple[int, int, bytes] | None = None  # a header block that is not whole: stream, flags, bytes
        self._reader = Reader()
        self._last = 0  # the newest stream
        self._refused: set[int] = set()  # streams that were ended before their client had
        self._held = 0  # bytes of requests that are not complete, or that nobody has taken yet
        self._taken = 0  # bytes since the connection's window was opened
        self._window = frames.DEFAULT_WINDOW  # bytes that may be sent
        self._first_window = frames.DEFAULT_WINDOW  # of a new stream
        self._max_frame = frames.DEFAULT_MAX_FRAME
        self._resized, self._resized_s = 0, 0.0  # how often, since when
        self._table = b""  # what the next header block must say of its table
        self._blocked: dict[int, Call] = {}  # those that have more to send than the windows let out
        self._room: asyncio.Event = asyncio.Event()  # the socket takes more
        self._room.set()
        self._heard_s = self._pinged_s = 0.0  # when, by the loop's clock
        self._strikes = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._leaving = False  # the client was told to make no more calls
        self._final = False  # and which one was the last

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not derived from asyncio's
        self._transport.set_write_buffer_limits(_BUFFERED)
        self.peer = _peer(transport.get_extra_info("peername"))
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self._transport.close()  # not a client of HTTP/2
            return
        options = self._host.options
        self._host.opened(self)
        settings = {
            frames.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
            frames.INITIAL_WINDOW_SIZE: WINDOW,
            frames.MAX_FRAME_SIZE: _MAX_FRAME,
            frames.MAX_HEADER_LIST_SIZE: MAX_BYTES,
        }
        wider = frame(frames.WINDOW_UPDATE, 0, 0, number(frames.LARGEST - frames.DEFAULT_WINDOW))
        self._transport.write(frames.settings(settings) + wider)
        self._heard_s = self._loop.time()
        self._later("silence", options.keepalive_time_s, self._look)
        if options.max_connection_age_s:
            self._later("age", options.max_connection_age_s, self._grow_old)

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return  # TLS may give what had come before
        self._heard_s = self._loop.time()
        if self._rest:
            data = self._rest + data
        self._reading = True
        try:
            self._rest = self._frames(data)
            for stream in self._refused:  # they need not send the rest
                self._write(frame(frames.RST_STREAM, 0, stream, number(frames.NO_ERROR)))
            self._refused.clear()
        except Fault as fault:
            self._end(fault.code, str(fault).encode())
        finally:
            self._reading = False
            self._write_out()

    def pause_writing(self) -> None:
        self._room.clear()
        if not self._transport.is_closing():
            self._transport.pause_reading()  # who does not read the answers may ask no more

    def resume_writing(self) -> None:
        self._room.set()
        self._heard_s = self._loop.time()  # a sign of life
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, _error: Exception | None) -> None:
        for timer in self._timers.values():
            timer.cancel()
        for call in [*self.calls.values()]:
            self._forget(call)
            call.leave()
        self._room.set()
        self._host.closed(self)

    # Frames that come.

    def _frames(self, data: bytes) -> bytes:
        """Take in all frames that are whole; gives the rest."""
        at, size = 0, len(data)
        if not self._greeted:
            if not data.startswith(frames.PREFACE[:size]):
                raise Fault(frames.PROTOCOL_ERROR, "this port speaks HTTP/2 only")
            if size < len(frames.PREFACE):
                return data
            at = len(frames.PREFACE)
            self._greeted = True
        head = frames.HEAD.unpack_from
        while size - at >= frames.HEAD_BYTES:
            high, low, kind, flags, stream = head(data, at)
            length = high << 8 | low
            stream &= frames.LARGEST
            if length > _MAX_FRAME:
                raise Fault(frames.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
            begin = at + frames.HEAD_BYTES
            at = begin + length
            if at > size:
                return data[begin - frames.HEAD_BYTES :]
            if self._block and kind != frames.CONTINUATION:
                raise Fault(frames.PROTOCOL_ERROR, "a header block that is interrupted")
            if kind == frames.DATA:
                self._data(flags, stream, data[begin:at])
            elif kind == frames.HEADERS:
                self._headers(flags, stream, data[begin:at])
            else:
                self._control(kind, flags, stream, data[begin:at])
        return data[at:]

    def _data(self, flags: int, stream: int, payload: bytes) -> None:
        size = len(payload)
        self._taken += size
        if self._taken > _TOP_UP:
            self._write(frame(frames.WINDOW_UPDATE, 0, 0, number(self._taken)))
            self._taken = 0
        call = self.calls.get(stream)
        if call is None or call.half_closed:
            if not 0 < stream <= self._last:
                raise Fault(frames.PROTOCOL_ERROR, f"DATA on stream {stream}, which is not open")
            if flags & frames.END_STREAM:
                self._refused.discard(stream)
            return
        if flags & frames.PADDED:
            payload = frames.unpadded(flags, payload)
        call.received(payload, size, bool(flags & frames.END_STREAM))

    def _headers(self, flags: int, stream: int, payload: bytes) -> None:
        if flags & (frames.PADDED | frames.PRIORITISED):
            payload = frames.unpadded(flags, payload)
            if flags & frames.PRIORITISED:
                if len(payload) < 5:
                    raise Fault(frames.FRAME_SIZE_ERROR, "HEADERS without their priority")
                payload = payload[5:]
        if not flags & frames.END_HEADERS:
            self._block = (stream, flags, payload)
            return
        if len(payload) > 4 * MAX_BYTES:
            raise Fault(frames.ENHANCE_YOUR_CALM, f"a header block of {len(payload)} bytes")
        head = self._reader.read(payload)
        ends = bool(flags & frames.END_STREAM)
        if stream > self._last and stream & 1:
            self._last = stream
            self._call(stream, head, ends)
        elif (call := self.calls.get(stream)) and not call.half_closed:  # trailers, of which gRPC's clients have none
            call.received(b"", 0, ends)
        elif not stream & 1:
            raise Fault(frames.PROTOCOL_ERROR, f"a call on stream {stream}")

    def _call(self, stream: int, head: Head, ends: bool) -> None:
        if self._final:
            return  # the client knows that it will not be looked at
        if len(self.calls) >= MAX_STREAMS:
            self._write(frame(frames.RST_STREAM, 0, stream, number(frames.REFUSED_STREAM)))
            return
        call = head.refusal or self._host.call(self, stream, head, self._first_window)
        if isinstance(call, bytes):
            self._write(self._block_of(frames.END_STREAM, stream, call))
            if not ends:
                self._refused.add(stream)
            return
        self.calls[stream] = call
        self._host.begin(call)
        if ends and stream in self.calls:
            call.received(b"", 0, True)

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if stream and kind in (frames.PING, frames.SETTINGS, frames.GOAWAY):
            raise Fault(frames.PROTOCOL_ERROR, f"a frame of kind {kind} on stream {stream}")
        if kind == frames.WINDOW_UPDATE:
            self._widen(stream, payload)
        elif kind == frames.RST_STREAM:
            self._reset(stream, payload)
        elif kind == frames.PING:
            self._pinged(flags, payload)
        elif kind == frames.SETTINGS:
            self._set(flags, payload)
        elif kind == frames.CONTINUATION:
            self._continue(flags, stream, payload)
        elif kind == frames.PUSH_PROMISE:
            raise Fault(frames.PROTOCOL_ERROR, "a promise of a client's")
        # PRIORITY, GOAWAY and what is not known say nothing that matters here.

    def _continue(self, flags: int, stream: int, payload: bytes) -> None:
        if not self._block or self._block[0] != stream:
            raise Fault(frames.PROTOCOL_ERROR, f"CONTINUATION of nothing, on stream {stream}")
        _, first, begun = self._block
        begun += payload
        if len(begun) > 4 * MAX_BYTES or not (payload or flags & frames.END_HEADERS):
            raise Fault(frames.ENHANCE_YOUR_CALM, "a header block that does not end")
        self._block = (stream, first, begun)
        if flags & frames.END_HEADERS:
            self._block = None
            self._headers(first & frames.END_STREAM | frames.END_HEADERS, stream, begun)

    def _set(self, flags: int, payload: bytes) -> None:
        if flags & frames.ACK:
            if payload:
                raise Fault(frames.FRAME_SIZE_ERROR, "acknowledged SETTINGS with values")
            return
        values = frames.read_settings(payload)
        if any(name == frames.HEADER_TABLE_SIZE and value < _TABLE for name, value in values):
            self._table = b"\x20"  # none is used
        settings = dict(values)
        self._max_frame = settings.get(frames.MAX_FRAME_SIZE, self._max_frame)
        more = settings.get(frames.INITIAL_WINDOW_SIZE, self._first_window) - self._first_window
        if more:
            self._resize(more)
        self._write(frame(frames.SETTINGS, frames.ACK, 0))
        if more > 0:
            self._flush()

    def _resize(self, more: int) -> None:
        """Change the windows of all calls."""
        now = self._loop.time()
        if now - self._resized_s >= 1:
            self._resized, self._resized_s = 0, now
        self._resized += 1
        if self._resized > _MOST_RESIZED:
            raise Fault(frames.ENHANCE_YOUR_CALM, "windows that do not stay")
        self._first_window += more
        for call in self.calls.values():
            call.window += more
            if call.window > frames.LARGEST:
                raise Fault(frames.FLOW_CONTROL_ERROR, f"a window of {call.window} bytes")

    def _widen(self, stream: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Fault(frames.FRAME_SIZE_ERROR, f"WINDOW_UPDATE of {len(payload)} bytes")
        more = int.from_bytes(payload, "big") & frames.LARGEST
        if not stream:
            if not more:
                raise Fault(frames.PROTOCOL_ERROR, "a window widened by nothing")
            self._window += more
            if self._window > frames.LARGEST:
                raise Fault(frames.FLOW_CONTROL_ERROR, f"a window of {self._window} bytes")
            self._flush()
        elif call := self.calls.get(stream):
            call.window += more
            if not more or call.window > frames.LARGEST:
                self.reset(call, frames.FLOW_CONTROL_ERROR if more else frames.PROTOCOL_ERROR)
            elif stream in self._blocked:
                self._send(call)
        elif stream > self._last:
            raise Fault(frames.PROTOCOL_ERROR, f"WINDOW_UPDATE of stream {stream}, which is not open")

    def _reset(self, stream: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Fault(frames.FRAME_SIZE_ERROR, f"RST_STREAM of {len(payload)} bytes")
        if not 0 < stream <= self._last:
            raise Fault(frames.PROTOCOL_ERROR, f"RST_STREAM of stream {stream}, which is not open")
        self._refused.discard(stream)
        if call := self.calls.get(stream):
            self._forget(call)
            call.leave()

    def _pinged(self, flags: int, payload: bytes) -> None:
        if len(payload) != 8:
            raise Fault(frames.FRAME_SIZE_ERROR, f"PING of {len(payload)} bytes")
        if flags & frames.ACK:
            if payload == _LAST:
                self._finish()
            return
        now = self._loop.time()
        if now - self._pinged_s < self._host.options.min_ping_interval_s:
            self._strikes += 1
        self._pinged_s = now
        if self._strikes > _STRIKES:
            for call in [*self.calls.values()]:
                call.expel("Too many pings")
            # Words that gRPC's clients know: they ask less often from then on.
            raise Fault(frames.ENHANCE_YOUR_CALM, "too_many_pings")
        self._write(frame(frames.PING, frames.ACK, 0, payload))

    # What is sent.

    def _write(self, data: bytes) -> None:
        """Send something, with all else that one read from the socket or one batch of answers gives."""
        out = self._out
        out.append(data)
        if not self._reading:
            afterwards = self._host.inbox.afterwards
            if afterwards is None:
                self._write_out()
            elif len(out) == 1:
                afterwards.append(self._write_out)

    def _write_out(self) -> None:
        out = self._out
        if out:
            data = out[0] if len(out) == 1 else b"".join(out)
            out.clear()
            if not self._transport.is_closing():
                self._transport.write(data)

    def answer(self, call: Call, message: bytes) -> None:
        """The only answer of a call, and its end."""
        size = messages.PREFIX_BYTES + len(message)
        if size > self._window or size > call.window or size > self._max_frame or self._table:
            self.begin_answers(call)
            self.send(call, message)
            self.end(call, TRAILERS_OK)
            return
        self._window -= size
        self._strikes = 0
        stream = number(call.stream)
        data = size.to_bytes(3, "big") + b"\0\0"  # the head of a DATA frame
        prefix = b"\0" + len(message).to_bytes(4, "big")
        self._write(
            b"".join((_RESPONSE_HEAD, stream, RESPONSE, data, stream, prefix, message, _OK_HEAD, stream, TRAILERS_OK))
        )
        self._close(call)

    def begin_answers(self, call: Call) -> None:
        """The headers before the first answer."""
        self._write(self._block_of(0, call.stream, RESPONSE))

    def send(self, call: Call, message: bytes) -> None:
        """One answer, as far as the windows let it out."""
        if call.unsent is None:
            call.unsent = deque()
        call.unsent.append(memoryview(messages.prefixed(message)))
        self._send(call)

    async def room(self) -> None:
        """Wait until the socket takes more."""
        await self._room.wait()

    def end(self, call: Call, block: bytes) -> None:
        """The header block that ends a call, behind the answers that wait."""
        call.last = block
        self._send(call)

    def reset(self, call: Call, code: int) -> None:
        """End a call whose client has broken the protocol."""
        self._write(frame(frames.RST_STREAM, 0, call.stream, number(code)))
        self._forget(call)
        call.leave()

    def hold(self, size: int) -> bool:
        """Keep so many bytes more of the calls' requests, or fewer; whether there is room for them."""
        self._held += size
        return self._held <= _MOST_HELD * self._host.options.max_message_bytes

    def more(self, call: Call, size: int) -> None:
        """Let a client send so many bytes more."""
        self._write(frame(frames.WINDOW_UPDATE, 0, call.stream, number(size)))

    def _send(self, call: Call) -> None:
        """What the windows let out."""
        self._strikes = 0
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
            out.append(self._block_of(frames.END_STREAM, call.stream, call.last))
        if out:
            self._write(b"".join(out))
        if unsent:
            self._blocked[call.stream] = call
            return
        self._blocked.pop(call.stream, None)
        if call.last is not None:
            self._close(call)
        call.sent()

    def _flush(self) -> None:
        for call in [*self._blocked.values()]:
            if self._window <= 0:
                break
            self._send(call)

    def _block_of(self, flags: int, stream: int, block: bytes) -> bytes:
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

    # How calls and the connection end.

    def _close(self, call: Call) -> None:
        """A call's answers were sent."""
        if not call.half_closed:  # the client need not send the rest
            self._write(frame(frames.RST_STREAM, 0, call.stream, number(frames.NO_ERROR)))
        self._forget(call)

    def _forget(self, call: Call) -> None:
        if self.calls.pop(call.stream, None) is None:
            return
        self._blocked.pop(call.stream, None)
        call.forgotten()
        call.unsent = None
        if self._final and not self.calls:
            self._hang_up()

    def go_away(self, why: bytes = b"") -> None:
        """Have the client make new calls elsewhere; the connection ends with the last of those that it has made."""
        if self._leaving:
            return
        self._leaving = True
        everything = number(frames.LARGEST) + number(frames.NO_ERROR) + why
        self._write(frame(frames.GOAWAY, 0, 0, everything) + frame(frames.PING, 0, 0, _LAST))

    def _finish(self) -> None:
        """The client has heard that it should go: what it sent before is here."""
        if not self._leaving or self._final:
            return
        self._final = True
        self._write(frame(frames.GOAWAY, 0, 0, number(self._last) + number(frames.NO_ERROR)))
        if not self.calls:
            self._hang_up()

    def abort(self, why: str) -> None:
        """End the connection, whatever runs; its calls with this text."""
        for call in [*self.calls.values()]:
            call.expel(why)
        self._end(frames.NO_ERROR, b"")

    def _end(self, code: int, why: bytes) -> None:
        self._write(frame(frames.GOAWAY, 0, 0, number(self._last) + number(code) + why[:_WHY]))
        self._hang_up()
        for call in [*self.calls.values()]:
            self._forget(call)
            call.leave()
        self._final = True
        self._rest = b""

    def _hang_up(self) -> None:
        self._write_out()
        self._transport.close()

    # Time.

    def _later(self, what: str, seconds: float, then: object) -> None:
        self._timers[what] = self._loop.call_later(seconds, then)  # type: ignore[arg-type]

    def _look(self) -> None:
        """Ask a silent client for a sign of life."""
        options = self._host.options
        silent_s = self._loop.time() - self._heard_s
        if silent_s < options.keepalive_time_s:
            self._later("silence", options.keepalive_time_s - silent_s, self._look)
            return
        self._write(frame(frames.PING, 0, 0, _ALIVE))
        asked_s, unsent = self._loop.time(), self._transport.get_write_buffer_size()

        def give_up() -> None:
            if self._heard_s >= asked_s or self._transport.get_write_buffer_size() < unsent:  # or it takes, slowly
                self._look()
            else:
                self._transport.abort()

        self._later("silence", options.keepalive_timeout_s, give_up)

    def _grow_old(self) -> None:
        self.go_away(b"max_age")
        self._later("age", self._host.options.max_connection_age_grace_s, self._die)

    def _die(self) -> None:
        self.abort("max connection age")


def _peer(address: object) -> str:
    """As gRPC writes it: ipv4:127.0.0.1:50000."""
    if not isinstance(address, tuple):
        return "unix:"
    host, port = address[:2]
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
