"""Run one model's requests in batches on a thread of its own, off the event loop. Knows nothing of gRPC.

Work-conserving: an idle model runs a request at once, with no added delay; a busy one takes, when it is free again,
what queued up meanwhile. Requests are never split, never reordered, and each gets exactly its own rows.
"""

from __future__ import annotations

import asyncio
import contextlib
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


@dataclass(frozen=True, slots=True)
class Answer:
    """A request's outputs, and when it went through the stages."""

    outputs: dict[str, Array]
    stages: Stages


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    inputs: Mapping[str, Array]
    rows: int
    deadline: float | None
    future: asyncio.Future[Answer]
    queued_ns: int

    def fits(self, other: _Request) -> bool:
        """Whether both can be rows of one tensor: all but the first axis must be equal."""
        return all(array.shape[1:] == other.inputs[name].shape[1:] for name, array in self.inputs.items())


class Closed(Unavailable):
    """The scheduler takes no more requests; another version of the model may."""


class Scheduler:
    """The queue before one model, bounded, and the thread that runs it."""

    def __init__(self, name: str, run: Run, statistics: Statistics, max_batch_size: int, max_queue: int) -> None:
        """Start the thread.

        Args:
            name: the model's, for messages.
            run: what `Backend.run` is.
            statistics: gets every execution.
            max_batch_size: rows in one run; 0 for a model whose first axis is no batch axis: one request a run.
            max_queue: requests that may wait or run.
        """
        self._name = name
        self._run = run
        self._statistics = statistics
        self._max_batch_size = max_batch_size
        self._max_queue = max_queue
        self._pending = 0  # waiting or running; touched by the event loop alone
        self._queue: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"infer-{name}", daemon=True)
        self._thread.start()

    async def infer(self, inputs: Mapping[str, Array], deadline: float | None = None) -> Answer:
        """Run the model on checked inputs.

        Args:
            inputs: by name; what `Backend.run` takes.
            deadline: `time.monotonic()` after which nobody waits for the answer, seconds.

        Raises:
            QueueFull: the queue is full; nothing was run.
            DeadlineExceeded: the deadline passed before the model ran.
            Closed: the model is being unloaded.
        """
        if self._pending >= self._max_queue:
            raise QueueFull(f"model {self._name}: {self._pending} requests wait already, the queue holds no more")
        rows = len(next(iter(inputs.values()))) if self._max_batch_size else 1
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._closed:
                raise Closed(f"model {self._name} is being unloaded")
            request = _Request(inputs, rows, deadline, future, time.monotonic_ns())
            self._queue.append(request)
            self._changed.notify()
        self._pending += 1
        try:
            return await future
        except asyncio.CancelledError:
            with self._changed, contextlib.suppress(ValueError):  # not there any more: it runs or ran
                self._queue.remove(request)
            raise
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Refuse new requests, run those that wait, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._take():
            self._execute(batch, time.monotonic_ns())

    def _take(self) -> list[_Request]:
        """Wait for requests, and take the first and as many behind it as fit into one run; none when closed."""
        batch: list[_Request] = []
        rows = 0
        with self._changed:
            while not batch:
                while not self._queue:
                    if self._closed:
                        return []
                    self._changed.wait()
                while self._queue:
                    request = self._queue[0]
                    if batch and (rows + request.rows > self._max_batch_size or not request.fits(batch[0])):
                        break
                    self._queue.popleft()
                    if _is_waited_for(request, self._name):
                        batch.append(request)
                        rows += request.rows
        return batch

    def _execute(self, batch: list[_Request], taken_ns: int) -> None:
        """Run a batch and hand every request its rows."""
        try:
            first = batch[0].inputs
            if len(batch) > 1:
                inputs = {name: np.concatenate([request.inputs[name] for request in batch]) for name in first}
            else:
                inputs = dict(first)
            rows = sum(request.rows for request in batch)
            assembled_ns = time.monotonic_ns()
            outputs = self._run(inputs)
            computed_ns = time.monotonic_ns()
            shares = _split(outputs, [request.rows for request in batch]) if len(batch) > 1 else [outputs]
        except Exception as error:
            if len(batch) == 1:
                _resolve(batch, [error])
                return
            for request in batch:  # one request's input may be at fault: the others must not suffer
                self._execute([request], taken_ns)
            return
        self._statistics.executed(
            rows, assembled_ns - taken_ns, computed_ns - assembled_ns, time.monotonic_ns() - computed_ns
        )
        _resolve(
            batch,
            [
                Answer(share, Stages(request.rows, request.queued_ns, taken_ns, assembled_ns, computed_ns))
                for request, share in zip(batch, shares, strict=True)
            ],
        )


def _is_waited_for(request: _Request, model: str) -> bool:
    """Whether anyone still waits for an answer; one whose deadline passed is told so."""
    if request.future.cancelled():
        return False
    if request.deadline is not None and time.monotonic() >= request.deadline:
        _resolve([request], [DeadlineExceeded(f"model {model}: the deadline passed before the model ran")])
        return False
    return True


def _split(outputs: dict[str, Array], rows: list[int]) -> list[dict[str, Array]]:
    """Each request's rows of every output, as views."""
    ends = np.cumsum(rows)
    for name, array in outputs.items():
        if len(array) != ends[-1]:
            raise ValueError(f"output {name} has {len(array)} rows for a batch of {ends[-1]}")
    return [
        {name: array[end - count : end] for name, array in outputs.items()}
        for count, end in zip(rows, ends.tolist(), strict=True)
    ]


def _resolve(batch: list[_Request], results: Sequence[Answer | Exception]) -> None:
    """Hand the results over to the event loop, all of them in one call."""

    def resolve() -> None:
        for request, result in zip(batch, results, strict=True):
            if request.future.done():  # cancelled meanwhile
                continue
            if isinstance(result, Exception):
                request.future.set_exception(result)
            else:
                request.future.set_result(result)

    batch[0].future.get_loop().call_soon_threadsafe(resolve)
