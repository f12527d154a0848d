"""How long a matrix product and a step of training take on the CPU and, where there is one, on a GPU.

python examples/devices.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from serving.errors import DeviceError
from trainer.config import TrainConfig
from trainer.data import Split
from trainer.devices import select_device, set_deterministic
from trainer.train import Training, build


def main() -> None:
    """Measure each on every device, and print the times and how many times faster the GPU is."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=1.0, help="to spend on each time at least (default: 1)")
    options.add_argument("--sizes", type=int, nargs="+", default=[64, 512, 2048], help="of the square matrices")
    options.add_argument("--batches", type=int, nargs="+", default=[64, 1024], help="images in a step")
    given = options.parse_args()

    console = Console()
    set_deterministic()  # fp32 on both sides, so that the same work is timed
    found = [torch.device("cpu")]
    try:
        found.append(select_device("cuda")[0])
    except DeviceError as error:
        console.print(f"the CPU alone is timed: {error}", soft_wrap=True)
    names = [f"CPU, {torch.get_num_threads()} threads", *(torch.cuda.get_device_name(device) for device in found[1:])]
    table = Table("median time", *names, *(["faster"] if len(found) > 1 else []), title="fp32")
    for size in given.sizes:
        row = [product(size, device) for device in found]
        add(table, f"product of two {size} x {size} matrices", [median(work, given.seconds) for work in row])
    for batch in given.batches:
        row = [step(batch, device) for device in found]
        add(table, f"step of training cnn with {batch} images", [median(work, given.seconds) for work in row])
    for device in found[1:]:
        seconds = median(copying(device), given.seconds)
        console.print(f"copying 60,000 images to {device}: {told(seconds)}, once; then they stay there")
    console.print(table)


def product(size: int, device: torch.device) -> Callable[[], object]:
    """A matrix product to be timed."""
    a, b = torch.rand(2, size, size, device=device)
    return lambda: a @ b


def step(batch: int, device: torch.device) -> Callable[[], object]:
    """Forward, backward and one step of Adam, as `python -m trainer train` does it, on images of noise."""
    images = torch.randint(256, (batch, 1, 28, 28), dtype=torch.uint8, device=device)
    noise = Split(images, torch.randint(10, (batch,), device=device))
    config = TrainConfig(batch_size=batch, epochs=100_000, optimiser="adam", schedule="constant")
    epochs = Training(build(config).to(device), noise, None, config).epochs()
    return lambda: next(epochs)  # an epoch of one step


def copying(device: torch.device) -> Callable[[], object]:
    """The way of a training set to a device, to be timed."""
    images = torch.zeros(60_000, 1, 28, 28, dtype=torch.uint8)
    return lambda: images.to(device)


def median(work: Callable[[], object], seconds: float) -> float:
    """The median time of `work`, after a first time that is not counted.

    A GPU is told what to do and works on while Python goes on: without waiting for it, only the telling is timed.
    """
    times: list[float] = []
    work()
    while not times or sum(times) < seconds:
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait() -> None:
    """Until the GPU has done all that it was told, where there is one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def told(seconds: float) -> str:
    """A time in the unit that it reads best in."""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def add(table: Table, what: str, seconds: list[float]) -> None:
    """A row: the times, and how many times faster than the first the last is."""
    table.add_row(what, *map(told, seconds), *([f"{seconds[0] / seconds[-1]:.1f} x"] if len(seconds) > 1 else []))


if __name__ == "__main__":
    main()
