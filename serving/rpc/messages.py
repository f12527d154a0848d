"""Messages as gRPC frames them: a byte that tells whether it is compressed, its length, and the message."""

from __future__ import annotations

import zlib

import grpc

PREFIX_BYTES = 5

_WBITS = {"gzip": 31, "deflate": zlib.MAX_WBITS}


class Unreadable(Exception):
    """A message that cannot be taken in; ends its call with `code`."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


def prefix(length: int) -> bytes:
    """What stands before a message of so many bytes, which is not compressed."""
    return b"\0" + length.to_bytes(4, "big")


def prefixed(message: bytes) -> bytes:
    """A message with its prefix."""
    return prefix(len(message)) + message


def size(data: bytes, most: int) -> int:
    """Bytes of the first message in `data` with its prefix, which must be there.

    Raises:
        Unreadable: it has more than `most`.
    """
    length = int.from_bytes(data[1:PREFIX_BYTES], "big")
    if length > most:
        raise _too_large(length, most)
    return PREFIX_BYTES + length


def content(data: bytes, encoding: str, most: int) -> bytes:
    """The message in `data`, which is one with its prefix and no more.

    Raises:
        Unreadable: it is compressed in a way that is not known, damaged, or of more than `most` bytes.
    """
    if data[0] == 0:
        return data[PREFIX_BYTES:]
    if encoding not in _WBITS:
        problem = f"got a message that is compressed with '{encoding}', want {', '.join(_WBITS)} or none"
        raise Unreadable(grpc.StatusCode.UNIMPLEMENTED, problem)
    unpacker = zlib.decompressobj(_WBITS[encoding])
    try:
        message = unpacker.decompress(memoryview(data)[PREFIX_BYTES:], most + 1)
    except zlib.error as error:
        raise Unreadable(grpc.StatusCode.INTERNAL, f"a message that is no {encoding}: {error}") from error
    if len(message) > most:
        raise _too_large(len(message), most)
    if not unpacker.eof:
        raise Unreadable(grpc.StatusCode.INTERNAL, f"a message whose {encoding} ends too early")
    return message


def _too_large(length: int, most: int) -> Unreadable:
    text = f"got a message of {length} bytes or more, of which at most {most} are taken in"
    return Unreadable(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
