"""Watch the memory and the open files of a server's processes over time, and judge whether they grow."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

import numpy as np

from benchmarks.processes import open_files, rss_mb


class Sample(NamedTuple):
    """The processes at one moment, all of them together."""

    at_s: float  # since the sampler began
    rss_mb: float
    open_files: int


class Sampler:
    """Takes samples from a thread of its own until the block ends."""

    def __init__(self, pid: int, every_s: float = 1.0) -> None:
        self.samples: list[Sample] = []
        self._pid = pid
        self._every_s = every_s
        self._began = time.perf_counter()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def take(self) -> Sample:
        """One sample now."""
        pids = [self._pid]
        return Sample(time.perf_counter() - self._began, sum(rss_mb(pids)), open_files(pids))

    def after(self, at_s: float) -> list[Sample]:
        """The samples from then on."""
        return [sample for sample in self.samples if sample.at_s >= at_s]

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._done.is_set():
            self.samples.append(self.take())
            self._done.wait(self._every_s)


def memory_slope(samples: Sequence[Sample]) -> float:
    """How fast resident memory grows, 10^6 bytes a minute, by a straight line through the samples.

    Raises:
        ValueError: there are fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError(f"got {len(samples)} samples, want two or more: measure for longer")
    times = np.array([sample.at_s for sample in samples])
    return float(np.polyfit(times, [sample.rss_mb for sample in samples], 1)[0] * 60)


def more_open_files(samples: Sequence[Sample]) -> int:
    """How many more files are open in the last third of the samples than in the first; negative when fewer.

    The least of each third counts: connections come and go, what leaks stays.
    """
    third = max(len(samples) // 3, 1)
    return min(s.open_files for s in samples[-third:]) - min(s.open_files for s in samples[:third])
