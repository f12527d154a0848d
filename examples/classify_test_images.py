"""Start a server, classify real test images through gRPC, print a table and draw a contact sheet.

python examples/classify_test_images.py --dataset mnist --output runs/mnist-contact-sheet.png
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.table import Table

from serving.client import Client, PredictResult
from trainer import data

mpl.use("Agg")  # no window: the picture goes into a file
from matplotlib import pyplot as plt

SHOWN = 15
BATCH = 500


@contextlib.contextmanager
def server(repository: Path, model: str) -> Iterator[str]:
    """Run `python -m serving serve` on a free port; gives its address once it is READY."""
    command = [sys.executable, "-m", "serving", "serve", "--port", "0", "--model", model]
    process = subprocess.Popen(
        [*command, "--repository", str(repository)], stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stderr is not None, "a pipe was asked for"
    try:
        for line in process.stderr:
            print(f"server: {line.rstrip()}")
            if "NOT READY on" in line:
                sys.exit("not every version may be served; the server says why above")
            if ready := re.search(r"READY on (\S+)$", line):
                yield ready[1]
                break
        else:
            sys.exit("the server did not start; it says why above")
    finally:
        process.terminate()
        for line in process.stderr:
            print(f"server: {line.rstrip()}")
        process.wait()


def main() -> None:
    """Classify the test set, and show some of it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--dataset", choices=sorted(data.DATASETS), default="mnist")
    options.add_argument("--repository", type=Path, default=Path("exported"))
    options.add_argument("--output", type=Path, default=Path("runs/contact-sheet.png"))
    options.add_argument("--data-dir", type=Path, default=data.default_data_dir())
    given = options.parse_args()

    dataset = data.DATASETS[given.dataset]
    try:
        test = data.load_test(dataset, given.data_dir)
    except data.DataError as error:
        sys.exit(f"error: {error}")
    images, labels = test.images.numpy(), test.labels.numpy()
    with server(given.repository, given.dataset) as address, Client(address) as client:
        shown = np.sort(np.random.default_rng(0).choice(len(images), SHOWN, replace=False))
        result = client.predict(images[shown])
        start = time.perf_counter()
        answers = [client.predict(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
        seconds = time.perf_counter() - start
    classes = np.array([prediction.class_id for answer in answers for prediction in answer.predictions])

    console = Console()
    console.print(_table(result, shown, labels[shown], dataset.labels))
    console.print(f"answered by {result.model} version {result.version}, {result.provider} on {result.device}")
    console.print(
        f"the whole test set through gRPC: {(classes == labels).mean():.2%} of {len(labels)} images right, "
        f"{len(labels) / seconds:,.0f} images/s in batches of {BATCH} over one connection"
    )
    given.output.parent.mkdir(parents=True, exist_ok=True)
    _draw(result, images[shown], labels[shown], dataset.labels, given.output)
    console.print(f"contact sheet: {given.output}")


def _table(result: PredictResult, indices: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> Table:
    table = Table("test image", "true label", "predicted", "probability", "", title="real test images, through gRPC")
    for index, label, prediction in zip(indices, labels, result.predictions, strict=True):
        verdict = "" if prediction.class_id == label else "[red]wrong[/red]"
        table.add_row(str(index), names[label], prediction.label, f"{prediction.probability:.2%}", verdict)
    return table


def _draw(result: PredictResult, images: np.ndarray, labels: np.ndarray, names: tuple[str, ...], path: Path) -> None:
    columns = 5
    figure, axes = plt.subplots(-(-len(images) // columns), columns, figsize=(10, 7.2), layout="constrained")
    for axis, image, label, prediction in zip(axes.flat, images, labels, result.predictions, strict=True):
        right = prediction.class_id == label
        axis.imshow(image[0], cmap="gray", vmin=0, vmax=255)
        axis.set_title(
            f"{prediction.label}  {prediction.probability:.1%}\ntrue: {names[label]}",
            color="darkgreen" if right else "crimson",
            fontsize=11,
        )
        axis.set_axis_off()
    figure.suptitle(
        f"{result.model} version {result.version}, {result.backend} with {result.provider} on {result.device}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
