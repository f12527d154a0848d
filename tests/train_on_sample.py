"""A process that trains on the sample, for tests that kill it or start several: python train_on_sample.py JSON.

The JSON has `options` of TrainConfig, `checkpoint`, and perhaps `resume`, `kill_after_epoch` or `kill_at_step`, which
ends this process as SIGKILL does.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from trainer import processes, runs
from trainer.config import TrainConfig
from trainer.data import Split

SAMPLE = Path(__file__).parent / "data" / "fashion-sample.npz"


def main(order):
    with np.load(SAMPLE) as arrays:
        splits = tuple(
            Split(torch.tensor(arrays[f"{part}_images"]).unsqueeze(1), torch.tensor(arrays[f"{part}_labels"]).long())
            for part in ("train", "test")
        )
    steps = 0

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def on_step(images):
        nonlocal steps
        steps += 1
        if steps == order.get("kill_at_step"):
            die()

    def on_epoch(metrics):
        print(f"epoch {metrics.epoch}", flush=True)
        if metrics.epoch == order.get("kill_after_epoch"):
            die()

    config = TrainConfig(**order["options"])
    with processes.join(config.device) as together:
        files = runs.Files(Path(order["checkpoint"]))
        watcher = runs.Watcher(on_step=on_step, on_epoch=on_epoch if together.first else lambda _: None)
        runs.run(config, splits, files, resume=order.get("resume", False), watcher=watcher, processes=together)
    left = {name for name in threads() if "gloo" in name}
    if left:  # now and then they would abort the process at its end
        sys.exit(f"threads outlive the group of processes: {', '.join(sorted(left))}")


def threads():
    """The names of this process's threads, those of C++ among them; on Linux."""
    tasks = Path("/proc/self/task")
    return [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.exists() else []


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
