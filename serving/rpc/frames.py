"""HTTP/2's frames and numbers, as RFC 9113 has them: https://www.rfc-editor.org/rfc/rfc9113."""

from __future__ import annotations

import struct
from collections.abc import Mapping

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# Kinds of frames.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)

# Flags.
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITISED = 0x20

# Settings.
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)

# Error codes.
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 3
FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = 6, 7, 8, 9
ENHANCE_YOUR_CALM, INADEQUATE_SECURITY = 11, 12

DEFAULT_WINDOW = 65_535
DEFAULT_MAX_FRAME = 16_384
LARGEST_FRAME = (1 << 24) - 1
LARGEST = (1 << 31) - 1  # of windows and of streams' numbers

HEAD = struct.Struct(">HBBBI")  # length (in two parts), kind, flags, stream
HEAD_BYTES = HEAD.size
_SETTING = struct.Struct(">HI")


class Fault(Exception):
    """The peer has broken the protocol: the connection ends with this error code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def head(kind: int, flags: int, length: int) -> bytes:
    """The first five bytes of a frame; those of the stream's number follow."""
    return length.to_bytes(3, "big") + bytes((kind, flags))


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame."""
    return head(kind, flags, len(payload)) + stream.to_bytes(4, "big") + payload


def number(value: int) -> bytes:
    """What WINDOW_UPDATE and RST_STREAM have as their payload."""
    return value.to_bytes(4, "big")


def settings(values: Mapping[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(name, value) for name, value in values.items()))


def read_settings(payload: bytes) -> list[tuple[int, int]]:
    """Names and values, in order.

    Raises:
        Fault: a value that may not be.
    """
    if len(payload) % _SETTING.size:
        raise Fault(FRAME_SIZE_ERROR, f"SETTINGS of {len(payload)} bytes")
    values = list(_SETTING.iter_unpack(payload))
    for name, value in values:
        if name == ENABLE_PUSH and value > 1:
            raise Fault(PROTOCOL_ERROR, f"push set to {value}")
        if name == INITIAL_WINDOW_SIZE and value > LARGEST:
            raise Fault(FLOW_CONTROL_ERROR, f"an initial window of {value} bytes")
        if name == MAX_FRAME_SIZE and not DEFAULT_MAX_FRAME <= value <= LARGEST_FRAME:
            raise Fault(PROTOCOL_ERROR, f"frames of at most {value} bytes")
    return values


def unpadded(flags: int, payload: bytes) -> bytes:
    """The content of a frame that may have padding.

    Raises:
        Fault: it has more than there is room for.
    """
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise Fault(PROTOCOL_ERROR, "more padding than frame")
    return payload[1 : len(payload) - payload[0]]
