"""Header blocks: those of the calls that are made, and the status in those that end a call.

Header compression: RFC 7541. Calls: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import unquote

import grpc
import hpack

NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class Status(NamedTuple):
    """How a call ended."""

    name: str  # gRPC's, or one for what gRPC has none for
    message: str = ""


OK = Status("OK")
CONNECTION_LOST = Status("CONNECTION_LOST", "the connection ended while the call was under way")
UNPROCESSED = Status(
    "UNPROCESSED", "the server refused the stream, or closed the connection, without a look at the call"
)
_MOST_CACHED = 10_000
_statuses: dict[bytes, Status] = {}  # by the header block that ends a call


def status_of(block: bytes) -> Status:
    """The status in a header block that ends a call; one without `grpc-status` is UNKNOWN, as gRPC has it."""
    status = _statuses.get(block)
    if status is None:
        headers = {bytes(name): bytes(value) for name, value in hpack.Decoder().decode(block, raw=True)}
        code = int(headers.get(b"grpc-status", b"2"))
        text = unquote(headers.get(b"grpc-message", b"").decode())
        status = OK if code == 0 else Status(NAMES.get(code, f"STATUS_{code}"), text)
        if len(_statuses) < _MOST_CACHED:
            _statuses[block] = status
    return status


def call_blocks(
    authority: str, path: str, metadata: Iterable[tuple[str, str]], table_bytes: int
) -> tuple[bytes, bytes]:
    """The header block of a connection's first call, and that of every later one.

    As gRPC's clients have it: the first fills the server's table of headers, the later ones are indices into it.

    Args:
        authority: the server, host:port.
        path: of the method, `/package.Service/Method`.
        metadata: sent with every call.
        table_bytes: the size of the server's table; where it does not hold the headers, every call has them in full.
    """
    pairs = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", authority),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("user-agent", "parityserve-load"),
        *metadata,
    ]
    headers = [(name.encode(), value.encode()) for name, value in pairs]
    fits = sum(len(name) + len(value) + 32 for name, value in headers) <= table_bytes
    prefix = b"\x40" if fits else b"\x00"  # a literal that goes into the table, or not
    first = b"".join(prefix + _text(name) + _text(value) for name, value in headers)
    if not fits:
        return first, first
    return first, bytes(0x80 | 61 + len(headers) - place for place in range(len(headers)))


def _text(text: bytes) -> bytes:
    """A string of a header, not Huffman-coded."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest, length = len(text) - 127, b"\x7f"
    while rest > 127:
        length += bytes([rest & 127 | 128])
        rest >>= 7
    return length + bytes([rest]) + text
