"""What is refused before it is read, while more is asked than the server can answer.

To have a call answered costs several times what it costs to refuse it, and would leave no time for the requests that
were accepted. So this is asked as soon as a call's headers are there.
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

_CODE = STATUS[QueueFull]


class Overload:
    """Judges calls that need room in a model's queue."""

    def __init__(self, catalog: Catalog, rpcs: Rpcs, gate: Gate, watched: object) -> None:
        """Everything has room yet.

        Args:
            catalog: knows whether the queue of the only model is full.
            rpcs: where refused calls are counted.
            gate: once it is closed, it says what becomes of calls.
            watched: something that must see every call.
        """
        self._catalog = catalog
        self._rpcs = rpcs
        self._gate = gate
        self._watched = bool(watched)
        self._full: tuple[str, float, Refusal] = ("", 0.0, _refusal(QueueFull("")))  # the last one's text, time, result

    def refuse(self, method: str, coming: int) -> Refusal | None:
        """How a call ends at once, where it must, which is then counted.

        Args:
            method: `/service/method`.
            coming: calls that will need room in the queue too.
        """
        if self._watched or self._gate.closed:
            return None
        start_ns = time.monotonic_ns()
        if (found := self._catalog.refusal(coming)) is None:
            return None
        served, error = found
        served.statistics.dropped("queue_full")
        served.statistics.failed(start_ns)
        text, retry_s, refusal = self._full
        if text != str(error) or retry_s != error.retry_s:
            refusal = _refusal(error)
            self._full = (refusal.details, error.retry_s, refusal)
        self._rpcs.call_ended(method[1:], _CODE.name)
        logs.refused(_CODE.name, refusal.details, lambda: logs.about(method, "", ()))
        return refusal


def _refusal(error: QueueFull) -> Refusal:
    details = str(error)
    return Refusal(_CODE, details, trailing_metadata(_CODE, details, error))
