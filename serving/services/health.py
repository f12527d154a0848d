"""`grpc.health.v1.Health`: which services and models are ready, asked once or watched.

grpcio-health-checking's servicer for asyncio forgets everyone who watches a service when one of them leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from grpc_health.v1 import health_pb2 as pb

from serving.errors import InvalidArgument, NotFound, Unavailable
from serving.services import Context
from serving.services.gate import STOPPING

Status = pb.HealthCheckResponse


class HealthService:
    """The servicer. `set`, `stop` and `close` are called on the event loop."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {"": False}
        self._stopping = False
        self._closed = False
        self._changed = asyncio.Event()  # another one after each change

    def set(self, service: str, serving: bool) -> None:
        """What to answer for a service or model from now on."""
        self._serving[service] = serving
        self._tell()

    def stop(self) -> None:
        """Answer NOT_SERVING for all of them, whatever `set` says later."""
        self._stopping = True
        self._tell()

    def close(self) -> None:
        """End the streams of those who watch."""
        self._closed = True
        self._tell()

    async def Check(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        """The status of a service, of a model by its name, or of all together by an empty one."""
        if request.service not in self._serving:
            raise NotFound(f"no service or model '{request.service}'")
        return Status(status=self._status(request.service))

    async def Watch(
        self, requests: AsyncIterator[pb.HealthCheckRequest], context: Context
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        """The status now and after each change."""
        request = await anext(requests, None)
        if request is None:
            raise InvalidArgument("got no request, want one HealthCheckRequest")
        told: int | None = None
        while not self._closed:
            changed = self._changed
            if (status := self._status(request.service)) != told:
                yield Status(status=status)
                told = status
            await changed.wait()
        raise Unavailable(STOPPING)

    def _status(self, service: str) -> int:
        if service not in self._serving:
            return int(Status.SERVICE_UNKNOWN)
        return int(Status.SERVING if self._serving[service] and not self._stopping else Status.NOT_SERVING)

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
