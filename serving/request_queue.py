"""The requests that wait for one model: who may wait, who runs next, and who has waited in vain. No threads, no loop.

Nothing here is for several threads at once, unless it says so: `Scheduler` sees to that.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from serving.errors import DeadlineExceeded, QueueFull
from serving.statistics import Statistics
from serving.tensors import Array, Buffer, Layout

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
    """Requests that run together, and what came of it.

    It is put together as they come, on the threads of those who ask: the model's thread should find all it needs.
    """

    __slots__ = (
        "_columns",
        "_layout",
        "_raw",
        "assembled_ns",
        "computed_ns",
        "deadline_ns",
        "error",
        "nbytes",
        "outputs",
        "requests",
        "rows",
        "taken_ns",
    )

    def __init__(self, first: Request) -> None:
        self.requests = [first]
        self.rows = first.rows
        self.nbytes = first.layout.nbytes
        self.deadline_ns = first.deadline_ns  # the earliest
        self.taken_ns = self.assembled_ns = self.computed_ns = 0
        self.outputs: dict[str, Array] = {}
        self.error: Exception | None = None
        self._layout = first.layout
        self._columns = [[buffer] for buffer in first.buffers]  # of the requests' inputs
        self._raw: dict[str, tuple[bytes, int]] = {}
        first.batch, first.start = self, 0

    def fits(self, request: Request, most_rows: int) -> bool:
        """Whether a request can be more rows of the same tensors: all but the first axis must be equal."""
        mine, others = self._layout.row, request.layout.row
        return self.rows + request.rows <= most_rows and (mine is others or mine == others)

    def add(self, request: Request) -> None:
        """Let a request that fits run too."""
        for column, buffer in zip(self._columns, request.buffers, strict=True):
            column.append(buffer)
        request.batch, request.start = self, self.rows
        self.requests.append(request)
        self.rows += request.rows
        self.nbytes += request.layout.nbytes
        if request.deadline_ns < self.deadline_ns:
            self.deadline_ns = request.deadline_ns

    def inputs(self, padding: int) -> dict[str, Array]:
        """One tensor for each input, with the requests' rows one after the other and `padding` rows of zeros."""
        if len(self.requests) == 1 and not padding:
            return self._layout.arrays(self.requests[0].buffers)
        return self._layout.joined(self._columns, self.rows, padding)

    def raw(self, name: str) -> tuple[bytes, int]:
        """An output's bytes, all rows, and how many a row has; converted once for all requests."""
        if (raw := self._raw.get(name)) is None:
            whole = self.outputs[name].tobytes()
            raw = self._raw[name] = (whole, len(whole) // self.rows)
        return raw

    def settle(self) -> None:
        """Tell all who asked what came of it."""
        requests, self.requests = self.requests, []  # or a batch and its requests would wait for the collector
        times = self.taken_ns, self.assembled_ns, self.computed_ns
        for request in requests:
            request.taken_ns, request.assembled_ns, request.computed_ns = times
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

    __slots__ = (
        "assembled_ns",
        "batch",
        "buffers",
        "computed_ns",
        "deadline_ns",
        "error",
        "layout",
        "queued_ns",
        "rows",
        "start",
        "taken_ns",
        "waiter",
    )

    def __init__(
        self,
        layout: Layout,
        buffers: Sequence[Buffer],
        rows: int,
        deadline_ns: float,
        queued_ns: int,
        waiter: Waiter,
    ) -> None:
        self.layout = layout
        self.buffers = buffers
        self.rows = rows
        self.deadline_ns = deadline_ns
        self.queued_ns = queued_ns
        self.waiter = waiter
        self.error: Exception | None = None  # instead of an answer
        self.batch: Batch  # that it waits in, or ran in
        self.start: int  # its first row there
        self.taken_ns: int  # of an answer, as the batch has them
        self.assembled_ns: int
        self.computed_ns: int

    def settle(self) -> None:
        """Tell whoever asked that this has its answer, or why not."""
        waiter = self.waiter
        del self.waiter  # or they would keep each other
        try:
            waiter.answered(self)
        except Exception:  # the others must be told all the same
            logger.exception("unexpected error while an answer was given")

    @property
    def outputs(self) -> dict[str, Array]:
        """The request's rows of every output, as views."""
        if self.rows == self.batch.rows:
            return self.batch.outputs
        end = self.start + self.rows
        return {name: array[self.start : end] for name, array in self.batch.outputs.items()}

    def raw(self, name: str) -> bytes:
        """The request's rows of an output, as bytes."""
        raw, row = self.batch.raw(name)
        begin = self.start * row
        return raw[begin : begin + self.rows * row]

    def row_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one row of an output."""
        return self.batch.outputs[name].shape[1:]


class Queue:
    """The requests that wait for one model, in order."""

    def __init__(self, name: str, limits: Limits, statistics: Statistics, clock: Clock, tell: Tell = at_once) -> None:
        self._name = name
        self._limits = limits
        self._statistics = statistics
        self._clock = clock
        self._tell = tell
        self._waiting: deque[Batch] = deque()  # the last takes more
        self._count = 0  # requests that wait
        self._rows = 0  # of those
        self._purge_ns = 0  # when the next search may be
        self.running = 0  # requests that were taken and are not finished
        self.nbytes = 0  # of those that wait or run

    def __len__(self) -> int:
        return self._count

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
        return self._count + self.running + coming >= self._limits.max_queue

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
        if self.is_full():
            self.check()
        if self.nbytes + request.layout.nbytes > limits.max_queue_bytes:
            self._purge()
            if self.nbytes and self.nbytes + request.layout.nbytes > limits.max_queue_bytes:
                self._statistics.dropped("queue_bytes")
                raise QueueFull(
                    f"model {self._name}: {self.nbytes} bytes wait already, {request.layout.nbytes} more are over the "
                    f"{limits.max_queue_bytes} that the queue holds (--max-queue-bytes)",
                    self._retry_s(),
                )
        self._append(request)
        self._count += 1
        self._rows += request.rows
        self.nbytes += request.layout.nbytes

    def _append(self, request: Request) -> None:
        """Put it into the last batch, or one behind that."""
        waiting = self._waiting
        if waiting and waiting[-1].fits(request, self._limits.batch_rows):
            waiting[-1].add(request)
        else:
            waiting.append(Batch(request))

    def wait_ns(self) -> int:
        """How long the next batch should wait for more requests; 0 when it should run now."""
        if not self._limits.max_delay_us or self._rows >= self._limits.batch_rows or not self._waiting:
            return 0
        return max(0, self._waiting[0].requests[0].queued_ns + 1000 * self._limits.max_delay_us - self._clock())

    def take(self) -> Batch | None:
        """The first request and as many behind it as fit into one run; None when nobody waits.

        Those whose caller left or whose deadline passed are dropped, and counted.
        """
        now = self._clock()
        while self._waiting:
            batch = self._waiting.popleft()
            if now >= batch.deadline_ns or any(request.waiter.gone() for request in batch.requests):
                kept = self._kept(batch, now)
                if not kept:
                    continue
                batch = Batch(kept[0])
                for request in kept[1:]:
                    batch.add(request)
            batch.taken_ns = now
            count = len(batch.requests)
            self._count -= count
            self._rows -= batch.rows
            self.running += count
            return batch
        return None

    def finished(self, batch: Batch) -> None:
        """Make room for others."""
        self.running -= len(batch.requests)
        self.nbytes -= batch.nbytes

    def _purge(self) -> None:
        """Forget the requests that nobody waits for, unless that was just done."""
        now = self._clock()
        if now < self._purge_ns:
            return
        self._purge_ns = now + _PURGE_NS
        waiting, self._waiting = self._waiting, deque()
        for batch in waiting:
            for request in self._kept(batch, now):
                self._append(request)

    def _kept(self, batch: Batch, now: int) -> list[Request]:
        """The requests of a batch that somebody waits for; it has none any more."""
        requests, batch.requests = batch.requests, []
        return [request for request in requests if not self._dropped(request, now)]

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
        self._count -= 1
        self._rows -= request.rows
        self.nbytes -= request.layout.nbytes
        request.error = error
        self._tell(Request.settle, request)
        return True

    def _expired(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"model {self._name}: the deadline passed before the model ran")

    def _retry_s(self) -> float:
        """When a refused caller may try again: those who wait have waited so long, and so will the next.

        In hundredths of a second: it is a guess, and equal answers cost whoever sends and reads many less.
        """
        oldest = self._waiting[0].requests[0].queued_ns if self._waiting else self._clock()
        return max(1, round((self._clock() - oldest) / 1e7)) / 100
