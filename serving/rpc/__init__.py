"""A gRPC server for asyncio that costs less than half of what `grpc.aio` does for each call.

`grpc.aio` runs several tasks for a call, and wakes the event loop for each of the core's events. This server takes
them from the core's completion queue on a thread of its own, the pump, which does what needs no decision; the loop is
told once for all that came meanwhile. It has what this project's services need of `grpc.aio.Server` and no more, under
the same names. One more thing differs: a batch of operations that fails gives its memory back
(https://github.com/grpc/grpc/issues/43360).

`grpc._cython.cygrpc` is not public. It is what both of grpcio's own servers are written in, `grpc._server` alike to
this one; nothing outside this package knows of it, and the versions of grpcio that are tested are named in
pyproject.toml.
"""

from serving.rpc.call import Aborted, Call, CallDetails, Direct, Handler
from serving.rpc.server import Find, Limit, Refusal, Server

__all__ = ["Aborted", "Call", "CallDetails", "Direct", "Find", "Handler", "Limit", "Refusal", "Server"]
