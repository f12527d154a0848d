"""What a client is told when its request fails: the status of an error, and when to try again."""

from __future__ import annotations

import logging
from collections.abc import Callable

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from serving import logs
from serving.errors import STATUS, QueueFull, RequestError

logger = logging.getLogger(__name__)

# Where grpc_status.rpc_status, in every language, looks for what a status has to tell.
GRPC_DETAILS_METADATA_KEY = "grpc-status-details-bin"


def to_status(error: Exception, about: Callable[[], logs.Fields]) -> tuple[grpc.StatusCode, str]:
    """The status and text that a client gets for `error`; the log gets it with `about()`, what the request was.

    Anything unexpected becomes INTERNAL without its text, which might tell secrets, and a traceback in the log.
    """
    if isinstance(error, RequestError):
        code = next(code for kind, code in STATUS.items() if isinstance(error, kind))
        logs.refused(code.name, str(error), about)
        return code, str(error)
    logger.error("unexpected error while answering a request", exc_info=error, extra={"fields": about()})
    return grpc.StatusCode.INTERNAL, "internal error"


def trailing_metadata(code: grpc.StatusCode, details: str, error: Exception) -> tuple[tuple[str, bytes], ...]:
    """What tells a client when to try again, where it may: google.rpc.RetryInfo, which clients know."""
    if not isinstance(error, QueueFull):
        return ()
    delay = Duration()
    delay.FromNanoseconds(round(1e9 * error.retry_s))
    status = status_pb2.Status(code=code.value[0], message=details)
    status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return ((GRPC_DETAILS_METADATA_KEY, status.SerializeToString()),)
