"""The requests that wait for one model: who may wait, who runs next, and who has waited in vain. No threads, no loop.

Nothing here is for several threads at once, unless it says so: `Scheduler` sees to that.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from serving.errors import DeadlineExceeded, QueueFull
from serving.statistics import Stages, Statistics
from serving.tensors import Array

logger = logging.getLogger(__name__)

Clock = Callable[[], int]  # nanoseconds, as `time.monotonic_ns` counts them
Tell = Callable[[Callable[[Any], None], Any], None]  # has something called with an argument, where callers wait

_PURGE_NS = 10_000_000  # a full queue is searched for requests that nobody waits for so often at most: it costs


def at_once(callback: Callable[[Any], None], argument: Any) -> None:
    """Call it on whichever thread this is."""
    callback(argument)


class Withdrawn(Exception):
    """Whoever asked has gone before the model ran."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a scheduler may hold, and how long it may wait."""

    batch_rows: int  # that requests are gathered to; one that has more runs by itself; 0: every request runs by itself
    max_queue: int = 1024  # requests that may wait or run
    max_queue_bytes: int = 1 << 30  # of their inputs
    max_delay_us: int = 0  # a batch that is not full may wait so long for more
    buckets: tuple[int, ...] = ()  # ascending; a batch is padded to the next of these numbers of rows


class Batch:
    """Requests that run together, and what came of it."""

    __slots__ = ("_raw", "assembled_ns", "computed_ns", "error", "outputs", "requests", "rows", "shared", "taken_ns")

    def __init__(self, requests: list[Request], rows: int, taken_ns: int) -> None:
        self.requests = requests
        self.shared = len(requests) > 1
        self.rows = rows
        self.taken_ns = self.assembled_ns = self.computed_ns = taken_ns
        self.outputs: dict[str, Array] = {}
        self.error: Exception | None = None
        self._raw: dict[str, bytes] = {}

    def raw(self, name: str) -> bytes:
        """An output's bytes, all rows; converted once for all requests."""
        if (raw := self._raw.get(name)) is None:
            raw = self._raw[name] = self.outputs[name].tobytes()
        return raw

    def settle(self) -> None:
        """Tell all who asked what came of it."""
        start = 0
        requests, self.requests = self.requests, []  # or a batch and its requests would wait for the collector
        for request in requests:
            request._batch, request._start = self, start
            start += request.rows
            request.error = self.error
            request.settle()


class Waiter(Protocol):
    """Whoever asked."""

    def gone(self) -> bool:
        """Whether nobody waits for the answer any more. Asked on any thread; must neither block nor come back."""

    def answered(self, request: Request) -> None:
        """Told once what came of the request, gone or not; where the scheduler's `tell` has it told."""


class Request:
    """A request on its way, and then its answer."""

    __slots__ = ("_batch", "_start", "deadline_ns", "error", "inputs", "nbytes", "queued_ns", "rows", "waiter")

    def __init__(
        self, inputs: Mapping[str, Array], rows: int, deadline_ns: float, queued_ns: int, waiter: Waiter
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self.nbytes = 0
        for array in inputs.values():
            self.nbytes += array.nbytes
        self.deadline_ns = deadline_ns
        self.queued_ns = queued_ns
        self.waiter = waiter
        self.error: Exception | None = None  # instead of an answer
        self._batch: Batch
        self._start = 0

    def settle(self) -> None:
        """Tell whoever asked that this has its answer, or why not."""
        waiter = self.waiter
        del self.waiter  # or they would keep each other
        try:
            waiter.answered(self)
        except Exception:  # the others must be told all the same
            logger.exception("unexpected error while an answer was given")

    def fits(self, other: Request) -> bool:
        """Whether both can be rows of one tensor: all but the first axis must be equal."""
        return all(array.shape[1:] == other.inputs[name].shape[1:] for name, array in self.inputs.items())

    @property
    def outputs(self) -> dict[str, Array]:
        """The request's rows of every output, as views."""
        if not self._batch.shared:
            return self._batch.outputs
        end = self._start + self.rows
        return {name: array[self._start : end] for name, array in self._batch.outputs.items()}

    def raw(self, name: str) -> bytes:
        """The request's rows of an output, as bytes."""
        raw = self._batch.raw(name)
        if not self._batch.shared:
            return raw
        row = len(raw) // self._batch.rows
        return raw[self._start * row : (self._start + self.rows) * row]

    def row_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one row of an output."""
        return self._batch.outputs[name].shape[1:]

    @property
    def stages(self) -> Stages:
        """When the request went through the stages."""
        batch = self._batch
        return Stages(self.rows, self.queued_ns, batch.taken_ns, batch.assembled_ns, batch.computed_ns)


class Queue:
    """The requests that wait for one model, in order."""

    def __init__(self, name: str, limits: Limits, statistics: Statistics, clock: Clock, tell: Tell = at_once) -> None:
        self._name = name
        self._limits = limits
        self._statistics = statistics
        self._clock = clock
        self._tell = tell
        self._waiting: deque[Request] = deque()
        self._rows = 0  # of those that wait
        self._purge_ns = 0  # when the next search may be
        self.running = 0  # requests that were taken and are not finished
        self.nbytes = 0  # of those that wait or run

    def __len__(self) -> int:
        return len(self._waiting)

    def check(self) -> None:
        """Whether one more request may wait, whatever it holds.

        Raises:
            QueueFull: it may not, and is counted as refused.
        """
        if error := self.refusal():
            self._statistics.dropped("queue_full")
            raise error

    def is_full(self, coming: int = 0) -> bool:
        """Whether there is no room for one more request, when `coming` others come before it. From any thread."""
        return len(self._waiting) + self.running + coming >= self._limits.max_queue

    def refusal(self, coming: int = 0) -> QueueFull | None:
        """Why one more request may not wait when `coming` others come before it; None where it may. Not counted."""
        if not self.is_full(coming):
            return None
        self._purge()
        if not self.is_full(coming):
            return None
        count = self._limits.max_queue
        return QueueFull(
            f"model {self._name}: {count} requests wait already, the queue holds no more (--max-queue)",
            self._retry_s(),
        )

    def add(self, request: Request) -> None:
        """Let a request wait.

        Raises:
            QueueFull: there is no room; the text says of what.
            DeadlineExceeded: nobody waits for the answer any more.
        """
        limits = self._limits
        if request.queued_ns >= request.deadline_ns:
            self._statistics.dropped("expired")
            raise self._expired()
        self.check()
        if self.nbytes + request.nbytes > limits.max_queue_bytes:
            self._purge()
            if self.nbytes and self.nbytes + request.nbytes > limits.max_queue_bytes:
                self._statistics.dropped("queue_bytes")
                raise QueueFull(
                    f"model {self._name}: {self.nbytes} bytes wait already, {request.nbytes} more are over the "
                    f"{limits.max_queue_bytes} that the queue holds (--max-queue-bytes)",
                    self._retry_s(),
                )
        self._waiting.append(request)
        self._rows += request.rows
        self.nbytes += request.nbytes

    def wait_ns(self) -> int:
        """How long the next batch should wait for more requests; 0 when it should run now."""
        if not self._limits.max_delay_us or self._rows >= self._limits.batch_rows or not self._waiting:
            return 0
        return max(0, self._waiting[0].queued_ns + 1000 * self._limits.max_delay_us - self._clock())

    def take(self) -> Batch | None:
        """The first request and as many behind it as fit into one run; None when nobody waits.

        Those whose caller left or whose deadline passed are dropped, and counted.
        """
        taken: list[Request] = []
        rows = 0
        now = self._clock()
        while self._waiting:
            request = self._waiting[0]
            if taken and (rows + request.rows > self._limits.batch_rows or not request.fits(taken[0])):
                break
            self._waiting.popleft()
            if not self._dropped(request, now):
                taken.append(request)
                rows += request.rows
        self._rows -= rows
        self.running += len(taken)
        return Batch(taken, rows, now) if taken else None

    def finished(self, batch: Batch) -> None:
        """Make room for others."""
        self.running -= len(batch.requests)
        self.nbytes -= sum(request.nbytes for request in batch.requests)

    def _purge(self) -> None:
        """Forget the requests that nobody waits for, unless that was just done."""
        now = self._clock()
        if now < self._purge_ns:
            return
        self._purge_ns = now + _PURGE_NS
        self._waiting = deque(request for request in self._waiting if not self._dropped(request, now))

    def _dropped(self, request: Request, now: int) -> bool:
        """Whether nobody waits for a request any more: it is then counted, and leaves its room to others."""
        error: Exception
        if request.waiter.gone():
            self._statistics.dropped("cancelled")
            error = Withdrawn()
        elif now >= request.deadline_ns:
            self._statistics.dropped("expired")
            error = self._expired()
        else:
            return False
        self._rows -= request.rows
        self.nbytes -= request.nbytes
        request.error = error
        self._tell(Request.settle, request)
        return True

    def _expired(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"model {self._name}: the deadline passed before the model ran")

    def _retry_s(self) -> float:
        """When a refused caller may try again: those who wait have waited so long, and so will the next.

        In hundredths of a second: it is a guess, and equal answers cost whoever sends and reads many less.
        """
        oldest = self._waiting[0].queued_ns if self._waiting else self._clock()
        return max(1, round((self._clock() - oldest) / 1e7)) / 100
