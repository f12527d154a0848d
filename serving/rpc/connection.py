"""One HTTP/2 connection: the frames that come, and how calls and the connection begin and end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from serving.rpc import frames
from serving.rpc.call import WINDOW, Call
from serving.rpc.frames import Fault, frame, number
from serving.rpc.headers import MAX_BYTES, Head, Reader
from serving.rpc.inbox import Inbox
from serving.rpc.options import Options
from serving.rpc.outgoing import Outgoing
from serving.rpc.signs import Signs

MAX_STREAMS = 4096  # calls of one connection at a time; clients let others wait
_MAX_FRAME = 1 << 18
_TOP_UP = 1 << 29  # bytes after which the connection's own window, which never holds anybody up, is opened again
_BUFFERED = 1 << 20  # bytes that may wait for the socket before a client that reads nothing is read no more
_WHY = 200  # bytes of an explanation

LINGERS_S = 2.0  # a client that has been told all and is silent for so long is not waited for
_FAREWELL_S = 0.2  # and one that is sent away has so long to take its farewell
_HEARS_S = 1.0  # a client that does not say it has heard a GOAWAY is taken to have done so
_LAST = b"last...."  # what the PING says that follows a GOAWAY


class Host(Protocol):
    """What a connection needs of its server."""

    options: Options
    inbox: Inbox
    stopping: bool

    def opened(self, connection: Connection) -> None:
        """A client has connected."""

    def closed(self, connection: Connection) -> None:
        """It has gone, or was sent away."""

    def call(self, connection: Connection, outgoing: Outgoing, stream: int, head: Head) -> Call | bytes:
        """A new call, or the header block that refuses it unread."""

    def begin(self, call: Call) -> None:
        """A call may be looked at."""


class Connection(asyncio.Protocol):
    """A client's connection."""

    def __init__(self, host: Host) -> None:
        self.peer = ""
        self.calls: dict[int, Call] = {}
        self._host = host
        self._transport: asyncio.Transport
        self._outgoing: Outgoing
        self._signs: Signs
        self._greeted = False  # the client's preface was there
        self._rest = b""  # of what came: the beginning of a frame
        self._block: tuple[int, int, bytes] | None = None  # a header block that is not whole: stream, flags, bytes
        self._reader = Reader()
        self._last = 0  # the newest stream
        self._refused: set[int] = set()  # streams that were ended before their client had
        self._unfinished: list[Call] = []  # calls with a deadline that have begun
        self._held = 0  # bytes of requests that are not complete, or that nobody has taken yet
        self._taken = 0  # bytes since the connection's window was opened
        self._leaving = False  # the client was told to make no more calls
        self._final = False  # and which one was the last
        self._deaf: asyncio.TimerHandle | None = None  # when it is taken to have heard so, whatever it says
        self._hung_up = False  # it was told all, and need only take it
        self._lingering: asyncio.TimerHandle | None = None  # when it is given up
        self._heard = False  # whether it has sent anything since that was set

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not derived from asyncio's
        self._transport.set_write_buffer_limits(_BUFFERED)
        self.peer = _peer(transport.get_extra_info("peername"))
        self._outgoing = Outgoing(self._transport, self._host.inbox, self._close)
        self._signs = Signs(self, self._transport, self._outgoing, self._host.options)
        self._host.opened(self)
        settings = {
            frames.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
            frames.INITIAL_WINDOW_SIZE: WINDOW,
            frames.MAX_FRAME_SIZE: _MAX_FRAME,
            frames.MAX_HEADER_LIST_SIZE: MAX_BYTES,
        }
        self._outgoing.write(frames.settings(settings))
        self._outgoing.more(0, frames.LARGEST - frames.DEFAULT_WINDOW)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self._end(frames.INADEQUATE_SECURITY, b"want TLS that has agreed on h2 (ALPN)")
        elif self._host.stopping:  # its handshake took so long
            self.go_away()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self._hung_up:
            return
        self._signs.heard()
        if self._rest:
            data = self._rest + data
        outgoing = self._outgoing
        outgoing.gathering = True
        try:
            self._rest = self._frames(data)
            for stream in self._refused:  # they need not send the rest
                outgoing.reset(stream, frames.NO_ERROR)
            self._refused.clear()
            for call in self._unfinished:
                if not call.half_closed and call.stream in self.calls:  # or it has ended
                    call.watch()
            self._unfinished.clear()
        except Fault as fault:
            self._end(fault.code, str(fault).encode())
        finally:
            outgoing.gathering = False
            outgoing.flush()

    def pause_writing(self) -> None:
        self._outgoing.has_room(False)
        if not self._transport.is_closing():
            self._transport.pause_reading()  # who does not read the answers may ask no more

    def resume_writing(self) -> None:
        self._outgoing.has_room(True)
        self._signs.heard()
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, _error: Exception | None) -> None:
        self._signs.stop()
        for timer in (self._deaf, self._lingering):
            if timer:
                timer.cancel()
        for call in [*self.calls.values()]:
            self._forget(call)
            call.leave()
        self._outgoing.has_room(True)
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
            self._outgoing.more(0, self._taken)
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
            self._outgoing.reset(stream, frames.REFUSED_STREAM)
            return
        call = head.refusal or self._host.call(self, self._outgoing, stream, head)
        if isinstance(call, bytes):
            self._outgoing.refuse(stream, call)
            if not ends:
                self._refused.add(stream)
            return
        self.calls[stream] = call
        call.half_closed = ends
        self._host.begin(call)
        if not ends and head.timeout_s is not None:
            self._unfinished.append(call)
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
        self._outgoing.set(payload, self.calls.values())

    def _widen(self, stream: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Fault(frames.FRAME_SIZE_ERROR, f"WINDOW_UPDATE of {len(payload)} bytes")
        more = int.from_bytes(payload, "big") & frames.LARGEST
        if not stream:
            self._outgoing.widen(more)
        elif call := self.calls.get(stream):
            if not self._outgoing.widen_call(call, more):
                self.reset(call, frames.FLOW_CONTROL_ERROR if more else frames.PROTOCOL_ERROR)
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
        if not self._signs.pinged():
            for call in [*self.calls.values()]:
                call.expel("Too many pings")
            # Words that gRPC's clients know: they ask less often from then on.
            raise Fault(frames.ENHANCE_YOUR_CALM, "too_many_pings")
        self._outgoing.write(frame(frames.PING, frames.ACK, 0, payload))

    # How calls and the connection end.

    def hold(self, size: int) -> bool:
        """Keep so many bytes more of the calls' requests, or fewer; whether there is room for them."""
        self._held += size
        return self._held <= self._host.options.max_held_bytes

    def reset(self, call: Call, code: int) -> None:
        """End a call whose client has broken the protocol."""
        self._outgoing.reset(call.stream, code)
        self._forget(call)
        call.leave()

    def _close(self, stream: int) -> None:
        """A call's answers were sent."""
        call = self.calls.pop(stream)
        if not call.half_closed:  # the client need not send the rest
            self._outgoing.reset(stream, frames.NO_ERROR)
        self._ended(call)

    def _forget(self, call: Call) -> None:
        """A call ends before its answers were sent, if it had not ended."""
        if self.calls.pop(call.stream, None):
            self._outgoing.forget(call)
            self._ended(call)

    def _ended(self, call: Call) -> None:
        call.forgotten()
        if self._final and not self.calls:
            self._hang_up(patiently=True)

    def go_away(self, why: bytes = b"") -> None:
        """Have the client make new calls elsewhere; the connection ends with the last of those that it has made."""
        if self._leaving:
            return
        self._leaving = True
        if not self._greeted:
            self._end(frames.NO_ERROR, why)
            return
        everything = number(frames.LARGEST) + number(frames.NO_ERROR) + why
        self._outgoing.write(frame(frames.GOAWAY, 0, 0, everything) + frame(frames.PING, 0, 0, _LAST))
        self._deaf = asyncio.get_running_loop().call_later(_HEARS_S, self._finish)

    def _finish(self) -> None:
        """The client has heard that it should go, or should have: what it sent before is here."""
        if not self._leaving or self._final:
            return
        self._final = True
        self._outgoing.write(frame(frames.GOAWAY, 0, 0, number(self._last) + number(frames.NO_ERROR)))
        if not self.calls:
            self._hang_up(patiently=True)

    def abort(self, why: str) -> None:
        """End the connection, whatever runs; its calls with this text."""
        for call in [*self.calls.values()]:
            call.expel(why)
        self._end(frames.NO_ERROR, b"")
        if self._transport.get_write_buffer_size():
            self._transport.abort()  # it takes nothing
        else:
            self._give_up_after(_FAREWELL_S, self._transport.abort)

    def _end(self, code: int, why: bytes) -> None:
        self._outgoing.write(frame(frames.GOAWAY, 0, 0, number(self._last) + number(code) + why[:_WHY]))
        self._hang_up(patiently=False)
        for call in [*self.calls.values()]:
            self._forget(call)
            call.leave()
        self._final = True
        self._rest = b""

    def _hang_up(self, patiently: bool) -> None:
        """Say nothing more, and close once the client has: it may still be taking what was said.

        A socket that is closed while its client sends, as gRPC's do to acknowledge what they took, takes back what is
        on its way. TLS waits by itself until the client has closed too.
        """
        self._outgoing.end_all()
        if self._hung_up or self._transport.is_closing():
            return
        self._hung_up = True
        if self._transport.get_extra_info("ssl_object") is not None:
            self._transport.close()
            return
        self._transport.write_eof()
        self._linger(patiently)

    def _linger(self, patiently: bool) -> None:
        """Close after a while; not before a client is silent that has broken no rule."""
        self._heard = False

        def look() -> None:
            if patiently and (self._heard or self._transport.get_write_buffer_size()):
                self._linger(patiently)
            else:
                self._transport.close()

        self._give_up_after(LINGERS_S, look)

    def _give_up_after(self, seconds: float, give_up: Callable[[], None]) -> None:
        if self._lingering:
            self._lingering.cancel()
        self._lingering = asyncio.get_running_loop().call_later(seconds, give_up)


def _peer(address: object) -> str:
    """As gRPC writes it: ipv4:127.0.0.1:50000."""
    if not isinstance(address, tuple):
        return "unix:"
    host, port = address[:2]
    host = host.removeprefix("::ffff:")  # of a socket for both
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
