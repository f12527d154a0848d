"""What a served version has done, counted as Triton's statistics extension counts it, and how RPCs ended.

Any thread counts. All of it can be pickled, and that of several processes merged.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

# 100 us to 10 s in steps of 1, 2, 5.
DURATION_BOUNDS_NS = (*(digit * 10**power for power in range(5, 10) for digit in (1, 2, 5)), 10**10)

DropReason = Literal["queue_full", "queue_bytes", "expired", "cancelled"]
DROP_REASONS: tuple[DropReason, ...] = get_args(DropReason)


class Stages(Protocol):
    """When a request went through the stages, in `time.monotonic_ns()`, and its number of rows."""

    rows: int
    queued_ns: int
    taken_ns: int  # out of the queue
    assembled_ns: int  # into a batch
    computed_ns: int


# Who wants to know, beside the counts, of each request that succeeds in the call that is being answered: when it began
# to be decoded, its stages, and when it was encoded.
observer: ContextVar[Callable[[int, Stages, int], None] | None] = ContextVar("observer", default=None)


@dataclass(slots=True)
class Duration:
    """How often something was done and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count one more."""
        self.count += 1
        self.ns += ns

    def include(self, other: Duration) -> None:
        """Count all that another has counted."""
        self.count += other.count
        self.ns += other.ns


@dataclass(slots=True)
class Histogram:
    """How long something took in all, and how often it took at most as long as each of `DURATION_BOUNDS_NS`."""

    ns: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(DURATION_BOUNDS_NS) + 1))  # the last: longer

    @property
    def count(self) -> int:
        """How often."""
        return sum(self.buckets)

    def add(self, ns: int) -> None:
        """Count one more."""
        self.ns += ns
        self.buckets[bisect_left(DURATION_BOUNDS_NS, ns)] += 1

    def include(self, other: Histogram) -> None:
        """Count all that another has counted."""
        self.ns += other.ns
        self.buckets = [mine + theirs for mine, theirs in zip(self.buckets, other.buckets, strict=True)]


@dataclass(slots=True)
class BatchStatistics:
    """Of all runs with one number of rows."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


class _Locked:
    """Has a lock, and is pickled without it."""

    lock: threading.Lock

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.Lock())


@dataclass
class Statistics(_Locked):
    """Of one version since it was loaded.

    For every request that succeeded, queue + compute_input + compute_infer + compute_output is exactly success.
    While it is counted, `merge` is what reads it.
    """

    success: Histogram = field(default_factory=Histogram)  # from the decoding of the request to the encoded answer
    fail: Duration = field(default_factory=Duration)
    queue: Histogram = field(default_factory=Histogram)
    compute_input_ns: int = 0  # decoding, and assembling the batch
    compute_infer_ns: int = 0
    compute_output_ns: int = 0  # splitting the batch, and encoding; counted by itself so that it never falls
    runs: Histogram = field(default_factory=Histogram)  # of the model: assembling the batch, computing, splitting
    batches: dict[int, BatchStatistics] = field(default_factory=dict)  # by the number of rows
    last_inference_ms: int = 0  # since 1970
    drops: Counter[str] = field(default_factory=Counter)  # by reason
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def inference_count(self) -> int:
        """Rows inferred, whether or not anyone still waited for them."""
        return sum(rows * batch.compute_infer.count for rows, batch in self.batches.items())

    @property
    def execution_count(self) -> int:
        """Runs of the model."""
        return sum(batch.compute_infer.count for batch in self.batches.values())

    def executed(self, rows: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count one run of the model."""
        with self.lock:
            batch = self.batches.get(rows)
            if batch is None:
                batch = self.batches[rows] = BatchStatistics()
            batch.compute_input.add(input_ns)
            batch.compute_infer.add(infer_ns)
            batch.compute_output.add(output_ns)
            self.runs.add(input_ns + infer_ns + output_ns)
            self.last_inference_ms = time.time_ns() // 1_000_000

    def dropped(self, reason: DropReason) -> None:
        """Count a request that the model was not run for; it has to be counted by `failed` too."""
        with self.lock:
            self.drops[reason] += 1

    def refused(self, count: int) -> None:
        """Count requests that found the queue full, as both `dropped` and `failed` do; unread, they took no time."""
        with self.lock:
            self.drops["queue_full"] += count
            self.fail.count += count

    def succeeded(self, start_ns: int, stages: Stages) -> None:
        """Count a request that began to be decoded at `start_ns`, of `time.monotonic_ns()`, and is encoded now."""
        end_ns = time.monotonic_ns()
        queued_ns, taken_ns = stages.queued_ns, stages.taken_ns
        assembled_ns, computed_ns = stages.assembled_ns, stages.computed_ns
        with self.lock:
            self.success.add(end_ns - start_ns)
            self.queue.add(taken_ns - queued_ns)
            self.compute_input_ns += queued_ns - start_ns + assembled_ns - taken_ns
            self.compute_infer_ns += computed_ns - assembled_ns
            self.compute_output_ns += end_ns - computed_ns
        if (observe := observer.get()) is not None:
            observe(start_ns, stages, end_ns)

    def include(self, other: Statistics) -> None:
        """Count all that another has counted, which must not change meanwhile."""
        self.success.include(other.success)
        self.fail.include(other.fail)
        self.queue.include(other.queue)
        self.compute_input_ns += other.compute_input_ns
        self.compute_infer_ns += other.compute_infer_ns
        self.compute_output_ns += other.compute_output_ns
        self.runs.include(other.runs)
        for rows, batch in other.batches.items():
            to = self.batches.setdefault(rows, BatchStatistics())
            to.compute_input.include(batch.compute_input)
            to.compute_infer.include(batch.compute_infer)
            to.compute_output.include(batch.compute_output)
        self.last_inference_ms = max(self.last_inference_ms, other.last_inference_ms)
        self.drops.update(other.drops)

    def failed(self, start_ns: int) -> None:
        """Count a request that began to be decoded at `start_ns` and was refused."""
        with self.lock:
            self.fail.add(time.monotonic_ns() - start_ns)


def merge(parts: Sequence[Statistics]) -> Statistics:
    """What all of them have counted together, which shares nothing with them: that of one is a copy."""
    whole = Statistics()
    for part in parts:
        with part.lock:
            whole.include(part)
    return whole


@dataclass
class Rpcs(_Locked):
    """How the RPCs of one server ended, by full method name and status code."""

    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    stream_errors: Counter[tuple[str, str]] = field(default_factory=Counter)  # answers within streams that are errors
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def call_ended(self, method: str, code: str, count: int = 1) -> None:
        """Count a call, or several, by service/method and the name of its status."""
        with self.lock:
            self.ended[method, code] += count

    def stream_error(self, method: str, code: str) -> None:
        """Count an answer within a stream that is an error."""
        with self.lock:
            self.stream_errors[method, code] += 1

    def include(self, other: Rpcs) -> None:
        """Count all that another has counted; may be one that a running server counts with."""
        with other.lock:
            self.ended.update(other.ended)
            self.stream_errors.update(other.stream_errors)
