"""What is refused before the event loop hears of it, while more is asked than the server can answer.

To tell the loop of a call costs several times what it costs to refuse it, and would leave no time for the requests that
were accepted. So this is asked on gRPC's thread; what it needs to know, the loop has found out.
"""

from __future__ import annotations

import functools
import time

from serving import logs
from serving.catalog import Catalog
from serving.errors import STATUS, QueueFull
from serving.rpc import Refusal
from serving.services.gate import Gate
from serving.services.statuses import trailing_metadata
from serving.statistics import Rpcs, Statistics

_LEAST_BEHIND = 64  # events that may wait for the loop, however short the queue is
_BEHIND_S = 0.1  # when to try again, where more do
_LOOK_NS = 10_000_000  # the loop is told of one call in so long all the same
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
        self._behind = self._refusal(behind, None)
        # What it was made for, and it; no model, which would outlive its being replaced.
        self._full: tuple[Statistics | None, float, Refusal] = (None, 0.0, self._behind)
        self._look_ns = 0  # when the loop should look at the queue again

    def refuse(self, events: int, calls: int) -> Refusal | None:
        """How a call ends at once, where it must. On gRPC's thread.

        Args:
            events: that wait for the loop.
            calls: of them; they will need room in the queue.
        """
        if events >= self._most_behind:
            return self._behind
        if self._watched or self._gate.closed or (found := self._catalog.refusal(calls)) is None:
            return None
        if (now_ns := time.monotonic_ns()) >= self._look_ns:  # it may find requests there that nobody waits for
            self._look_ns = now_ns + _LOOK_NS
            return None
        served, error = found
        statistics, retry_s, refusal = self._full
        if statistics is not served.statistics or retry_s != error.retry_s:
            refusal = self._refusal(error, served.statistics)
            self._full = (served.statistics, error.retry_s, refusal)
        return refusal

    def _refusal(self, error: QueueFull, statistics: Statistics | None) -> Refusal:
        details = str(error)
        return Refusal(
            _CODE,
            details,
            trailing_metadata(_CODE, details, error),
            functools.partial(self._count, details, statistics),
        )

    def _count(self, details: str, statistics: Statistics | None, method: str) -> None:
        """On the loop."""
        self._rpcs.ended[method[1:], _CODE.name] += 1
        if statistics:
            statistics.dropped("queue_full")
            statistics.failed(time.monotonic_ns())
        logs.refused(_CODE.name, details, lambda: logs.about(method, "", ()))
