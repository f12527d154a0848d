"""What a model has done, as its server's statistics tell: images, runs, and the time that they took."""

from __future__ import annotations

import asyncio
import math
from typing import NamedTuple

from benchmarks.calls import ask
from protos import open_inference as pb


class Work(NamedTuple):
    """Between two moments, or since the model was loaded."""

    images: int
    runs: int
    computing_s: float  # of the model alone, all runs together

    @property
    def mean_batch(self) -> float | None:
        """Images in a run; None where there was none."""
        return self.images / self.runs if self.runs else None

    @property
    def us_per_image(self) -> float:
        """Microseconds that the model took; not-a-number where there was no image."""
        return self.computing_s / self.images * 1e6 if self.images else math.nan

    def since(self, earlier: Work) -> Work:
        """What was done after that."""
        return Work(self.images - earlier.images, self.runs - earlier.runs, self.computing_s - earlier.computing_s)


def work_of(target: str, model: str) -> Work:
    """So far.

    Raises:
        OSError: the target cannot be connected to, or does not answer.
        ValueError: the server keeps no such statistics.
    """
    request = pb.ModelStatisticsRequest(name=model).SerializeToString()
    answer = asyncio.run(ask(target, pb.RPCS["ModelStatistics"].path, request))
    counted = pb.ModelStatisticsResponse.FromString(answer).model_stats
    return Work(
        sum(each.inference_count for each in counted),
        sum(each.execution_count for each in counted),
        sum(batch.compute_infer.ns for each in counted for batch in each.batch_stats) / 1e9,
    )
