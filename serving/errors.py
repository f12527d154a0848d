"""Every error raised on purpose, and the one table from error to gRPC status.

    ParityserveError
    ├── RequestError            a request that cannot be answered; crosses the wire with its status
    │   ├── InvalidArgument     INVALID_ARGUMENT    malformed, wrong shape, datatype or byte count, not a picture
    │   ├── Unauthenticated     UNAUTHENTICATED     no token, or a wrong one
    │   ├── NotFound            NOT_FOUND           unknown model or version
    │   ├── Unavailable         UNAVAILABLE         version loading or failed; server draining or unreachable
    │   ├── QueueFull           RESOURCE_EXHAUSTED  more requests wait than the queue may hold
    │   ├── MessageTooLarge     RESOURCE_EXHAUSTED  a message over the server's limit
    │   ├── DeadlineExceeded    DEADLINE_EXCEEDED   the caller's deadline passed before the model ran
    │   └── Unimplemented       UNIMPLEMENTED       a part of a protocol that this server does not offer
    ├── BundleError             a version on disk that may not be served
    │   └── GoldenMismatch      its answers are not the trained model's
    ├── DeviceError             the device asked for cannot be used here
    └── StartupError            the server cannot start

The client raises the same RequestErrors that the server does.
"""

from __future__ import annotations

import grpc


class ParityserveError(Exception):
    """The root of every error raised on purpose; its text is meant for people."""


class RequestError(ParityserveError):
    """A request that cannot be answered."""


class InvalidArgument(RequestError):
    """The request is wrong and will be wrong again if repeated."""


class Unauthenticated(RequestError):
    """The caller showed no token, or one that is not accepted."""


class NotFound(RequestError):
    """No such model or version in the repository."""


class Unavailable(RequestError):
    """Not now; the same request may succeed later."""


class QueueFull(RequestError):
    """The server has more waiting requests than it accepts; `retry_s` tells when it may have room again, seconds."""

    def __init__(self, message: str, retry_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class MessageTooLarge(RequestError):
    """A message over the server's limit. A client reads the status as QueueFull, which has the same."""


class DeadlineExceeded(RequestError):
    """The caller's deadline passed before the model ran."""


class Unimplemented(RequestError):
    """A part of a protocol that this server does not offer."""


class BundleError(ParityserveError):
    """A version on disk that is damaged, incomplete or not what its manifest says."""


class GoldenMismatch(BundleError):
    """A version whose answers differ from those that the trained model gave."""


class DeviceError(ParityserveError):
    """The device asked for cannot be used; the text says why and what to do."""


class StartupError(ParityserveError):
    """The server cannot start; the text says why and what to do."""


def cannot_listen(address: str) -> StartupError:
    """What to raise when `address`, host:port, cannot be listened on."""
    return StartupError(
        f"cannot listen on {address}: in use, or not this machine's address; choose another with --port or --host"
    )


def in_words(error: Exception) -> str:
    """An error's text; of one with a file, which file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


STATUS: dict[type[RequestError], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    MessageTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
}


def from_status(code: grpc.StatusCode, details: str) -> ParityserveError:
    """The error of ours that a status received from a server stands for."""
    for kind, status in STATUS.items():
        if status is code:
            return kind(details)
    return ParityserveError(f"{code.name}: {details}")
