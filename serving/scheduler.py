"""Run one model's requests off the event loop, one run at a time, with a bounded queue. Knows nothing of gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from serving.errors import DeadlineExceeded, QueueFull, Unavailable
from serving.tensors import Array

Run = Callable[[Mapping[str, Array]], dict[str, Array]]


class Scheduler:
    """The queue before one model: an inference thread of its own, and a bound on how many requests it holds."""

    def __init__(self, name: str, run: Run, max_queue: int) -> None:
        self._name = name
        self._run = run
        self._max_queue = max_queue
        self._pending = 0
        self._closed = False
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"infer-{name}")

    async def infer(self, inputs: Mapping[str, Array], deadline: float | None = None) -> dict[str, Array]:
        """Run the model on checked inputs.

        Args:
            inputs: by name; what `Backend.run` takes.
            deadline: `time.monotonic()` after which nobody waits for the answer, seconds.

        Raises:
            QueueFull: the queue is full; nothing was run.
            DeadlineExceeded: the deadline passed before the model ran.
            Unavailable: the model is being unloaded.
        """
        if self._closed:
            raise Unavailable(f"model {self._name} is being unloaded")
        if self._pending >= self._max_queue:
            raise QueueFull(f"model {self._name}: {self._pending} requests wait already, the queue holds no more")
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._run_in_time, inputs, deadline)
        finally:
            self._pending -= 1

    def _run_in_time(self, inputs: Mapping[str, Array], deadline: float | None) -> dict[str, Array]:
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlineExceeded(f"model {self._name}: the deadline passed before the model ran")
        return self._run(inputs)

    def close(self) -> None:
        """Refuse new requests and wait for the one that runs; those that wait are cancelled."""
        self._closed = True
        self._executor.shutdown(wait=True, cancel_futures=True)
