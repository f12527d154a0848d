"""ModelInfer calls that are answered without a task, which would cost a small request more than all else but its model.

The connection that reads a prepared request puts it to its model at once, and what the model's thread has computed is
sent as soon as the event loop hears of it: of a whole batch at a time. What is not prepared, or must be seen by
somebody else, goes the way of all other calls.
"""

from __future__ import annotations

import functools

import grpc

from protos import open_inference as pb
from serving import logs, rpc
from serving.request_queue import Withdrawn
from serving.scheduler import Request
from serving.services.gate import Gate
from serving.services.prepared import PreparedRequests, Running
from serving.services.statuses import to_status, trailing_metadata
from serving.statistics import Rpcs

METHOD = f"{pb.SERVICE}/ModelInfer"


def direct(prepared: PreparedRequests, rpcs: Rpcs, gate: Gate, max_message_bytes: int) -> rpc.Direct:
    """What sees to the calls that are prepared, and leaves the others to their handlers."""

    def begin(data: bytes, call: rpc.Call) -> bool:
        if gate.closed or len(data) > max_message_bytes:
            return False
        try:
            waiting = prepared.submit(data, call.deadline_ns, functools.partial(_Waiting, call, rpcs))
        except Exception as error:
            _fail(call, rpcs, error)
            return True
        return waiting is not None

    return rpc.Direct({f"/{METHOD}"}, begin)


class _Waiting:
    """A call whose request waits or runs."""

    __slots__ = ("_call", "_rpcs", "_running", "gone")

    def __init__(self, call: rpc.Call, rpcs: Rpcs, running: Running) -> None:
        self._call = call
        self._rpcs = rpcs
        self._running = running
        self.gone = call.cancelled

    def answered(self, request: Request) -> None:
        """Send the answer, or the error; on the event loop."""
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


def _fail(call: rpc.Call, rpcs: Rpcs, error: Exception) -> None:
    """End a call that is not answered, as `serving.services` ends all others."""
    if isinstance(error, Withdrawn):
        rpcs.call_ended(METHOD, "CANCELLED")
        call.fail(grpc.StatusCode.CANCELLED, "")
        return

    def about() -> logs.Fields:
        return logs.about(METHOD, call.peer(), call.invocation_metadata())

    code, details = to_status(error, about)
    rpcs.call_ended(METHOD, code.name)
    call.fail(code, details, trailing_metadata(code, details, error))
