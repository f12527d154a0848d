"""Run one model's requests in batches on threads of its own, off the event loop. Knows nothing of gRPC.

Work-conserving: an idle model runs what is there at once; a busy one takes, when it is free again, what queued up
meanwhile. Requests are never split, never reordered, and each gets exactly its own rows.

Everything but the model itself happens on the event loop, so nothing here needs a lock: a batch costs one hand-over
to the model's thread and one back, however many requests it has.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from serving.errors import DeadlineExceeded, QueueFull, Unavailable
from serving.statistics import Stages, Statistics
from serving.tensors import Array

Run = Callable[[Mapping[str, Array]], dict[str, Array]]
Clock = Callable[[], int]  # nanoseconds, as `time.monotonic_ns` counts them

# Requests that arrive together are seen one turn of the event loop after the other. A batch is taken when a turn
# brought no new one: at once for one that comes alone, and after this many turns at the latest.
_TURNS = 16

_PURGE_NS = 1_000_000  # a full queue is searched for requests that nobody waits for so often at most


class Closed(Unavailable):
    """The scheduler takes no more requests; another version of the model may."""


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

    def __init__(self, requests: list[Request], taken_ns: int) -> None:
        self.requests = requests
        self.shared = len(requests) > 1
        self.rows = sum(request.rows for request in requests)
        self.taken_ns = self.assembled_ns = self.computed_ns = taken_ns
        self.outputs: dict[str, Array] = {}
        self.error: Exception | None = None
        self._raw: dict[str, bytes] = {}

    def raw(self, name: str) -> bytes:
        """An output's bytes, all rows; converted once for all requests."""
        if (raw := self._raw.get(name)) is None:
            raw = self._raw[name] = self.outputs[name].tobytes()
        return raw

    def resolve(self) -> None:
        """Give the requests that are still waited for their answers, or the error."""
        start = 0
        requests, self.requests = self.requests, []  # or a batch and its requests would wait for the collector
        for request in requests:
            future = request.future
            del request.future  # for the same reason
            request._batch, request._start = self, start
            start += request.rows
            if future.done():  # cancelled meanwhile
                continue
            if self.error is not None:
                future.set_exception(self.error)
            else:
                future.set_result(request)


class Request:
    """A request on its way, and then its answer."""

    __slots__ = ("_batch", "_start", "deadline_ns", "future", "inputs", "nbytes", "queued_ns", "rows")

    def __init__(self, inputs: Mapping[str, Array], rows: int, deadline_ns: float, queued_ns: int) -> None:
        self.inputs = inputs
        self.rows = rows
        self.nbytes = sum(array.nbytes for array in inputs.values())
        self.deadline_ns = deadline_ns
        self.queued_ns = queued_ns
        self.future: asyncio.Future[Request]
        self._batch: Batch
        self._start = 0

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
    """The requests that wait for one model, in order; judges who may wait and who runs next. No threads, no loop."""

    def __init__(self, name: str, limits: Limits, statistics: Statistics, clock: Clock) -> None:
        self._name = name
        self._limits = limits
        self._statistics = statistics
        self._clock = clock
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
        if len(self._waiting) + self.running < self._limits.max_queue:
            return
        self._purge()
        if len(self._waiting) + self.running >= self._limits.max_queue:
            self._statistics.dropped("queue_full")
            raise self._is_full()

    def refusal(self, coming: int) -> QueueFull | None:
        """What `check` would raise when `coming` more requests wait, without a search for those that nobody waits for.

        From any thread; not counted.
        """
        return self._is_full() if len(self._waiting) + self.running + coming >= self._limits.max_queue else None

    def _is_full(self) -> QueueFull:
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
        return Batch(taken, now) if taken else None

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
        if request.future.cancelled():
            self._statistics.dropped("cancelled")
        elif now >= request.deadline_ns:
            self._statistics.dropped("expired")
            request.future.set_exception(self._expired())
        else:
            return False
        self._rows -= request.rows
        self.nbytes -= request.nbytes
        return True

    def _expired(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"model {self._name}: the deadline passed before the model ran")

    def _retry_s(self) -> float:
        """When a refused caller may try again: those who wait have waited so long, and so will the next.

        In hundredths of a second: it is a guess, and equal answers cost whoever sends and reads many less.
        """
        try:
            oldest = self._waiting[0].queued_ns
        except IndexError:  # not asked first: another thread may take it meanwhile
            oldest = self._clock()
        return max(1, round((self._clock() - oldest) / 1e7)) / 100


class Scheduler:
    """The queue before one model, and the threads that run it."""

    def __init__(
        self,
        name: str,
        run: Run,
        statistics: Statistics,
        limits: Limits,
        instances: int = 1,
        clock: Clock = time.monotonic_ns,
    ) -> None:
        """Start the threads.

        Args:
            name: the model's, for messages.
            run: what `Backend.run` is; called by several threads at once where there are several instances.
            statistics: gets every execution and every request that is refused or dropped.
            limits: what the scheduler may hold.
            instances: threads that run the model.
            clock: what deadlines and times are measured with.
        """
        self._name = name
        self._run = run
        self._statistics = statistics
        self.limits = limits
        self.instances = instances
        self._clock = clock
        self.queue = Queue(name, limits, statistics, clock)
        self._free = instances  # threads that have nothing to do
        self._work: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None  # the one that the first request came on
        self._gathering = False  # whether `_gather` will be called
        self._timer: asyncio.TimerHandle | None = None  # when a batch that waits for more has waited long enough
        self._closed = False
        self._beginning = threading.Lock()
        self._drained = threading.Event()
        self._threads = [
            threading.Thread(target=self._work_on, name=f"infer-{name}-{number}", daemon=True)
            for number in range(instances)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, inputs: Mapping[str, Array], deadline_ns: float = math.inf) -> asyncio.Future[Request]:
        """Let the model run on checked inputs; to be called on the event loop.

        Args:
            inputs: by name; what `Backend.run` takes.
            deadline_ns: when nobody waits for the answer any more, in `clock`'s nanoseconds.

        Returns:
            A future of the request, which then has the answer, or of DeadlineExceeded. Cancelling it withdraws the
            request.

        Raises:
            QueueFull: the queue is full; nothing was run.
            DeadlineExceeded: the deadline has passed already.
            Closed: the model is being unloaded.
        """
        if self._closed:
            raise Closed(f"model {self._name} is being unloaded")
        if self._loop is None:
            self._begin()
            assert self._loop is not None
        rows = len(next(iter(inputs.values()))) if self.limits.batch_rows else 1
        request = Request(inputs, rows, deadline_ns, self._clock())
        self.queue.add(request)
        request.future = self._loop.create_future()
        self._kick()
        return request.future

    def _begin(self) -> None:
        """Note the loop that the first request comes on, unless the scheduler is closed at this moment."""
        with self._beginning:
            if self._closed:
                raise Closed(f"model {self._name} is being unloaded")
            self._loop = asyncio.get_running_loop()

    async def infer(self, inputs: Mapping[str, Array], deadline_ns: float = math.inf) -> Request:
        """As `submit`, and wait for the answer."""
        return await self.submit(inputs, deadline_ns)

    def close(self) -> None:
        """Refuse new requests, run those that wait, and end the threads; to be called off the event loop."""
        with self._beginning:  # or a first request could come now, and never be run
            self._closed = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._kick)
            self._drained.wait()
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()

    def _kick(self) -> None:
        """Have a batch taken soon, when a thread is free for it."""
        if self._closed and not self.queue and not self.queue.running:
            self._drained.set()
        elif self.queue and self._free and not self._gathering:
            assert self._loop is not None
            self._gathering = True
            self._loop.call_soon(self._gather, len(self.queue), _TURNS)

    def _gather(self, seen: int, turns: int) -> None:
        """Take a batch, unless the last turn of the loop brought another request or the batch should wait."""
        assert self._loop is not None
        if len(self.queue) != seen and turns:
            self._loop.call_soon(self._gather, len(self.queue), turns - 1)
            return
        self._gathering = False
        if (wait_ns := self.queue.wait_ns()) and not self._closed:
            if self._timer:
                self._timer.cancel()
            self._timer = self._loop.call_later(wait_ns / 1e9, self._kick)
        elif batch := self.queue.take():
            self._free -= 1
            self._work.put(batch)
            self._kick()
        elif self._closed:
            self._kick()

    def _work_on(self) -> None:
        """Run batches until there is a None; on a thread of its own."""
        while batch := self._work.get():
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._finish, batch, self._execute(batch))
            del batch  # or it would be kept until the next one comes

    def _execute(self, batch: Batch) -> list[Batch]:
        """Run a batch; gives it with its outputs or error, or the batches of one request that it was run as."""
        requests = batch.requests
        try:
            rows = _bucket(batch.rows, self.limits.buckets)
            inputs = _assemble(requests, rows - batch.rows)
            batch.assembled_ns = self._clock()
            outputs = self._run(inputs)
            batch.computed_ns = self._clock()
            batch.outputs = outputs if len(requests) == 1 and rows == batch.rows else _rows(outputs, rows, batch.rows)
        except Exception as error:
            if len(requests) > 1:  # one request's input may be at fault: the others must not suffer
                return [part for request in requests for part in self._execute(Batch([request], batch.taken_ns))]
            batch.error = error
        return [batch]

    def _finish(self, batch: Batch, parts: list[Batch]) -> None:
        """Answer a batch's requests, and have the next taken."""
        self.queue.finished(batch)
        self._free += 1
        for part in parts:
            if part.error is None:
                self._statistics.executed(
                    part.rows,
                    part.assembled_ns - part.taken_ns,
                    part.computed_ns - part.assembled_ns,
                    self._clock() - part.computed_ns,
                )
            part.resolve()
        self._kick()


def _bucket(rows: int, buckets: Sequence[int]) -> int:
    """The number of rows to run `rows` with."""
    return next((bucket for bucket in buckets if bucket >= rows), rows)


def _assemble(requests: Sequence[Request], padding: int) -> Mapping[str, Array]:
    """One tensor for each input, with the requests' rows one after the other and `padding` rows of zeros."""
    first = requests[0].inputs
    if len(requests) == 1 and not padding:
        return first
    parts = {name: [request.inputs[name] for request in requests] for name in first}
    if padding:
        for name, array in first.items():
            parts[name].append(np.zeros((padding, *array.shape[1:]), array.dtype))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _rows(outputs: dict[str, Array], got: int, wanted: int) -> dict[str, Array]:
    """The first rows of every output; what follows answers the padding."""
    for name, array in outputs.items():
        if len(array) != got:
            raise ValueError(f"output {name} has {len(array)} rows for a batch of {got}")
    return outputs if got == wanted else {name: array[:wanted] for name, array in outputs.items()}
