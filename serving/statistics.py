"""What a served version has done, counted as Triton's statistics extension counts it."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Literal

DropReason = Literal["queue_full", "queue_bytes", "expired", "cancelled"]


@dataclass(frozen=True, slots=True)
class Stages:
    """When a request went through the stages, in `time.monotonic_ns()`, and its number of rows."""

    rows: int
    queued_ns: int
    taken_ns: int  # out of the queue
    assembled_ns: int  # into a batch
    computed_ns: int


@dataclass
class Duration:
    """How often something was done and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count one more."""
        self.count += 1
        self.ns += ns


@dataclass
class BatchStatistics:
    """Of all runs with one number of rows."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass
class Statistics:
    """Of one version since it was loaded.

    For every request that succeeded, queue + compute_input + compute_infer + compute_output is exactly success.
    `executed` is called by the model's thread, all else by the event loop; they share no field.
    """

    inference_count: int = 0  # rows
    execution_count: int = 0  # runs of the model
    last_inference_ms: int = 0  # since 1970
    success: Duration = field(default_factory=Duration)  # from the decoding of the request to the encoded answer
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)  # decoding, and assembling the batch
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)  # splitting the batch, and encoding
    drops: Counter[str] = field(default_factory=Counter)  # by reason
    batches: defaultdict[int, BatchStatistics] = field(default_factory=lambda: defaultdict(BatchStatistics))

    def executed(self, rows: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count one run of the model."""
        self.execution_count += 1
        batch = self.batches[rows]
        batch.compute_input.add(input_ns)
        batch.compute_infer.add(infer_ns)
        batch.compute_output.add(output_ns)

    def succeeded(self, start_ns: int, stages: Stages) -> None:
        """Count a request that began to be decoded at `start_ns`, of `time.monotonic_ns()`, and is encoded now."""
        end_ns = time.monotonic_ns()
        self.inference_count += stages.rows
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.success.add(end_ns - start_ns)
        self.queue.add(stages.taken_ns - stages.queued_ns)
        self.compute_input.add(stages.queued_ns - start_ns + stages.assembled_ns - stages.taken_ns)
        self.compute_infer.add(stages.computed_ns - stages.assembled_ns)
        self.compute_output.add(end_ns - stages.computed_ns)

    def dropped(self, reason: DropReason) -> None:
        """Count a request that the model was not run for."""
        self.drops[reason] += 1

    def failed(self, start_ns: int) -> None:
        """Count a request that began to be decoded at `start_ns` and was refused."""
        self.fail.add(time.monotonic_ns() - start_ns)
