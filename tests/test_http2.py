"""HTTP/2 and gRPC as raw sockets speak it: what the server makes of each frame, of clients that are wrong, and hostile.

Numbers in the comments are sections of RFC 9113.
"""

import asyncio
import base64
import gc
import gzip
import random
import socket
import sys
import threading
import time
import warnings
import zlib
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import grpc
import hpack
import pytest
from conftest import wait_until
from test_rpc import SERVICE, Handlers

from benchmarks.calls import new_loop
from serving import rpc
from serving.rpc import frames
from serving.rpc.call import WINDOW
from serving.rpc.connection import MAX_STREAMS
from serving.rpc.frames import frame, number
from serving.rpc.messages import prefixed

WAIT_S = 10
WHOLE = frames.END_HEADERS
LAST = frames.END_HEADERS | frames.END_STREAM
ECHO = f"/{SERVICE}/echo"


class Server:
    """One on a thread of its own, and how its loop is asked."""

    def __init__(self, handlers, loop=asyncio.new_event_loop, **settings):
        self.handlers = handlers
        self.loop = loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.port = self.run(self._start(settings))

    async def _start(self, settings):
        self.rpc = rpc.Server(**settings)
        self.rpc.add_generic_rpc_handlers((self.handlers.generic(),))
        port = self.rpc.add_port("127.0.0.1", 0)
        await self.rpc.start()
        return port

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_S)

    def close(self):
        self.run(self.rpc.stop(None))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(WAIT_S)
        self.loop.close()


class More(Handlers):
    """With a stream that takes none of its requests, and a handler that says more than fits in a frame."""

    async def unread(self, requests, call):
        self.started.set()
        await asyncio.Event().wait()

    async def refuse(self, data, call):
        await call.abort(grpc.StatusCode.NOT_FOUND, data.decode(), (("hint-bin", b"\x01\xff"),))

    async def block(self, data, call):
        raise asyncio.CancelledError


@dataclass
class Answer:
    """What came on one stream."""

    blocks: list[dict[bytes, bytes]] = field(default_factory=list)
    data: bytes = b""
    sizes: list[int] = field(default_factory=list)  # of the DATA frames
    ended: bool = False
    reset: int | None = None

    @property
    def status(self):
        return int(self.blocks[-1][b"grpc-status"])

    @property
    def text(self):
        return self.blocks[-1].get(b"grpc-message", b"")

    @property
    def message(self):
        """The only one."""
        assert self.data == prefixed(self.data[5:])
        return self.data[5:]


class Client:
    """A plain client, which does nothing by itself."""

    def __init__(self, port, settings=None, preface=frames.PREFACE):
        self.socket = socket.create_connection(("127.0.0.1", port), WAIT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        self.unread = b""
        self.seen = []
        self.answers = {}
        self.unacknowledged = 0
        if preface:
            self.send(preface)
            self.set(settings or {})

    def close(self):
        self.socket.close()

    def send(self, *data):
        self.socket.sendall(b"".join(data))

    def set(self, values):
        self.unacknowledged += 1
        self.send(frames.settings(values))

    def read(self):
        """The next frame: kind, flags, stream, payload; None once the server has hung up."""
        while (frame := self._whole()) is None:
            try:
                came = self.socket.recv(1 << 18)
            except ConnectionError:
                came = b""
            if not came:
                return None
            self.unread += came
        return self._note(*frame)

    def _whole(self):
        if len(self.unread) < 9:
            return None
        end = 9 + int.from_bytes(self.unread[:3], "big")
        if len(self.unread) < end:
            return None
        data, self.unread = self.unread[:end], self.unread[end:]
        return data[3], data[4], int.from_bytes(data[5:9], "big"), data[9:]

    def _note(self, kind, flags, stream, payload):
        self.seen.append((kind, flags, stream, payload))
        answer = self.answers.setdefault(stream, Answer()) if stream else None
        if kind == frames.SETTINGS and flags & frames.ACK:
            self.unacknowledged -= 1
        elif kind == frames.HEADERS:
            assert len(payload) <= frames.DEFAULT_MAX_FRAME
            self.part = (stream, flags, payload)
        elif kind == frames.CONTINUATION:
            assert self.part[0] == stream
            self.part = (stream, self.part[1] | flags, self.part[2] + payload)
        elif kind == frames.DATA:
            answer.data += payload
            answer.sizes.append(len(payload))
            answer.ended = bool(flags & frames.END_STREAM)
        elif kind == frames.RST_STREAM:
            answer.reset = int.from_bytes(payload, "big")
        if kind in (frames.HEADERS, frames.CONTINUATION) and flags & WHOLE:
            answer.blocks.append(dict(self.decoder.decode(self.part[2], raw=True)))
            answer.ended = bool(self.part[1] & frames.END_STREAM)
        return kind, flags, stream, payload

    def until(self, kind, stream=None):
        """The payload of the next frame of a kind."""
        while found := self.read():
            if found[0] == kind and stream in (None, found[2]):
                return found[3]
        raise AssertionError("the server has hung up")

    def sync(self):
        """Read until the server has seen all that was sent."""
        self.set({})
        while self.unacknowledged:
            assert self.read(), "the server has hung up"

    def answer(self, stream):
        """The answer on a stream, once it has ended."""
        answer = self.answers.setdefault(stream, Answer())
        while not answer.ended and answer.reset is None:
            assert self.read(), "the server has hung up"
        return answer

    def goaway(self):
        """The code that the connection ends with: nothing comes behind it."""
        payload = self.until(frames.GOAWAY)
        assert self.read() is None
        return int.from_bytes(payload[4:8], "big")

    def fields(self, method="echo", **changes):
        """The usual headers, with others for `_method`, `_path` and the like, and more behind."""
        usual = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"/{SERVICE}/{method}",
            ":authority": "test",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        changed = {
            (":" if name[0] == "_" else "") + name.strip("_").replace("_", "-"): changes[name] for name in changes
        }
        return [(name, value) for name, value in (usual | changed).items() if value is not None]

    def block(self, method="echo", **changes):
        return self.encoder.encode(self.fields(method, **changes))

    def begin(self, stream, method="echo", flags=WHOLE, **changes):
        self.send(frame(frames.HEADERS, flags, stream, self.encoder.encode(self.fields(method, **changes))))

    def data(self, stream, data, flags=frames.END_STREAM):
        self.send(frame(frames.DATA, flags, stream, data))

    def ask(self, stream, data=b"hello", method="echo", **changes):
        """A unary call's answer."""
        self.begin(stream, method, **changes)
        self.data(stream, prefixed(data))
        return self.answer(stream)


@contextmanager
def serving(**settings):
    """A server, and what connects clients to it; all are closed at the end, the clients first."""
    server, clients = Server(More(), **settings), []

    def connect(*arguments, **more):
        clients.append(Client(server.port, *arguments, **more))
        return clients[-1]

    try:
        yield server, connect
    finally:
        for client in clients:
            client.close()
        server.close()


@pytest.fixture
def served():
    with serving() as (server, connect):
        yield server, connect


@pytest.fixture
def client(served):
    """One that has exchanged settings."""
    client = served[1]()
    client.sync()
    return client


@pytest.fixture
def handlers(served):
    return served[0].handlers


# How a connection begins.


def test_a_call_is_answered(client):
    answer = client.ask(1)
    assert answer.blocks[0][b":status"] == b"200"
    assert answer.blocks[0][b"content-type"] == b"application/grpc"
    assert (answer.status, answer.message, answer.reset) == (0, b"hello", None)


def test_the_server_speaks_first_of_settings(served):
    _, connect = served
    with closing(connect(preface=b"")) as silent:
        kind, flags, stream, payload = silent.read()
    assert (kind, flags, stream) == (frames.SETTINGS, 0, 0)
    assert dict(frames.read_settings(payload))[frames.INITIAL_WINDOW_SIZE] == WINDOW


@pytest.mark.parametrize(
    "preface",
    [b"GET / HTTP/1.1\r\nhost: test\r\n\r\n", b"\x16\x03\x01\x02\x00", frames.PREFACE[:-2] + b"\n\n", b"P" * 24],
    ids=["HTTP/1.1", "TLS", "wrong end", "wrong from the second byte"],
)
def test_a_wrong_preface_ends_the_connection(served, preface):
    _, connect = served
    assert connect(preface=preface).goaway() == frames.PROTOCOL_ERROR


def test_bytes_may_come_one_at_a_time(served):
    _, connect = served
    client = connect(preface=b"")
    block = client.block()
    call = frame(frames.HEADERS, WHOLE, 1, block) + frame(frames.DATA, frames.END_STREAM, 1, prefixed(b"hello"))
    for byte in frames.PREFACE + frames.settings({}) + call:
        client.send(bytes((byte,)))
    assert client.answer(1).message == b"hello"


# Connections that end because their client is wrong.


OPEN = 1  # a stream that has begun
IDLE = 7  # one that has not
WRONG = {
    "frame too large": (bytes.fromhex("040001") + bytes((frames.DATA, 0, 0, 0, 0, OPEN)), frames.FRAME_SIZE_ERROR),
    "DATA on an idle stream": (frame(frames.DATA, 0, IDLE, b"x"), frames.PROTOCOL_ERROR),
    "DATA on stream 0": (frame(frames.DATA, 0, 0, b"x"), frames.PROTOCOL_ERROR),
    "HEADERS on an even stream": (frame(frames.HEADERS, LAST, 2, b"\x83"), frames.PROTOCOL_ERROR),
    "HEADERS on stream 0": (frame(frames.HEADERS, LAST, 0, b"\x83"), frames.PROTOCOL_ERROR),
    "block interrupted by PING": (
        frame(frames.HEADERS, 0, 3, b"\x83") + frame(frames.PING, 0, 0, bytes(8)),
        frames.PROTOCOL_ERROR,
    ),
    "block interrupted by HEADERS": (
        frame(frames.HEADERS, 0, 3, b"\x83") + frame(frames.HEADERS, LAST, 5, b"\x83"),
        frames.PROTOCOL_ERROR,
    ),
    "block interrupted by an unknown frame": (
        frame(frames.HEADERS, 0, 3, b"\x83") + frame(0xFA, 0, 3, b"\x83"),
        frames.PROTOCOL_ERROR,
    ),
    "CONTINUATION of nothing": (frame(frames.CONTINUATION, WHOLE, OPEN, b"\x83"), frames.PROTOCOL_ERROR),
    "CONTINUATION on another stream": (
        frame(frames.HEADERS, 0, 3, b"\x83") + frame(frames.CONTINUATION, WHOLE, 5, b"\x83"),
        frames.PROTOCOL_ERROR,
    ),
    "DATA with too much padding": (frame(frames.DATA, frames.PADDED, OPEN, b"\x04abc"), frames.PROTOCOL_ERROR),
    "DATA without its padding": (frame(frames.DATA, frames.PADDED, OPEN), frames.PROTOCOL_ERROR),
    "HEADERS with too much padding": (
        frame(frames.HEADERS, LAST | frames.PADDED, 3, b"\x02\x83"),
        frames.PROTOCOL_ERROR,
    ),
    "HEADERS without their priority": (
        frame(frames.HEADERS, LAST | frames.PRIORITISED, 3, b"\0\0\0"),
        frames.FRAME_SIZE_ERROR,
    ),
    "SETTINGS of 5 bytes": (frame(frames.SETTINGS, 0, 0, bytes(5)), frames.FRAME_SIZE_ERROR),
    "SETTINGS on a stream": (frame(frames.SETTINGS, 0, OPEN), frames.PROTOCOL_ERROR),
    "acknowledged SETTINGS with values": (
        frame(frames.SETTINGS, frames.ACK, 0, bytes(6)),
        frames.FRAME_SIZE_ERROR,
    ),
    "windows of 2 GiB": (frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 31}), frames.FLOW_CONTROL_ERROR),
    "frames of 100 bytes": (frames.settings({frames.MAX_FRAME_SIZE: 100}), frames.PROTOCOL_ERROR),
    "frames of 16 MiB": (frames.settings({frames.MAX_FRAME_SIZE: 1 << 24}), frames.PROTOCOL_ERROR),
    "push set to 2": (frames.settings({frames.ENABLE_PUSH: 2}), frames.PROTOCOL_ERROR),
    "window of the connection overflows": (
        frame(frames.WINDOW_UPDATE, 0, 0, number(frames.LARGEST)),
        frames.FLOW_CONTROL_ERROR,
    ),
    "window of a stream overflows by SETTINGS": (
        frame(frames.WINDOW_UPDATE, 0, OPEN, number(1000))
        + frames.settings({frames.INITIAL_WINDOW_SIZE: (1 << 31) - 1}),
        frames.FLOW_CONTROL_ERROR,
    ),
    "window of the connection widened by 0": (frame(frames.WINDOW_UPDATE, 0, 0, number(0)), frames.PROTOCOL_ERROR),
    "WINDOW_UPDATE of 3 bytes": (frame(frames.WINDOW_UPDATE, 0, 0, bytes(3)), frames.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE on an idle stream": (frame(frames.WINDOW_UPDATE, 0, IDLE, number(1)), frames.PROTOCOL_ERROR),
    "RST_STREAM on an idle stream": (frame(frames.RST_STREAM, 0, IDLE, number(8)), frames.PROTOCOL_ERROR),
    "RST_STREAM on stream 0": (frame(frames.RST_STREAM, 0, 0, number(8)), frames.PROTOCOL_ERROR),
    "RST_STREAM of 3 bytes": (frame(frames.RST_STREAM, 0, OPEN, bytes(3)), frames.FRAME_SIZE_ERROR),
    "PING of 7 bytes": (frame(frames.PING, 0, 0, bytes(7)), frames.FRAME_SIZE_ERROR),
    "PING on a stream": (frame(frames.PING, 0, OPEN, bytes(8)), frames.PROTOCOL_ERROR),
    "GOAWAY on a stream": (frame(frames.GOAWAY, 0, OPEN, bytes(8)), frames.PROTOCOL_ERROR),
    "PUSH_PROMISE": (frame(frames.PUSH_PROMISE, WHOLE, OPEN, number(2) + b"\x83"), frames.PROTOCOL_ERROR),
    "block that names what no table has": (frame(frames.HEADERS, LAST, 3, b"\xfe"), frames.COMPRESSION_ERROR),
    "block that names index 0": (frame(frames.HEADERS, LAST, 3, b"\x80"), frames.COMPRESSION_ERROR),
    "block that is cut off": (frame(frames.HEADERS, LAST, 3, b"\0\x05te"), frames.COMPRESSION_ERROR),
    "block that makes the table too large": (
        frame(frames.HEADERS, LAST, 3, b"\x3f\xe2\x1f\x83"),
        frames.COMPRESSION_ERROR,
    ),
    "headers too large": (
        frame(frames.HEADERS, LAST, 3, b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4000 + b"\xbe" * 4),
        frames.ENHANCE_YOUR_CALM,
    ),
    "block that does not end": (
        frame(frames.HEADERS, 0, 3, b"\x83") + frame(frames.CONTINUATION, 0, 3, bytes(16_384)) * 6,
        frames.ENHANCE_YOUR_CALM,
    ),
    "pings": (frame(frames.PING, 0, 0, bytes(8)) * 5, frames.ENHANCE_YOUR_CALM),
}


@pytest.mark.parametrize(("sent", "code"), WRONG.values(), ids=WRONG)
def test_a_wrong_frame_ends_the_connection(served, client, sent, code):
    """With what ended it and nothing behind it; the handler that ran is told, and others are answered."""
    server, connect = served
    client.begin(OPEN, "unread")
    assert server.handlers.started.wait(WAIT_S)
    client.send(sent)
    client.socket.settimeout(2)
    assert client.goaway() == code
    assert connect().ask(1).message == b"hello"
    wait_until(lambda: not server.rpc._tasks)


def test_the_reason_of_an_end_is_short(client):
    """GOAWAY is a frame like others, of at most 16,384 bytes."""
    client.send(frame(frames.HEADERS, LAST, 1, b"\0\x7f" + b"\xff" * 15_000))
    assert len(client.until(frames.GOAWAY)) < 1000


# Frames that are uncommon, and right.


def test_a_header_block_in_many_pieces(client):
    block = client.block(padding="x" * 2000)
    pieces = [block[at : at + 100] for at in range(0, len(block), 100)]
    client.send(frame(frames.HEADERS, 0, 1, pieces[0]))
    client.send(*[frame(frames.CONTINUATION, 0, 1, piece) for piece in pieces[1:-1]])
    client.send(frame(frames.CONTINUATION, WHOLE, 1, pieces[-1]))
    client.data(1, prefixed(b"hello"))
    assert client.answer(1).message == b"hello"
    assert client.ask(3).message == b"hello"


def test_the_last_piece_of_a_header_block_may_be_empty(client):
    client.send(frame(frames.HEADERS, 0, 1, client.block()), frame(frames.CONTINUATION, WHOLE, 1))
    client.data(1, prefixed(b"hello"))
    assert client.answer(1).message == b"hello"


def test_the_end_of_a_stream_is_said_before_its_header_block_is_whole(client, handlers):
    block = client.block("double")
    client.send(frame(frames.HEADERS, frames.END_STREAM, 1, block[:9]), frame(frames.CONTINUATION, WHOLE, 1, block[9:]))
    assert client.answer(1).status == 0


@pytest.mark.parametrize("padding", [0, 1, 255])
@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("pieces", [1, 2])
def test_padded_and_prioritised_headers(client, padding, prioritised, pieces):
    block = client.block()
    cut = len(block) // pieces
    flags = frames.PADDED | (frames.PRIORITISED if prioritised else 0) | (WHOLE if pieces == 1 else 0)
    priority = b"\0\0\0\0\x10" if prioritised else b""
    client.send(frame(frames.HEADERS, flags, 1, bytes((padding,)) + priority + block[:cut] + b"\xff" * padding))
    if pieces == 2:
        client.send(frame(frames.CONTINUATION, WHOLE, 1, block[cut:]))
    client.data(1, prefixed(b"hello"))
    assert client.answer(1).message == b"hello"


@pytest.mark.parametrize("padding", [0, 1, 255])
def test_padded_data(client, padding):
    message = prefixed(b"hello" * 10)
    client.begin(1)
    for at in range(0, len(message), 7):
        client.data(1, bytes((padding,)) + message[at : at + 7] + b"\xff" * padding, frames.PADDED)
    client.data(1, b"")
    assert client.answer(1).message == b"hello" * 10


def test_padding_counts_in_the_window_and_is_given_back(client):
    """Far more of it than a window has room for."""
    client.begin(1)
    client.data(1, prefixed(b"hello"), 0)
    room = WINDOW - 10
    for _ in range(2 * WINDOW // 256):
        while room < 256:
            room += int.from_bytes(client.until(frames.WINDOW_UPDATE, 1), "big")
        client.data(1, b"\xff" + bytes(255), frames.PADDED)
        room -= 256
    client.data(1, b"")
    assert client.answer(1).message == b"hello"


def test_unknown_frames_and_flags_are_ignored(client):
    client.send(frame(0x0B, 0xFF, 0, b"x"), frame(0xFA, 0xFF, 1, bytes(1000)), frame(frames.PRIORITY, 0, 9, bytes(5)))
    client.send(frame(frames.SETTINGS, 0xFE, 0, (0xF00D).to_bytes(2, "big") + number(7)))
    client.unacknowledged += 1
    client.begin(1, flags=WHOLE | 0x80)
    client.data(1, prefixed(b"hello"), frames.END_STREAM | 0x80)
    assert client.answer(1).message == b"hello"


def test_the_reserved_bit_of_a_stream_is_ignored(client):
    """4.1: it has no meaning, whatever it is."""
    reserved = 1 << 31
    client.send(frame(frames.HEADERS, WHOLE, 1 | reserved, client.block()))
    client.send(frame(frames.DATA, frames.END_STREAM, 1 | reserved, prefixed(b"hello")))
    client.socket.settimeout(2)
    assert client.answer(1).message == b"hello"


def test_pings_are_acknowledged_and_settings_too(client):
    client.send(frame(frames.PING, 0, 0, b"12345678"))
    assert client.until(frames.PING) == b"12345678"
    assert client.seen[-1][1] == frames.ACK
    client.set({frames.INITIAL_WINDOW_SIZE: 100})
    client.until(frames.SETTINGS)
    assert client.seen[-1] == (frames.SETTINGS, frames.ACK, 0, b"")


def test_pings_between_answers_are_no_flood(client):
    for stream in range(1, 41, 2):
        client.send(frame(frames.PING, 0, 0, b"12345678"))
        assert client.ask(stream).message == b"hello"


def test_trailers_of_a_client_end_its_stream(client):
    client.begin(1, "double")
    client.data(1, prefixed(b"a"), 0)
    client.send(frame(frames.HEADERS, LAST, 1, client.encoder.encode([("checksum", "1")])))
    answer = client.answer(1)
    assert (answer.status, answer.data) == (0, prefixed(b"aa"))


def test_what_comes_behind_the_end_of_a_stream_changes_nothing(client, handlers):
    client.begin(1, "nap")
    client.data(1, prefixed(b"hello"))
    assert handlers.started.wait(WAIT_S)
    client.data(1, prefixed(b"more"))
    client.send(frame(frames.HEADERS, LAST, 1, client.encoder.encode([("more", "1")])))
    assert client.answer(1).message == b"rested"
    client.data(1, b"late")
    client.send(frame(frames.RST_STREAM, 0, 1, number(8)), frame(frames.WINDOW_UPDATE, 0, 1, number(1)))
    assert client.ask(3).message == b"hello"


def test_the_table_of_a_client_that_wants_none_is_said_to_be_empty(served):
    """RFC 7541, 4.2: an encoder that is told of a smaller table says so in its next block."""
    _, connect = served
    client = connect({frames.HEADER_TABLE_SIZE: 0})
    client.sync()
    client.decoder.max_allowed_table_size = 0
    assert client.ask(1).message == b"hello"


# Windows.


@pytest.mark.parametrize("method", ["echo", "double"])
def test_answers_keep_to_the_window_of_a_stream(served, method):
    _, connect = served
    client = connect({frames.INITIAL_WINDOW_SIZE: 10})
    client.sync()
    client.begin(1, method)
    client.data(1, prefixed(bytes(100)))
    sent = prefixed(bytes(100 if method == "echo" else 200))
    client.until(frames.DATA)
    for window in range(10, len(sent), 7):
        client.sync()
        assert client.answers[1].data == sent[:window]
        client.send(frame(frames.WINDOW_UPDATE, 0, 1, number(7)))
    answer = client.answer(1)
    assert (answer.data, answer.status) == (sent, 0)
    assert answer.sizes[0] == 10


def test_answers_keep_to_the_window_of_the_connection(client):
    """Which SETTINGS does not change: what all streams get is 65,535 bytes, however large their own windows are."""
    client.set({frames.INITIAL_WINDOW_SIZE: 1 << 20})
    for stream in (1, 3, 5):
        client.begin(stream)
        client.data(stream, prefixed(bytes(30_000)))
    while sum(len(answer.data) for answer in client.answers.values()) < frames.DEFAULT_WINDOW:
        assert client.read()
    client.sync()
    assert sum(len(answer.data) for answer in client.answers.values()) == frames.DEFAULT_WINDOW
    client.send(frame(frames.WINDOW_UPDATE, 0, 0, number(100_000)))
    assert all(client.answer(stream).message == bytes(30_000) for stream in (1, 3, 5))


def test_a_window_may_become_negative(served):
    _, connect = served
    client = connect({frames.INITIAL_WINDOW_SIZE: 1000})
    client.begin(1)
    client.data(1, prefixed(bytes(5000)))
    client.until(frames.DATA)
    client.set({frames.INITIAL_WINDOW_SIZE: 100})  # now -900
    client.send(frame(frames.WINDOW_UPDATE, 0, 1, number(900)))
    client.sync()
    assert len(client.answers[1].data) == 1000
    client.send(frame(frames.WINDOW_UPDATE, 0, 1, number(1)))
    client.sync()
    assert len(client.answers[1].data) == 1001
    client.set({frames.INITIAL_WINDOW_SIZE: 0})
    client.set({frames.INITIAL_WINDOW_SIZE: 100_000})
    assert client.answer(1).message == bytes(5000)


@pytest.mark.parametrize("size", [16_384, 30_000, 1 << 24])
def test_answers_keep_to_the_size_of_frames(served, size):
    _, connect = served
    client = connect({frames.INITIAL_WINDOW_SIZE: 1 << 22, frames.MAX_FRAME_SIZE: min(size, frames.LARGEST_FRAME)})
    client.send(frame(frames.WINDOW_UPDATE, 0, 0, number(1 << 22)))
    client.sync()
    message = random.Random(0).randbytes(1_000_000)
    client.begin(1)
    for at in range(0, len(message) + 5, 1 << 18):
        client.data(1, prefixed(message)[at : at + (1 << 18)], frames.END_STREAM * (at + (1 << 18) >= len(message) + 5))
    answer = client.answer(1)
    assert answer.message == message
    assert max(answer.sizes) == min(size, len(message) + 5)


def test_long_statuses_keep_to_the_size_of_frames(client):
    """The client checks that no HEADERS frame has more than 16,384 bytes."""
    answer = client.ask(1, b"x" * 40_000, "refuse")
    assert answer.status == 5
    assert answer.text.startswith(b"x" * 1000)


@pytest.mark.parametrize("method", ["echo", "double"])
def test_a_large_request_gets_room(client, method):
    message = random.Random(1).randbytes(4_000_000)
    data = prefixed(message)
    client.set({frames.INITIAL_WINDOW_SIZE: 1 << 24})
    client.send(frame(frames.WINDOW_UPDATE, 0, 0, number(1 << 24)))
    client.begin(1, method)
    room = WINDOW
    for at in range(0, len(data), 16_384):
        while room < 16_384:
            room += int.from_bytes(client.until(frames.WINDOW_UPDATE, 1), "big")
        piece = data[at : at + 16_384]
        client.data(1, piece, frames.END_STREAM * (at + 16_384 >= len(data)))
        room -= len(piece)
    assert client.answer(1).message == message * (1 if method == "echo" else 2)


def test_a_client_that_overruns_its_window_is_reset(client, handlers):
    """A stream that takes no requests opens its window no more; another goes on."""
    client.begin(1, "unread")
    assert handlers.started.wait(WAIT_S)
    for _ in range(2 * WINDOW // 65_536 + 1):
        client.data(1, prefixed(bytes(65_531)), 0)
    assert client.answer(1).reset == frames.FLOW_CONTROL_ERROR
    assert client.ask(3).message == b"hello"


@pytest.mark.parametrize(
    ("more", "code"), [(0, frames.PROTOCOL_ERROR), (frames.LARGEST, frames.FLOW_CONTROL_ERROR)], ids=["0", "overflow"]
)
def test_a_wrong_window_of_a_stream_ends_the_stream(client, handlers, more, code):
    client.begin(1, "unread")
    client.send(frame(frames.WINDOW_UPDATE, 0, 1, number(more)))
    assert client.answer(1).reset == code
    assert client.ask(3).message == b"hello"


def test_the_window_of_the_connection_is_given_back(client):
    """DATA that is ignored counts too: after 600 MB there still is room for as much."""
    client.begin(1, "nothing")
    client.answer(1)
    room = frames.DEFAULT_WINDOW + sum(
        int.from_bytes(payload, "big") for kind, _, stream, payload in client.seen if (kind, stream) == (8, 0)
    )
    ignored = frame(frames.DATA, 0, 1, bytes(1 << 18)) * 8
    for _ in range(300):
        client.send(ignored)
        room -= 8 << 18
    client.sync()
    given = [int.from_bytes(payload, "big") for kind, _, stream, payload in client.seen if (kind, stream) == (8, 0)]
    assert len(given) == 2
    assert room + given[1] > 1 << 30


def test_data_that_is_not_declared_is_not_kept(client):
    """A message says how long it is: what comes behind it ends the call, before the client says that it is done."""
    client.begin(1)
    client.data(1, prefixed(b"hello"), 0)
    client.data(1, bytes(1000), 0)
    client.sync()
    assert client.answers[1].status == 12  # UNIMPLEMENTED


def test_empty_messages_hold_their_client_up(client, handlers):
    """Each takes room while nobody takes it: the window must not be opened for ever."""
    client.begin(1, "unread")
    assert handlers.started.wait(WAIT_S)
    for _ in range(2 * WINDOW // 100_000):
        client.data(1, prefixed(b"") * 20_000, 0)
    client.socket.settimeout(2)
    assert client.answer(1).reset == frames.FLOW_CONTROL_ERROR


def test_a_stream_that_never_waits_leaves_the_loop_to_others(served):
    """Its client has room for a million answers, which must not all be made before anybody else is answered."""
    _, connect = served
    other, client = connect(), connect({frames.INITIAL_WINDOW_SIZE: 6_000_000})
    client.send(frame(frames.WINDOW_UPDATE, 0, 0, number(6_000_000)))
    client.sync()
    client.begin(1, "count")
    client.until(frames.DATA)
    began = time.monotonic()
    assert other.ask(1).message == b"hello"
    assert time.monotonic() - began < 1


# What a call costs when it is left.


def test_a_reset_cancels_the_handler(client, handlers):
    client.begin(1, "wait")
    client.data(1, prefixed(b""))
    assert handlers.started.wait(WAIT_S)
    client.send(frame(frames.RST_STREAM, 0, 1, number(frames.CANCEL)))
    assert handlers.cancelled.wait(WAIT_S)
    assert client.ask(3).message == b"hello"
    assert not client.answers.get(1)


def test_a_client_that_hangs_up_cancels_its_handlers(client, handlers):
    client.begin(1, "wait")
    client.data(1, prefixed(b""))
    assert handlers.started.wait(WAIT_S)
    client.close()
    assert handlers.cancelled.wait(WAIT_S)


def test_calls_that_are_reset_before_they_start_are_not_counted_for_ever():
    """Request and reset come with one read: such calls must not use up what `Limit` allows to begin."""
    coming = []
    limit = rpc.Limit([ECHO], lambda method, starting: coming.append(starting))
    with serving(limit=limit) as (server, connect):
        client = connect()
        client.sync()
        sent = b""
        for stream in range(1, 101, 2):
            sent += frame(frames.HEADERS, WHOLE, stream, client.block())
            sent += frame(frames.DATA, frames.END_STREAM, stream, prefixed(b""))
            sent += frame(frames.RST_STREAM, 0, stream, number(frames.CANCEL))
        client.send(sent)
        client.sync()
        assert client.ask(101).message == b"hello"
        assert coming[-1] == 0
        assert server.rpc.starting == 0
        assert server.rpc.starting == 0


@pytest.mark.parametrize("method", ["echo", "double"])
def test_calls_that_are_reset_before_they_start_leave_nothing_behind(served, client, method):
    """In particular no coroutine that was never awaited."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        client.send(
            frame(frames.HEADERS, WHOLE, 1, client.block(method)),
            frame(frames.DATA, frames.END_STREAM, 1, prefixed(b"")),
            frame(frames.RST_STREAM, 0, 1, number(frames.CANCEL)),
        )
        client.sync()
        wait_until(lambda: not served[0].rpc._tasks)
        gc.collect()
    assert [str(warning.message) for warning in warned] == []


def test_many_resets_leave_nothing_behind(served, client):
    server, _ = served
    for stream in range(1, 4001, 2):
        client.begin(stream, "wait")
        client.send(frame(frames.RST_STREAM, 0, stream, number(frames.CANCEL)))
    assert client.ask(4001).message == b"hello"
    (connection,) = server.rpc._connections
    wait_until(lambda: not connection.calls)
    assert (connection._outgoing._blocked, connection._refused) == ({}, set())


def test_more_calls_than_are_allowed_are_refused(client):
    """They may be tried again; and there is room again once one has ended."""
    client.send(
        *[frame(frames.HEADERS, WHOLE, stream, client.block("wait")) for stream in range(1, 2 * MAX_STREAMS + 1, 2)]
    )
    over = 2 * MAX_STREAMS + 1
    client.begin(over)
    assert client.answer(over).reset == frames.REFUSED_STREAM
    client.data(over, prefixed(b"late"))
    client.send(frame(frames.RST_STREAM, 0, 1, number(frames.CANCEL)))
    assert client.ask(over + 2).message == b"hello"


@pytest.mark.parametrize("sent", ["WINDOW_UPDATE", "SETTINGS", "one SETTINGS"])
def test_many_answers_that_wait_do_not_make_other_frames_dear(served, sent):
    """Two thousand calls without a window: five thousand frames must not cost ten million looks."""
    _, connect = served
    client = connect({frames.INITIAL_WINDOW_SIZE: 0})
    client.sync()
    calls, many = range(1, 4001, 2), 5000
    client.send(
        *[
            frame(frames.HEADERS, WHOLE, stream, client.block()) + frame(frames.DATA, 1, stream, prefixed(b"x"))
            for stream in calls
        ]
    )
    while len(client.answers) < len(calls) or not all(answer.blocks for answer in client.answers.values()):
        assert client.read()
    if sent == "WINDOW_UPDATE":
        flood = frame(frames.WINDOW_UPDATE, 0, 1, number(1)) * many
        expected = prefixed(b"x")
    elif sent == "SETTINGS":
        flood = frames.settings({frames.INITIAL_WINDOW_SIZE: 0}) * many
        client.unacknowledged += many
        expected = b""
    else:
        flood = frame(frames.SETTINGS, 0, 0, (b"\0\x04" + number(1) + b"\0\x04" + number(0)) * many)
        client.unacknowledged += 1
        expected = b""
    began = time.monotonic()
    client.send(flood)
    client.sync()
    assert client.answers[1].data == expected
    assert time.monotonic() - began < 1


# Messages.


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
@pytest.mark.parametrize("method", ["echo", "double"])
def test_compressed_requests(client, encoding, pack, method):
    """And one that is not compressed, which a client may send at any time."""
    packed = pack(b"hello" * 100)
    client.begin(1, method, grpc_encoding=encoding)
    client.data(1, b"\1" + number(len(packed)) + packed)
    assert client.answer(1).message == b"hello" * (100 if method == "echo" else 200)
    client.begin(3, method, grpc_encoding=encoding)
    client.data(3, prefixed(b"a"))
    assert client.answer(3).message == (b"a" if method == "echo" else b"aa")


def packed(data):
    return b"\1" + number(len(data)) + data


UNREADABLE = {
    "unknown": ("snappy", packed(b"hello"), 12),
    "none": ("identity", packed(b"hello"), None),  # INTERNAL by gRPC's document on compression, UNIMPLEMENTED here
    "damaged": ("gzip", packed(gzip.compress(b"hello" * 9)[:-9] + bytes(9)), 13),
    "of another kind": ("deflate", packed(gzip.compress(b"hello")), 13),
    "cut off": ("gzip", packed(gzip.compress(b"hello")[:-5]), 13),
    "empty": ("gzip", packed(b""), 13),
    "bomb": ("gzip", packed(gzip.compress(bytes(100_000_000), 1)), 8),
    "too long": ("identity", b"\0" + number((1 << 22) + 1), 8),
    "much too long": ("identity", b"\0" + number((1 << 32) - 1), 8),
}


@pytest.mark.parametrize("method", ["echo", "double"])
@pytest.mark.parametrize(("encoding", "data", "status"), UNREADABLE.values(), ids=UNREADABLE)
def test_messages_that_cannot_be_read(client, method, encoding, data, status):
    """Each ends its call, and no other."""
    client.begin(1, method, grpc_encoding=encoding)
    for at in range(0, len(data), 100_000):
        client.data(1, data[at : at + 100_000], 0)
    client.data(1, b"")
    answer = client.answer(1)
    assert answer.status == status if status else answer.status in (12, 13)
    assert client.ask(3).message == b"hello"


@pytest.mark.parametrize("data", [b"", b"\0\0", prefixed(b"hello")[:-1], prefixed(b"a") + b"\0", prefixed(b"a") * 2])
def test_a_unary_call_has_one_request(client, data):
    client.begin(1)
    client.data(1, data)
    assert client.answer(1).status == 12  # UNIMPLEMENTED


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_request_in_small_pieces(client, size):
    data = prefixed(b"hello")
    client.begin(1)
    for at in range(0, len(data), size):
        client.data(1, data[at : at + size], 0)
        client.data(1, b"", 0)
    client.data(1, b"")
    assert client.answer(1).message == b"hello"


def test_compressed_messages_that_nobody_takes_stay_small(client, handlers):
    """A thousandfold: a window's worth of such messages must not be unpacked ahead."""
    bomb = packed(gzip.compress(bytes(1 << 22)))
    client.begin(1, "unread", grpc_encoding="gzip")
    assert handlers.started.wait(WAIT_S)
    began = time.monotonic()
    data = bomb * 250
    for at in range(0, len(data), 1 << 17):
        client.data(1, data[at : at + (1 << 17)], 0)
    client.sync()
    assert time.monotonic() - began < 1  # to unpack it all takes seconds, for which the loop does nothing else


# Headers.


def test_headers_that_make_no_call(client):
    for stream, (changes, status) in enumerate(
        [
            ({"content_type": "text/plain"}, b"415"),
            ({"content_type": None}, b"415"),
            ({"_method": "GET"}, b"405"),
            ({"_path": None}, b"400"),
            ({"_path": "echo"}, b"400"),
        ]
    ):
        answer = client.ask(2 * stream + 1, **changes)
        assert [block[b":status"] for block in answer.blocks] == [status]
        assert answer.data == b""
    assert client.ask(99, content_type="application/grpc+proto").message == b"hello"


@pytest.mark.parametrize("timeout", ["", "1", "S", "-1S", "1.5S", "123456789S", "1s", " 1S", "1S ", "١S"])
def test_malformed_timeouts(client, timeout):
    assert client.ask(1, grpc_timeout=timeout).status == 13
    assert client.ask(3).message == b"hello"


@pytest.mark.parametrize("timeout", ["99999999H", "1M", "60S", "60000m", "60000000u"])
def test_timeouts_in_all_units(client, handlers, timeout):
    assert client.ask(1, grpc_timeout=timeout).message == b"hello"
    ((*_, remaining),) = handlers.seen
    assert 50 < remaining <= (60 if timeout != "99999999H" else 1e12)


@pytest.mark.parametrize("method", ["wait", "unread"])
@pytest.mark.parametrize("timeout", ["100m", "1n", "0S"])
def test_a_handler_that_hangs_ends_at_the_deadline(client, method, timeout):
    answer = client.ask(1, b"", method, grpc_timeout=timeout)
    assert answer.status == 4  # DEADLINE_EXCEEDED
    assert client.ask(3).message == b"hello"


def test_a_request_that_does_not_end_ends_at_the_deadline(client):
    client.begin(1, grpc_timeout="100m")
    client.data(1, b"\0", 0)
    client.socket.settimeout(2)
    assert client.answer(1).status == 4  # DEADLINE_EXCEEDED


def test_a_handler_that_was_cancelled_by_somebody_else_still_answers(client):
    client.begin(1, "block")
    client.data(1, prefixed(b""))
    client.socket.settimeout(2)
    assert client.answer(1).status != 0


def test_binary_metadata_arrive_and_leave(client, handlers):
    """With and without their padding, one by one or in one field."""
    values = [b"", b"\0", b"\xff\xfe", b"\x00\x01\x02", bytes(range(256))]
    encoded = [base64.b64encode(value) for value in values]
    extra = [("a-bin", value) for value in encoded] + [("b-bin", value.rstrip(b"=")) for value in encoded]
    joined = b",".join(encoded[1:])
    block = client.encoder.encode([*client.fields(), *extra, ("c-bin", joined), ("plain", "x,y")])
    client.send(frame(frames.HEADERS, WHOLE, 1, block))
    client.data(1, prefixed(b""))
    assert client.answer(1).status == 0
    ((_, metadata, _, _),) = handlers.seen
    assert [value for key, value in metadata if key == "a-bin"] == values
    assert [value for key, value in metadata if key == "b-bin"] == values
    assert [value for key, value in metadata if key == "c-bin"] == values[1:]
    assert ("plain", "x,y") in metadata
    assert not {key for key, _ in metadata} & {"te", "content-type", ":path"}
    refused = client.ask(3, b"no", "refuse")
    assert refused.blocks[-1][b"hint-bin"] == base64.b64encode(b"\x01\xff").rstrip(b"=")


@pytest.mark.parametrize("value", ["$", "A", "AAAAA", "AA=A", "====", "ü"])
def test_binary_metadata_that_are_not(client, value):
    assert client.ask(1, a_bin=value).status == 13
    assert client.ask(3).message == b"hello"


def test_texts_of_statuses_are_escaped(client):
    """Which leaves what can be printed as it is, but for the sign that escapes."""
    text = "100% of größe\n\t~\x7f\U0001f600"
    answer = client.ask(1, text.encode(), "refuse")
    assert answer.status == 5
    assert answer.text == b"100%25 of gr%C3%B6%C3%9Fe%0A%09~%7F%F0%9F%98%80"
    assert client.ask(3, b"", "refuse").text == b""


def test_the_dynamic_table_of_a_client(client, handlers):
    """A block that adds to the table, then one byte for each field, more than once."""
    first, again = client.block(who="me"), client.block(who="me")
    assert len(first) > len(again) == len(client.fields(who="me"))
    for stream, block in ((1, first), (3, again), (5, again)):
        client.send(frame(frames.HEADERS, WHOLE, stream, block))
        client.data(stream, prefixed(b"hello"))
        assert client.answer(stream).message == b"hello"
    assert [dict(metadata)["who"] for _, metadata, *_ in handlers.seen] == ["me"] * 3


def test_a_block_is_read_anew_once_the_table_has_changed(client, handlers):
    """The same bytes name other fields after an insertion, also after one in a block that is refused or of trailers."""
    fixed = client.encoder.encode(client.fields())
    client.send(frame(frames.HEADERS, WHOLE, 1, fixed))
    client.data(1, prefixed(b""))
    client.answer(1)
    usual = client.encoder.encode(client.fields())
    newest = b"\xbe"  # the field that was added last

    def insert(value, base=b""):
        return base + b"\x40\x03who" + bytes((len(value),)) + value

    def shifted(by):
        """The usual block, whose indices into the dynamic table grow with each insertion."""
        return bytes(byte + by if byte >= 0x80 + 62 else byte for byte in usual)

    stream = 3
    for inserted, value in enumerate([b"one", b"two", b"six"], 1):
        client.send(frame(frames.HEADERS, LAST, stream, insert(value)))  # no call: it has no path
        for _ in range(2):
            stream += 2
            client.send(frame(frames.HEADERS, WHOLE, stream, shifted(inserted) + newest))
            client.data(stream, prefixed(value))
            assert client.answer(stream).message == value
        stream += 2
    seen = [(data, dict(metadata)["who"]) for data, metadata, *_ in handlers.seen[1:]]
    assert seen == [(b"one", "one")] * 2 + [(b"two", "two")] * 2 + [(b"six", "six")] * 2


def test_the_same_byte_means_another_header_after_an_insertion(client, handlers):
    """The very same block, sent before and after: once it names the one value, once the other."""
    prefix = b"\x83\x86\x04" + bytes((len(ECHO),)) + ECHO.encode() + b"\0\x0ccontent-type\x10application/grpc"
    client.send(frame(frames.HEADERS, LAST, 1, b"\x40\x03who\x03one"))
    for stream, block in ((3, b"\xbe"), (5, b"\xbe")):
        client.send(frame(frames.HEADERS, LAST, stream, block))
        assert client.answer(stream).blocks[0][b":status"] == b"400"
    client.send(frame(frames.HEADERS, LAST, 7, b"\x40\x03who\x03two"))
    client.send(frame(frames.HEADERS, WHOLE, 9, prefix + b"\xbe"))
    client.data(9, prefixed(b""))
    assert client.answer(9).status == 0
    ((_, metadata, *_),) = handlers.seen
    assert dict(metadata)["who"] == "two"


def test_the_table_may_shrink(client):
    """After which its entries are gone, whatever was remembered of blocks that named them."""
    client.ask(1)
    block = client.block()
    assert min(block) >= 0x80
    client.send(frame(frames.HEADERS, WHOLE, 3, block))
    client.data(3, prefixed(b"hello"))
    assert client.answer(3).message == b"hello"
    client.send(frame(frames.HEADERS, LAST, 5, b"\x20\x83"))
    client.send(frame(frames.HEADERS, WHOLE, 7, block))
    assert client.goaway() == frames.COMPRESSION_ERROR


def test_what_is_remembered_of_blocks_is_small(served, client):
    """Blocks of a few hundred bytes that each stand for 16 KB of headers: a thousand may not leave 20 MB behind."""
    server, _ = served
    adds = b"".join(b"\x40\x02%02d\x02%02d" % (name, name) for name in range(60))
    client.send(frame(frames.HEADERS, LAST, 1, adds))
    choose = random.Random(2)
    for stream in range(3, 503, 2):
        block = bytes(0x80 + 62 + choose.randrange(60) for _ in range(440))
        client.send(frame(frames.HEADERS, LAST, stream, block))
    client.sync()
    (connection,) = server.rpc._connections
    assert sum(len(head.details.invocation_metadata) for head in connection._reader._known.values()) < 10_000


# Connections that are told to go, or say nothing.


def test_a_stopping_server_lets_calls_finish(served, client):
    """Calls that the client makes before it has heard of it are answered too, later ones are not."""
    server, _ = served
    client.begin(1, "nap")
    client.data(1, prefixed(b""))
    assert server.handlers.started.wait(WAIT_S)
    stopping = asyncio.run_coroutine_threadsafe(server.rpc.stop(WAIT_S), server.loop)
    assert client.until(frames.GOAWAY) == number(frames.LARGEST) + number(frames.NO_ERROR)
    asked = client.until(frames.PING)
    client.begin(3)
    client.data(3, prefixed(b"hello"))
    client.send(frame(frames.PING, frames.ACK, 0, asked))
    assert client.until(frames.GOAWAY) == number(3) + number(frames.NO_ERROR)
    client.begin(5)
    client.data(5, prefixed(b"late"))
    assert client.answer(1).message == b"rested"
    assert client.answer(3).message == b"hello"
    assert client.read() is None
    assert 5 not in client.answers
    stopping.result(WAIT_S)


def test_an_old_connection_is_sent_away_and_then_ended():
    options = rpc.Options(max_connection_age_s=0.1, max_connection_age_grace_s=0.2)
    with serving(options=options) as (server, connect):
        client = connect()
        client.begin(1, "wait")
        client.data(1, prefixed(b""))
        assert client.until(frames.GOAWAY) == number(frames.LARGEST) + number(frames.NO_ERROR) + b"max_age"
        assert client.answer(1).status == 14
        assert client.goaway() == frames.NO_ERROR
        assert server.handlers.cancelled.wait(WAIT_S)


def test_a_silent_client_is_cut_off():
    with serving(options=rpc.Options(keepalive_time_s=0.2, keepalive_timeout_s=0.2)) as (server, connect):
        client = connect()
        client.begin(1, "wait")
        client.data(1, prefixed(b""))
        client.until(frames.PING)
        assert client.seen[-1][1] == 0
        assert client.read() is None
        assert server.handlers.cancelled.wait(WAIT_S)


@pytest.mark.parametrize("preface", [frames.PREFACE, b"", frames.PREFACE[:5]], ids=["whole", "none", "begun"])
def test_a_client_that_never_asks_is_cut_off(preface):
    with serving(options=rpc.Options(keepalive_time_s=0.2, keepalive_timeout_s=0.2)) as (_, connect):
        client = connect(preface=b"")
        if preface:
            client.send(preface)
        while client.read():
            pass
        assert client.seen[-1][0] == frames.PING


def test_a_client_that_answers_pings_is_not_cut_off():
    with serving(options=rpc.Options(keepalive_time_s=0.2, keepalive_timeout_s=0.2)) as (_, connect):
        client = connect()
        for _ in range(4):
            client.send(frame(frames.PING, frames.ACK, 0, client.until(frames.PING)))
        assert client.ask(1).message == b"hello"


def test_a_client_that_reads_nothing_is_read_no_more(served):
    """It asks and asks: its answers must not pile up in the server. Another is answered meanwhile."""
    server, connect = served
    client = connect({frames.INITIAL_WINDOW_SIZE: frames.LARGEST, frames.MAX_FRAME_SIZE: 1 << 20})
    client.send(frame(frames.WINDOW_UPDATE, 0, 0, number(frames.LARGEST - frames.DEFAULT_WINDOW)))
    client.sync()
    message = prefixed(bytes(200_000))
    calls = [
        frame(frames.HEADERS, WHOLE, stream, client.block()) + frame(frames.DATA, frames.END_STREAM, stream, message)
        for stream in range(1, 1001, 2)
    ]
    client.socket.settimeout(0.5)
    with pytest.raises(TimeoutError):
        client.send(*calls)
    (connection,) = server.rpc._connections
    assert connection._transport.get_write_buffer_size() < 8 << 20
    assert connect().ask(1).message == b"hello"


# Anything at all.


def conversation(client):
    """Frames that are right."""
    big = prefixed(bytes(3000))
    return [
        frames.settings({frames.INITIAL_WINDOW_SIZE: 500}),
        frame(frames.HEADERS, WHOLE, 1, client.block(who="me")),
        frame(frames.DATA, frames.END_STREAM, 1, prefixed(b"hello")),
        frame(frames.HEADERS, WHOLE, 3, client.block(who="me", grpc_timeout="5S")),
        frame(frames.DATA, 0, 3, big[:1000]),
        frame(frames.DATA, frames.PADDED | frames.END_STREAM, 3, b"\x05" + big[1000:] + bytes(5)),
        frame(frames.HEADERS, frames.END_STREAM, 5, client.block("double")[:4]),
        frame(frames.CONTINUATION, WHOLE, 5, b"\0\x01a\x01b"),
        frame(frames.HEADERS, WHOLE, 7, client.block("double", grpc_encoding="gzip")),
        frame(frames.DATA, 0, 7, packed(gzip.compress(b"hello")) + prefixed(b"a")),
        frame(frames.WINDOW_UPDATE, 0, 3, number(5000)),
        frame(frames.HEADERS, WHOLE, 9, client.block("count")),
        frame(frames.PING, 0, 0, bytes(8)),
        frame(frames.RST_STREAM, 0, 9, number(8)),
        frame(frames.HEADERS, WHOLE, 11, client.block("wait", a_bin="AAA", grpc_timeout="10m")),
        frame(frames.DATA, frames.END_STREAM, 11, prefixed(b"")),
        frame(frames.GOAWAY, 0, 0, number(0) + number(0)),
    ]


def mutated(choose, sent):
    """The frames of a conversation with a few changes."""
    for _ in range(choose.randrange(1, 4)):
        at = choose.randrange(len(sent))
        how = choose.randrange(6)
        one = bytearray(sent[at])
        if how == 0:
            one[choose.randrange(len(one))] = choose.randrange(256)
        elif how == 1:
            sent[at:at] = [choose.choice(sent)]
        elif how == 2:
            del sent[at]
            continue
        elif how == 3:
            one[choose.randrange(3, 9)] ^= 1 << choose.randrange(8)
        elif how == 4:
            one = one[: choose.randrange(len(one))]
        else:
            other = choose.randrange(len(sent))
            sent[at], sent[other] = sent[other], sent[at]
            continue
        if at < len(sent):
            sent[at] = bytes(one)
    return sent


def noise(choose):
    """A frame of any kind."""
    stream = choose.choice([0, 0, 1, 1, 3, 5, 7, 2, choose.getrandbits(32)])
    size = choose.choice([0, 1, 4, 4, 5, 6, 8, 8, choose.randrange(300)])
    return frame(choose.randrange(12), choose.getrandbits(8) & choose.getrandbits(8), stream, choose.randbytes(size))


@pytest.mark.parametrize("kind", ["mutated", "noise"])
def test_whatever_comes_the_server_goes_on(served, caplog, kind):
    """Some thousand frames over some hundred connections: no exception, nothing that is left."""
    server, connect = served
    caplog.set_level("WARNING")
    choose = random.Random(f"{kind} 1")
    for _ in range(400):
        client = connect()
        if kind == "mutated":
            sent = mutated(choose, conversation(client))
        else:
            sent = [frame(frames.HEADERS, WHOLE, 1, client.block("double")), *[noise(choose) for _ in range(20)]]
        with closing(client):
            try:
                client.send(*sent)
                if choose.random() < 0.5:
                    client.socket.shutdown(socket.SHUT_WR)
                    while client.socket.recv(1 << 16):
                        pass
            except ConnectionError:
                pass  # the server had seen enough
    assert connect().ask(1).message == b"hello"
    wait_until(lambda: len(server.rpc._connections) == 1 and not server.rpc._tasks)
    assert "Traceback" not in caplog.text
    assert [record.getMessage() for record in caplog.records] == []


def test_a_client_that_does_not_say_it_heard_does_not_hold_a_server():
    """Its PING's ACK tells that all it sent is here. One that has calls is waited for all the same."""
    with serving() as (server, connect):
        silent, busy = connect(), connect()
        silent.sync()
        busy.begin(1, "nap")
        busy.data(1, prefixed(b""))
        assert server.handlers.started.wait(WAIT_S)
        server.run(server.rpc.stop(60))  # in `WAIT_S`, which is less
        assert silent.until(frames.GOAWAY)[:4] == number(frames.LARGEST)
        assert silent.goaway() == frames.NO_ERROR
        assert busy.answer(1).message == b"rested"


def test_requests_that_are_not_finished_may_take_so_much_memory_and_no_more():
    """Of a connection: a call that goes over it is ended, and what others give back may be used again."""
    most = 1 << 16
    with serving(options=rpc.Options(max_message_bytes=most, max_held_bytes=4 * most)) as (_, connect):
        client = connect({frames.INITIAL_WINDOW_SIZE: 2 * most})
        client.send(frame(frames.WINDOW_UPDATE, 0, 0, number(2 * most)))
        part = prefixed(bytes(most))[: most // 2]
        for stream in range(1, 17, 2):  # eight halves: just what four messages are
            client.begin(stream, "double" if stream % 4 == 1 else "echo")
            client.data(stream, part, flags=0)
        client.sync()
        assert not any(answer.ended for answer in client.answers.values())
        client.begin(17)
        client.data(17, part, flags=0)
        assert client.answer(17).status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        for stream in (1, 3, 5):
            client.send(frame(frames.RST_STREAM, 0, stream, number(frames.CANCEL)))
        client.begin(19)
        client.data(19, part, flags=0)
        client.data(19, prefixed(bytes(most))[most // 2 :])
        assert client.answer(19).message == bytes(most)
        assert not any(client.answers[stream].ended for stream in range(7, 17, 2) if stream in client.answers)


def test_a_client_that_reads_slowly_is_no_silent_one():
    """Its answers fill the socket, so it is not read and nothing of it is heard, its PING's ACK least of all."""
    options = rpc.Options(keepalive_time_s=0.3, keepalive_timeout_s=0.3)
    with serving(options=options) as (_, connect):
        client = connect(settings={frames.INITIAL_WINDOW_SIZE: frames.LARGEST})
        client.send(frame(frames.WINDOW_UPDATE, 0, 0, number(frames.LARGEST - frames.DEFAULT_WINDOW)))
        client.begin(1, "large", flags=LAST)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            assert client.socket.recv(1 << 20), "the server has hung up"
            time.sleep(0.02)


def test_a_call_of_which_nothing_comes_but_headers_ends_at_its_deadline(client):
    client.begin(1, grpc_timeout="100m")
    assert client.answer(1).status == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert client.ask(3).message == b"hello"


def test_answers_that_a_client_never_takes_are_forgotten_at_the_deadline(served):
    server, connect = served
    client = connect({frames.INITIAL_WINDOW_SIZE: 10})
    client.begin(1, grpc_timeout="1S")
    client.data(1, prefixed(bytes(1000)))
    assert client.answer(1).reset == frames.CANCEL
    (connection,) = server.rpc._connections
    assert not connection.calls


def test_answers_without_a_handler_are_forgotten_at_the_deadline_too():
    def begin(data, call):
        call.end(data)
        return True

    with serving(direct=rpc.Direct({ECHO}, begin)) as (server, connect):
        client = connect({frames.INITIAL_WINDOW_SIZE: 10})
        client.begin(1, grpc_timeout="200m")
        client.data(1, prefixed(bytes(1000)))
        client.socket.settimeout(2)
        assert client.answer(1).reset == frames.CANCEL
        (connection,) = server.rpc._connections
        assert not connection.calls


def test_a_call_that_has_ended_has_no_deadline_any_more(served):
    """Nor is it kept until then, which may be in years."""
    _, connect = served
    client = connect()
    client.begin(1, _path="/nobody/knows", grpc_timeout="200m")
    assert client.answer(1).status == grpc.StatusCode.UNIMPLEMENTED.value[0]
    client.begin(3, grpc_timeout="200m")
    client.send(frame(frames.RST_STREAM, 0, 3, number(frames.CANCEL)))  # which may come with it
    time.sleep(0.4)
    client.sync()
    resets = [(stream, payload) for kind, _, stream, payload in client.seen if kind == frames.RST_STREAM]
    assert resets == [(1, number(frames.NO_ERROR))]


def test_many_small_pieces_take_no_more_memory_than_one(served):
    server, connect = served
    client = connect()
    client.begin(1)
    data = prefixed(bytes(20_000))
    client.send(*(frame(frames.DATA, 0, 1, data[at : at + 2]) for at in range(0, 20_000, 2)))
    client.sync()
    (connection,) = server.rpc._connections
    assert connection._held == 20_000
    assert sum(map(sys.getsizeof, connection.calls[1]._parts)) < 21_000
    client.data(1, data[20_000:])
    assert client.answer(1).message == bytes(20_000)


def test_what_a_forgotten_call_held_is_given_back_once(served):
    """Whoever reads its requests may have been woken just before."""
    server, connect = served
    client = connect()
    client.begin(1, "unread")
    client.data(1, prefixed(bytes(1000)), flags=0)
    client.sync()
    (connection,) = server.rpc._connections
    call = connection.calls[1]
    assert connection._held == 1005
    client.send(frame(frames.RST_STREAM, 0, 1, number(frames.CANCEL)))
    client.sync()
    server.run(anext(call._requests))
    assert connection._held == 0


def test_an_answer_over_the_limit_is_not_sent():
    with serving(options=rpc.Options(max_answer_bytes=1000)) as (_, connect):
        client = connect()
        assert client.ask(1, bytes(1000)).message == bytes(1000)
        for stream, method in ((3, "echo"), (5, "double")):
            answer = client.ask(stream, bytes(1001), method)
            assert answer.status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert b"at most 1000" in answer.text
            assert answer.data == b""


def test_what_cannot_be_unpacked_is_no_error_of_ours(client, caplog):
    client.begin(1, "double", grpc_encoding="gzip")
    client.data(1, b"\x01" + number(4) + b"junk", flags=0)
    assert client.answer(1).status == grpc.StatusCode.INTERNAL.value[0]
    assert client.ask(3).message == b"hello"
    assert not caplog.records


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, new_loop], ids=["asyncio", "uvloop"])
def test_a_client_that_still_takes_its_answer_gets_all_of_it_before_the_server_has_gone(loop):
    """It says what it has taken, as gRPC's clients do: to a closed socket, which would take the rest back."""
    with serving(loop=loop) as (server, connect):
        client = connect({frames.INITIAL_WINDOW_SIZE: frames.LARGEST})
        client.send(frame(frames.WINDOW_UPDATE, 0, 0, number(1 << 24)))
        client.begin(1, "swell")
        client.data(1, prefixed(b""))
        assert server.handlers.started.wait(WAIT_S)
        stopping = asyncio.run_coroutine_threadsafe(server.rpc.stop(WAIT_S), server.loop)
        answer = client.answers.setdefault(1, Answer())
        while not answer.ended:
            kind, flags, _, payload = client.read()
            if kind == frames.PING and not flags & frames.ACK:
                client.send(frame(frames.PING, frames.ACK, 0, payload))
            elif kind == frames.DATA:
                client.send(frame(frames.WINDOW_UPDATE, 0, 0, number(len(payload))))
                time.sleep(0.0005)  # 32 MB a second
        assert len(answer.message) == 3_000_000
        assert client.read() is None
        client.close()
        stopping.result(WAIT_S)


def test_who_connects_while_the_server_stops_is_sent_away():
    """Its handshake may have begun before."""
    with serving() as (server, connect):
        busy = connect()
        busy.begin(1, "nap")
        busy.data(1, prefixed(b""))
        assert server.handlers.started.wait(WAIT_S)
        server.rpc.stopping = True  # and the port is still open
        late = connect(preface=b"")
        assert late.goaway() == frames.NO_ERROR
        assert busy.answer(1).message == b"rested"


def test_a_client_that_takes_nothing_does_not_hold_a_server_in_a_hurry():
    with serving() as (server, connect):
        client = connect({frames.INITIAL_WINDOW_SIZE: frames.LARGEST})
        client.send(frame(frames.WINDOW_UPDATE, 0, 0, number(frames.LARGEST - frames.DEFAULT_WINDOW)))
        client.begin(1, "large", flags=LAST)
        client.until(frames.DATA)
        (connection,) = server.rpc._connections
        wait_until(lambda: connection._transport.get_write_buffer_size())  # the sockets are full
        waiting = asyncio.run_coroutine_threadsafe(server.rpc.stop(600), server.loop)
        server.run(server.rpc.stop(None))
        waiting.result(WAIT_S)
