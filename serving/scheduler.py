"""Run one model's requests in batches, on threads of its own. Knows nothing of gRPC.

Work-conserving: an idle model runs what is there at once; a busy one takes, when it is free again, what queued up
meanwhile. Requests are never split, never reordered, and each gets exactly its own rows.

Whoever asks may do so on any thread. All callers of a batch are told of it together, where they wait: for the model's
thread, that is one hand-over a batch, and between two runs it has as little to do as there may be. While it waits for
the interpreter's lock, nothing is computed.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from serving.errors import QueueFull, Unavailable
from serving.request_queue import Batch, Clock, Limits, Queue, Request, Tell, Waiter, at_once
from serving.statistics import Statistics
from serving.tensors import Array, Buffer, Layout

__all__ = ["Closed", "Limits", "OnLoop", "Request", "Scheduler", "Waiter"]

_ALONE = 8  # requests in a row that came alone: the next is likely to do so too
_SHORT_NS = 500_000  # a run that takes longer would keep others waiting who have nothing to do with the model

Run = Callable[[Mapping[str, Array]], dict[str, Array]]


class Closed(Unavailable):
    """The scheduler takes no more requests; another version of the model may."""


class OnLoop:
    """Waits on the event loop where callers are told: a future of the request, which then has its answer or error."""

    __slots__ = ("future",)

    def __init__(self) -> None:
        self.future: asyncio.Future[Request] = asyncio.get_running_loop().create_future()

    def gone(self) -> bool:
        """Whether the future was cancelled."""
        return self.future.cancelled()

    def answered(self, request: Request) -> None:
        """Tell the future."""
        if self.future.done():
            return
        if request.error is None:
            self.future.set_result(request)
        else:
            self.future.set_exception(request.error)


class Scheduler:
    """The queue before one model, and the threads that run it."""

    def __init__(
        self,
        name: str,
        run: Run,
        statistics: Statistics,
        limits: Limits,
        instances: int = 1,
        tell: Tell = at_once,
        run_alone_there: bool = False,
        clock: Clock = time.monotonic_ns,
    ) -> None:
        """Start the threads.

        Args:
            name: the model's, for messages.
            run: what `Backend.run` is; called by several threads at once where there are several instances.
            statistics: gets every execution and every request that is refused or dropped.
            limits: what the scheduler may hold.
            instances: threads that run the model.
            tell: has the callers of a batch told, such as on the event loop that they wait on; they must not block, nor
                come back to the scheduler, where that is on the model's thread, as it is by default.
            run_alone_there: whether the model may run where `tell` has things called, for a request that comes alone as
                those before it did: that spares two hand-overs between threads, which cost more than a small model.
            clock: what deadlines and times are measured with.
        """
        self._name = name
        self._run = run
        self._statistics = statistics
        self.limits = limits
        self.instances = instances
        self._clock = clock
        self._tell = tell
        self.queue = Queue(name, limits, statistics, clock, tell)  # changed by who holds the next
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._run_alone_there = run_alone_there
        self._alone = 0  # requests in a row that ran by themselves, and had none behind them when they were done
        self._alone_nbytes = 0  # of the last one
        self._waiting = 0  # threads that wait for a change
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"infer-{name}-{number}", daemon=True)
            for number in range(instances)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, layout: Layout, buffers: Sequence[Buffer], deadline_ns: float, waiter: Waiter) -> None:
        """Let the model run on checked inputs.

        Args:
            layout: of what `Backend.run` is to take.
            buffers: the inputs' contents.
            deadline_ns: when nobody waits for the answer any more, in `clock`'s nanoseconds; infinity when never.
            waiter: is told of the answer, or of DeadlineExceeded, or of what the model raised.

        Raises:
            QueueFull: the queue is full; nothing was run.
            DeadlineExceeded: the deadline has passed already.
            Closed: the model is being unloaded.
        """
        rows = layout.rows if self.limits.batch_rows else 1
        request = Request(layout, buffers, rows, deadline_ns, self._clock(), waiter)
        with self._lock:
            if self._closed:
                raise Closed(f"model {self._name} is being unloaded")
            self.queue.add(request)
            alone = self._alone >= _ALONE and layout.nbytes <= self._alone_nbytes
            if self._waiting and not alone:
                self._changed.notify()
        if alone:
            self._tell(Scheduler._run_alone, self)

    async def infer(self, inputs: Mapping[str, Array], deadline_ns: float = math.inf) -> Request:
        """As `submit` with arrays by name, on the event loop that `tell` leads to, and wait for the answer.

        To be cancelled withdraws the request.
        """
        waiter = OnLoop()
        buffers = [np.require(array, requirements="C") for array in inputs.values()]
        self.submit(Layout.of(inputs), buffers, deadline_ns, waiter)
        return await waiter.future

    def check_room(self) -> None:
        """Whether one more request may wait; as `Queue.check`."""
        with self._lock:
            self.queue.check()

    def refusal(self, coming: int) -> QueueFull | None:
        """Why one more request may not wait when `coming` others come before it; as `Queue.refusal`."""
        if not self.queue.is_full(coming):
            return None
        with self._lock:
            return self.queue.refusal(coming)

    def close(self) -> None:
        """Refuse new requests, run those that wait, and end the threads."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        """Run batches until the scheduler is closed; on a thread of its own."""
        while batch := self._next():
            self._answer(batch, self._tell)
            del batch  # or it would be kept until the next one comes

    def _run_alone(self) -> None:
        """Run the only request that waits, here where its caller is told. A thread does it when others have come."""
        with self._lock:
            if self.queue.running or len(self.queue) != 1 or not (batch := self.queue.take()):
                self._alone = 0
                self._changed.notify()
                return
        self._answer(batch, at_once)

    def _answer(self, batch: Batch, tell: Tell) -> None:
        """Run a batch, and have its callers told."""
        parts = self._execute(batch)
        with self._lock:
            self.queue.finished(batch)
            alone = len(batch.requests) == 1 and not self.queue
            short = batch.computed_ns - batch.taken_ns <= _SHORT_NS
            self._alone = self._alone + 1 if self._run_alone_there and alone and short else 0
            self._alone_nbytes = batch.nbytes  # a request of more may take longer
        for part in parts:
            if part.error is None:
                self._statistics.executed(
                    part.rows,
                    part.assembled_ns - part.taken_ns,
                    part.computed_ns - part.assembled_ns,
                    self._clock() - part.computed_ns,
                )
            tell(Batch.settle, part)

    def _next(self) -> Batch | None:
        """Wait for a batch; None when there will be no more."""
        with self._lock:
            while True:
                wait_ns = 0 if self._closed else self.queue.wait_ns()
                if not wait_ns and (batch := self.queue.take()):
                    if self.queue and self._waiting:
                        self._changed.notify()  # another thread may run the rest
                    return batch
                if self._closed:
                    return None
                self._waiting += 1
                self._changed.wait(wait_ns / 1e9 if wait_ns else None)
                self._waiting -= 1

    def _execute(self, batch: Batch) -> list[Batch]:
        """Run a batch; gives it with its outputs or error, or the batches of one request that it was run as."""
        requests = batch.requests
        try:
            rows = _bucket(batch.rows, self.limits.buckets)
            inputs = batch.inputs(rows - batch.rows)
            batch.assembled_ns = self._clock()
            outputs = self._run(inputs)
            batch.computed_ns = self._clock()
            batch.outputs = outputs if len(requests) == 1 and rows == batch.rows else _rows(outputs, rows, batch.rows)
        except Exception as error:
            if len(requests) > 1:  # one request's input may be at fault: the others must not suffer
                parts = [Batch(request) for request in requests]
                for part in parts:
                    part.taken_ns = batch.taken_ns
                return [part for single in parts for part in self._execute(single)]
            batch.error = error
        return [batch]


def _bucket(rows: int, buckets: Sequence[int]) -> int:
    """The number of rows to run `rows` with."""
    return next((bucket for bucket in buckets if bucket >= rows), rows)


def _rows(outputs: dict[str, Array], got: int, wanted: int) -> dict[str, Array]:
    """The first rows of every output; what follows answers the padding."""
    for name, array in outputs.items():
        if len(array) != got:
            raise ValueError(f"output {name} has {len(array)} rows for a batch of {got}")
    return outputs if got == wanted else {name: array[:wanted] for name, array in outputs.items()}
