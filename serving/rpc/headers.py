"""Header blocks of gRPC: what a call's says, and what is sent before and after its answers.

https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md, and HPACK: https://www.rfc-editor.org/rfc/rfc7541.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from urllib.parse import quote

import grpc
import hpack

from serving.rpc.frames import COMPRESSION_ERROR, ENHANCE_YOUR_CALM, Fault

Metadata = Sequence[tuple[str, str | bytes]]
Fields = Iterable[tuple[bytes, bytes]]

MAX_BYTES = 16_384  # of a call's headers, as gRPC's own servers take by default: names, values and 32 for each

_MOST_KNOWN = 256  # blocks that are remembered on a connection
_LONGEST_KNOWN = 32  # bytes of those, each of which may name a field
_OWN = frozenset({"te", "content-type", "grpc-timeout", "grpc-encoding", "grpc-accept-encoding", "grpc-message-type"})
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_UNESCAPED = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


class CallDetails(grpc.HandlerCallDetails):
    """Which method is called, and with which metadata."""

    def __init__(self, method: str, invocation_metadata: Metadata) -> None:
        self.method = method
        self.invocation_metadata = tuple(invocation_metadata)


class Head(NamedTuple):
    """What a call's headers say."""

    details: CallDetails
    timeout_s: float | None
    encoding: str  # of the messages that are compressed
    refusal: bytes | None  # the header block that answers what is no call


class Reader:
    """Reads one connection's header blocks, which depend on each other."""

    def __init__(self) -> None:
        self._decoder = hpack.Decoder(MAX_BYTES)
        self._known: dict[bytes, Head] = {}

    def read(self, block: bytes) -> Head:
        """What a block says.

        Raises:
            Fault: it cannot be read.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        try:
            fields = self._decoder.decode(block, raw=True)
        except hpack.OversizedHeaderListError as error:
            raise Fault(ENHANCE_YOUR_CALM, f"headers of more than {MAX_BYTES} bytes") from error
        except hpack.HPACKError as error:
            raise Fault(COMPRESSION_ERROR, str(error)) from error
        read = read_head(fields)
        # A block that does nothing but name entries of the table says the same again while the table stays as it is:
        # its bytes all have the highest bit. Any other may have changed the table.
        if min(block, default=0) < 0x80 or len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        elif len(block) <= _LONGEST_KNOWN:
            self._known[block] = read
        return read


def read_head(fields: Fields) -> Head:
    """The head that header fields make."""
    own: dict[bytes, bytes] = {}
    metadata: list[tuple[str, str | bytes]] = []
    refusal = None
    for name, value in fields:
        key = name.decode("latin-1")
        if key.startswith(":") or key in _OWN:
            own[name] = value
        elif not key.endswith("-bin"):
            metadata.append((key, value.decode("latin-1")))
        else:
            try:
                metadata += [(key, _binary(part)) for part in value.split(b",")]
            except binascii.Error:
                refusal = trailers_only(13, f"metadata {key} is not in base64", ())  # INTERNAL
    timeout_s = None
    if b"grpc-timeout" in own:
        if match := _TIMEOUT.fullmatch(own[b"grpc-timeout"]):
            timeout_s = int(match[1]) * _UNITS_S[match[2]]
        else:
            refusal = trailers_only(13, "malformed grpc-timeout", ())
    if not own.get(b"content-type", b"").startswith(b"application/grpc"):
        refusal = _status(415)
    if own.get(b":method") != b"POST":
        refusal = _status(405)
    if not own.get(b":path", b"").startswith(b"/"):
        refusal = _status(400)
    return Head(
        CallDetails(own.get(b":path", b"").decode("latin-1"), metadata),
        timeout_s,
        own.get(b"grpc-encoding", b"identity").decode("latin-1"),
        refusal,
    )


def _binary(value: bytes) -> bytes:
    """Base64, whose padding clients leave out."""
    value = value.strip()
    return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)


@functools.lru_cache(256)
def trailers(code: int, details: str, metadata: Metadata) -> bytes:
    """The block that ends a call which has had an answer, or none for good."""
    fields = [(b"grpc-status", b"%d" % code)]
    if details:
        fields.append((b"grpc-message", quote(details, _UNESCAPED, errors="replace").encode()))
    for key, value in metadata:
        data = value.encode("utf-8") if isinstance(value, str) else value
        if key.endswith("-bin"):
            data = base64.b64encode(data).rstrip(b"=")
        fields.append((key.encode("ascii"), data))
    return b"".join(_literal(*field) for field in fields)


@functools.lru_cache(256)
def trailers_only(code: int, details: str, metadata: Metadata) -> bytes:
    """The block that is all that a call gets."""
    return _STATUS_200 + _CONTENT_TYPE + trailers(code, details, metadata)


def _literal(name: bytes, value: bytes) -> bytes:
    """A field that no table keeps, and as it is: so blocks do not depend on each other, and cost a client little."""
    return b"\0" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    """HPACK's integer with a prefix of seven bits, the eighth being 0: no Huffman code."""
    rest = len(text)
    if rest < 127:
        return bytes((rest,))
    octets = bytearray((127,))
    rest -= 127
    while rest >= 128:
        octets.append(rest & 127 | 128)
        rest >>= 7
    octets.append(rest)
    return bytes(octets)


def _status(code: int) -> bytes:
    """The answer to what is no call of gRPC's."""
    return b"\x08\x03%d" % code  # :status, of which the table has the name


_STATUS_200 = b"\x88"  # an entry of the table that never changes
_CONTENT_TYPE = _literal(b"content-type", b"application/grpc")
RESPONSE = _STATUS_200 + _CONTENT_TYPE + _literal(b"grpc-accept-encoding", b"identity,deflate,gzip")
TRAILERS_OK = trailers(0, "", ())
