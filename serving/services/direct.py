"""ModelInfer calls that are answered without the event loop, which would cost a small request more than its model does.

gRPC's thread puts a prepared request to its model, and the model's thread sends the answer: between the two there is
one hand-over. What is not prepared, or must be seen by somebody else, goes the way of all other calls.
"""

from __future__ import annotations

import functools

import grpc

from protos import open_inference as pb
from serving import logs
from serving.request_queue import Withdrawn
from serving.rpc import Call
from serving.scheduler import Request
from serving.services import deadline
from serving.services.gate import Gate
from serving.services.prepared import PreparedRequests, Running
from serving.services.statuses import to_status, trailing_metadata
from serving.statistics import Rpcs

METHOD = f"{pb.SERVICE}/ModelInfer"


class Direct:
    """Answers what it can on the threads of gRPC and of the model."""

    def __init__(self, prepared: PreparedRequests, rpcs: Rpcs, gate: Gate, max_message_bytes: int) -> None:
        self._prepared = prepared
        self._rpcs = rpcs
        self._gate = gate
        self._max_bytes = max_message_bytes

    def begin(self, data: bytes, call: Call) -> bool:
        """Whether a call will be answered; else somebody else must. On gRPC's thread.

        Args:
            data: its request.
            call: of any method that takes one request.
        """
        if call.details.method[1:] != METHOD or self._gate.closed or len(data) > self._max_bytes:
            return False
        try:
            waiting = self._prepared.submit(data, deadline(call), functools.partial(_Waiting, call, self._rpcs))
        except Exception as error:
            _fail(call, self._rpcs, error)
            return True
        return waiting is not None


class _Waiting:
    """A call whose request waits or runs."""

    __slots__ = ("_call", "_rpcs", "_running", "gone")

    def __init__(self, call: Call, rpcs: Rpcs, running: Running) -> None:
        self._call = call
        self._rpcs = rpcs
        self._running = running
        self.gone = call.cancelled

    def answered(self, request: Request) -> None:
        """Send the answer, or the error."""
        call, error = self._call, request.error
        if error is None and call.cancelled():
            error = Withdrawn()
        if error is None:
            try:
                message = self._running.message(request)
            except Exception as raised:
                error = raised
            else:
                self._rpcs.call_ended(METHOD, "OK")
                call.end(message)
                return
        self._running.failed()
        _fail(call, self._rpcs, error)


def _fail(call: Call, rpcs: Rpcs, error: Exception) -> None:
    """End a call that is not answered, as `serving.services` ends all others."""
    if isinstance(error, Withdrawn):
        rpcs.call_ended(METHOD, "CANCELLED")
        call.fail(grpc.StatusCode.CANCELLED, "", ())
        return

    def about() -> logs.Fields:
        return logs.about(METHOD, call.peer(), call.invocation_metadata())

    code, details = to_status(error, about)
    rpcs.call_ended(METHOD, code.name)
    call.fail(code, details, trailing_metadata(code, details, error))
