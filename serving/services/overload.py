"""What is refused before it is read, while more is asked than the server can answer.

To have a call answered costs several times what it costs to refuse it, and would leave no time for the requests that
were accepted. So this is asked as soon as a call's headers are there, and those that are refused in one turn of the
event loop are counted together.
"""

from __future__ import annotations

import asyncio
import functools
import time
import weakref
from collections import Counter
from collections.abc import Callable

from serving import logs
from serving.catalog import Catalog
from serving.errors import STATUS, QueueFull
from serving.loading import ServedModel
from serving.request_queue import Clock
from serving.rpc import Refusal
from serving.services.gate import Gate
from serving.services.statuses import trailing_metadata
from serving.statistics import Rpcs

_CODE = STATUS[QueueFull]
_LOOK_NS = 10_000_000  # how long one look at a full queue serves: the time to try again is told no finer


def _soon(callback: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_soon(callback)


class Overload:
    """Judges calls that need room in a model's queue."""

    def __init__(
        self,
        catalog: Catalog,
        rpcs: Rpcs,
        gate: Gate,
        watched: object,
        clock: Clock = time.monotonic_ns,
        soon: Callable[[Callable[[], None]], None] = _soon,
    ) -> None:
        """Everything has room yet.

        Args:
            catalog: knows which model is the only one: where there are several, a call has to be read first.
            rpcs: where refused calls are counted.
            gate: once it is closed, it says what becomes of calls.
            watched: something that must see every call.
            clock: what looks are timed with.
            soon: has something called in the event loop's next turn.
        """
        self._catalog = catalog
        self._rpcs = rpcs
        self._gate = gate
        self._watched = bool(watched)
        self._clock = clock
        self._last: Refusal | None = None  # holds for whoever comes before the next look
        self._of: Callable[[], ServedModel | None] = lambda: None  # a model that is replaced goes
        self._look_ns = 0
        self._soon = soon
        self._uncounted: Counter[str] = Counter()  # calls that were refused in this turn, by method

    def refuse(self, method: str, coming: int) -> Refusal | None:
        """How a call ends at once, where it must; it is counted before anything else that comes can ask.

        Args:
            method: `/service/method`.
            coming: calls that will need room in the queue too.
        """
        served = self._catalog.only
        if served is None or self._watched or self._gate.closed or not served.scheduler.queue.is_full(coming):
            return None
        now_ns = self._clock()
        if served is not self._of() or now_ns >= self._look_ns:
            if (error := served.scheduler.refusal(coming)) is None:
                return None  # some of those that waited had left
            self._count()
            self._last, self._of, self._look_ns = _refusal(error), weakref.ref(served), now_ns + _LOOK_NS
        assert self._last
        if not self._uncounted:
            self._soon(self._count)
        self._uncounted[method] += 1
        return self._last

    def _count(self) -> None:
        """Count those that were refused by the last look."""
        served = self._of()
        for method, count in self._uncounted.items():
            assert self._last
            if served:
                served.statistics.refused(count)
            self._rpcs.call_ended(method[1:], _CODE.name, count)
            logs.refused(_CODE.name, self._last.details, functools.partial(logs.about, method, "", ()), count)
        self._uncounted.clear()


def _refusal(error: QueueFull) -> Refusal:
    details = str(error)
    return Refusal(_CODE, details, trailing_metadata(_CODE, details, error))
