"""Event files for TensorBoard: figures of every epoch as scalars, and the pictures."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from serving.errors import ParityserveError

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ParityserveError(
        f"event files need tensorboard ({error}): pip install 'parityserve[tensorboard]', or leave --tensorboard out"
    ) from error

from trainer.runs import Watcher
from trainer.train import EpochMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class EventWriter:
    """Writes one run's events; each call is on the disk when it returns, so that TensorBoard follows the training."""

    def __init__(self, folder: Path, run: str) -> None:
        """Begin a run in a new folder, `<folder>/<run>-<time>`: events of two runs in one folder would be mixed up."""
        started = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        self.path = folder / f"{run}-{started}"
        self._writer = SummaryWriter(str(self.path))
        self._epoch = 0

    def epoch(self, metrics: Mapping[str, float | None]) -> None:
        """Write what an epoch gave: `train_loss` as `loss/train`, `learning_rate` as `training/learning_rate`.

        Args:
            metrics: one entry of a checkpoint's history; what is None was not measured.
        """
        self._epoch = int(metrics["epoch"] or 0)
        for name, value in metrics.items():
            part, _, measure = name.rpartition("_")
            if name != "epoch" and value is not None:
                tag = f"{measure}/{part}" if measure in ("loss", "accuracy") else f"training/{name}"
                self._writer.add_scalar(tag, value, self._epoch)
        self._writer.flush()

    def following(self, watcher: Watcher) -> Watcher:
        """A watcher that tells `watcher`, and writes every epoch."""

        def on_epoch(metrics: EpochMetrics) -> None:
            watcher.on_epoch(metrics)
            self.epoch(asdict(metrics))

        return replace(watcher, on_epoch=on_epoch)

    def pictures(self, figures: Iterable[tuple[str, Figure]]) -> None:
        """Write pictures, as of the last epoch."""
        from trainer.plots import raster  # needs matplotlib, the scalars do not

        for name, figure in figures:
            self._writer.add_image(name, raster(figure), self._epoch, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """End the run."""
        self._writer.close()
