"""A process that searches on the sample, for tests that kill it or start several: python search_on_sample.py JSON.

The JSON has `space`, the path of a file, `options` of TrainConfig, `study` and `trials`. It prints a line when it is in
its first trial, and waits there for a line from its standard input.
"""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from trainer import search, space
from trainer.data import Split

SAMPLE = Path(__file__).parent / "data" / "fashion-sample.npz"


def main(order):
    with np.load(SAMPLE) as arrays:
        train = Split(torch.tensor(arrays["train_images"]).unsqueeze(1), torch.tensor(arrays["train_labels"]).long())
    waited = False

    def on_start(number, images):
        nonlocal waited
        if not waited:
            print(number, flush=True)
            sys.stdin.readline()
            waited = True

    study = search.Search(space.plan(order["space"], order["options"]), Path(order["study"]))
    with contextlib.closing(study):
        study.run(train, order["trials"], search.Watcher(on_start=on_start))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
