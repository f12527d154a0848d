"""What is refused before the event loop hears of it, while more is asked than the server can answer.

To tell the loop of a call costs several times what it costs to refuse it, and would leave no time for the requests that
were accepted. So this is asked on gRPC's thread.
"""

from __future__ import annotations

import time

from serving import logs
from serving.catalog import Catalog
from serving.errors import STATUS, QueueFull
from serving.rpc import Refusal
from serving.services.gate import Gate
from serving.services.statuses import trailing_metadata
from serving.statistics import Rpcs

_LEAST_BEHIND = 64  # events that may wait for the loop, however short the queue is
_BEHIND_S = 0.1  # when to try again, where more do
_CODE = STATUS[QueueFull]


class Overload:
    """Judges calls that need room in a model's queue."""

    def __init__(self, catalog: Catalog, rpcs: Rpcs, gate: Gate, max_queue: int, watched: object) -> None:
        """Everything has room yet.

        Args:
            catalog: knows whether the queue of the only model is full.
            rpcs: where refused calls are counted.
            gate: once it is closed, it says what becomes of calls.
            max_queue: requests that may wait for a model, and events that may wait for the loop.
            watched: something that must see every call while the loop can keep up.
        """
        self._catalog = catalog
        self._rpcs = rpcs
        self._gate = gate
        self._most_behind = max(max_queue, _LEAST_BEHIND)
        self._watched = bool(watched)
        behind = QueueFull("more calls wait than the server can come to (--max-queue); try again", _BEHIND_S)
        self._behind = _refusal(behind)
        self._full = (str(behind), behind.retry_s, self._behind)  # the last one's text and time, and what it came to

    def refuse(self, method: str, events: int, calls: int) -> Refusal | None:
        """How a call ends at once, where it must, which is then counted. On gRPC's thread.

        Args:
            method: `/service/method`.
            events: that wait for the loop.
            calls: of them; they will need room in the queue.
        """
        if events >= self._most_behind:
            return self._counted(method, self._behind)
        if self._watched or self._gate.closed:
            return None
        start_ns = time.monotonic_ns()
        if (found := self._catalog.refusal(calls)) is None:
            return None
        served, error = found
        served.statistics.dropped("queue_full")
        served.statistics.failed(start_ns)
        text, retry_s, refusal = self._full
        if text != str(error) or retry_s != error.retry_s:
            refusal = _refusal(error)
            self._full = (refusal.details, error.retry_s, refusal)
        return self._counted(method, refusal)

    def _counted(self, method: str, refusal: Refusal) -> Refusal:
        self._rpcs.call_ended(method[1:], _CODE.name)
        logs.refused(_CODE.name, refusal.details, lambda: logs.about(method, "", ()))
        return refusal


def _refusal(error: QueueFull) -> Refusal:
    details = str(error)
    return Refusal(_CODE, details, trailing_metadata(_CODE, details, error))
