"""What a person sees of a training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:  # a bar alone needs no torch
    import torch

    from trainer.config import TrainConfig
    from trainer.models import Network
    from trainer.processes import Processes
    from trainer.runs import Watcher
    from trainer.train import EpochMetrics


def progress_bar(console: Console) -> Progress:
    """What is going on, how far it is and how long it will take; nothing where no one looks on."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def training(console: Console, config: TrainConfig, processes: Processes) -> Iterator[Watcher]:
    """A progress bar and a line an epoch, from the first process alone."""
    from trainer.models import count_parameters
    from trainer.runs import Watcher

    if not processes.first:
        yield Watcher()
        return
    with progress_bar(console) as bar:
        task = bar.add_task("training", total=None)
        finished = 0

        def on_start(network: Network, device: torch.device, why: str, done: int, images: int) -> None:
            bar.update(task, total=config.epochs * images, completed=done * images)
            together = f", in {processes.count} processes" if processes.count > 1 else ""
            console.print(
                f"network: {config.name}, {count_parameters(network):,} parameters, on {device} ({why}){together}",
                soft_wrap=True,
            )
            if done:
                console.print(f"resumed after epoch {done}")

        def on_epoch(metrics: EpochMetrics) -> None:
            nonlocal finished
            finished = metrics.epoch
            bar.console.print(_line(metrics, config.epochs), soft_wrap=True)

        try:
            yield Watcher(on_start, lambda images: bar.advance(task, images), on_epoch)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(finished and f"--resume goes on after epoch {finished}") from None


def _line(metrics: EpochMetrics, epochs: int) -> str:
    parts = [f"epoch {metrics.epoch}/{epochs}: training loss {metrics.train_loss:.4f}"]
    if metrics.validation_accuracy is not None:
        parts.append(f"validation loss {metrics.validation_loss:.4f}, accuracy {metrics.validation_accuracy:.2%}")
    else:
        parts.append(f"training accuracy {metrics.train_accuracy:.2%}")
    parts.append(f"learning rate {metrics.learning_rate:.1e}, {metrics.seconds:.1f} s")
    return ", ".join([*parts, f"{metrics.images_per_s:,.0f} images/s"])
