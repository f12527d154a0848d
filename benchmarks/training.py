"""How long a recipe trains, and how well, over several seeds; beside the loop that courses teach, if asked.

    python -m benchmarks.training --recipe fast --seeds 5 --course
    python -m benchmarks.training --recipe best-fashion --seeds 5

Seconds are from before the first byte of data is read to after the last step of training; interpreter start, imports
and tests are not in them. Every run is a process of its own. The course's loop (torchvision's data set and transforms
item by item, a DataLoader, the `cnn` network, Adam with 1e-3, batches of 64) is trained until the first epoch that ends
with the accuracy wanted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from serving.errors import ParityserveError
from trainer import sources

if TYPE_CHECKING:
    from trainer.config import TrainConfig

MOST_EPOCHS = 20  # of the course's loop
RECIPE, COURSE = "recipe", "course"


@dataclass(frozen=True)
class Run:
    """What one training came to."""

    kind: str  # RECIPE or COURSE
    seed: int
    seconds: float
    epochs: int
    test_accuracy: float  # 0 to 1
    parameters: int


def main(arguments: list[str] | None = None) -> int:
    """Train, print a table and the means; 1 where the course's loop did not get to the accuracy wanted."""
    options = _parser().parse_args(arguments)
    try:
        config = sources.resolve({"dataset": options.dataset} if options.dataset else {}, options.recipe)
        if options.one:
            print(json.dumps(asdict(_train_one(options.one, config, options.first_seed, options.target))))
            return 0
    except (ParityserveError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False)
    runs: list[Run] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        kinds = [RECIPE, COURSE] if options.course and seed < options.first_seed + options.course_seeds else [RECIPE]
        for kind in kinds:  # in turn: drift of the machine falls on both
            with console.status(f"training: {kind}, seed {seed}"):
                runs.append(_in_a_process(kind, seed, options))
            console.print(_line(runs[-1]))
    _print(runs, options, console)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": describe(), "recipe": options.recipe, "runs": [asdict(run) for run in runs]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(run.kind == COURSE and run.test_accuracy < options.target for run in runs))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=sources.recipes(), help="(default: the default options)")
    parser.add_argument("--dataset", choices=["mnist", "fashion-mnist"], help="(default: the recipe's)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="trainings (default: 5)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="(default: 0)")
    parser.add_argument("--course", action="store_true", help="train the course's loop on MNIST too, in turn")
    parser.add_argument("--course-seeds", type=int, default=1, metavar="N", help="of the course's loop (default: 1)")
    parser.add_argument("--target", type=float, default=0.99, help="accuracy of the course's loop (default: 0.99)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    parser.add_argument(
        "--one", choices=[RECIPE, COURSE], help=argparse.SUPPRESS
    )  # what the processes are started with
    return parser


def _in_a_process(kind: str, seed: int, options: argparse.Namespace) -> Run:
    """One training, in a fresh process.

    Raises:
        CalledProcessError: it failed; its own words are on stderr.
    """
    command = [sys.executable, "-m", "benchmarks.training", "--one", kind, "--first-seed", str(seed)]
    command += ["--target", str(options.target)]
    command += ["--recipe", options.recipe] if options.recipe else []
    command += ["--dataset", options.dataset] if options.dataset else []
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Run(**json.loads(output.splitlines()[-1]))


def _train_one(kind: str, config: TrainConfig, seed: int, target: float) -> Run:
    import torch._dynamo  # noqa: F401  # torch does so when the first optimiser is made: imports are not measured

    from trainer import data

    folder = data.default_data_dir()
    dataset = data.DATASETS["mnist" if kind == COURSE else config.dataset]
    data.obtain(dataset, folder)  # so that no download is measured
    if kind == COURSE:
        return _course(folder / dataset.name, seed, target)
    return _recipe(config.model_copy(update={"seed": seed}), folder)


def _recipe(config: TrainConfig, folder: Path) -> Run:
    """Train as `python -m trainer train` does."""
    from trainer import data, memory, models, runs

    memory.keep_freed_memory()
    end = start = time.perf_counter()

    def on_step(_: int) -> None:
        nonlocal end
        end = time.perf_counter()

    with tempfile.TemporaryDirectory() as place:
        splits = data.load(data.DATASETS[config.dataset], folder)
        trained = runs.run(config, splits, runs.Files(Path(place) / "net.pt"), watcher=runs.Watcher(on_step=on_step))
    assert trained.test_accuracy is not None, "a training that is finished has been tested"
    parameters = models.count_parameters(trained.build())
    return Run(RECIPE, config.seed, end - start, len(trained.history), trained.test_accuracy, parameters)


def _course(files: Path, seed: int, target: float) -> Run:
    """The loop that courses teach, up to the first epoch that ends with `target` on the test set."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    from trainer.models import count_parameters

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root) / "MNIST" / "raw"  # where torchvision looks
        raw.mkdir(parents=True)
        for file in files.iterdir():
            (raw / file.name).symlink_to(file)
        start = time.perf_counter()
        train, test = (datasets.MNIST(root, train=kind, transform=transforms.ToTensor()) for kind in (True, False))
        loader, test_loader = DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=1000)
        network = nn.Sequential(
            *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(1600, 128), nn.ReLU(), nn.Linear(128, 10)),
        )
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
        criterion = nn.CrossEntropyLoss()
        seconds, epoch, accuracy = time.perf_counter() - start, 0, 0.0
        while accuracy < target and epoch < MOST_EPOCHS:
            start = time.perf_counter()
            for images, labels in loader:
                optimiser.zero_grad()
                criterion(network(images), labels).backward()
                optimiser.step()
            seconds += time.perf_counter() - start
            epoch += 1
            with torch.no_grad():
                right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in test_loader)
            accuracy = right / len(test)
    return Run(COURSE, seed, seconds, epoch, accuracy, count_parameters(network))


def _line(run: Run) -> str:
    return (
        f"{run.kind}, seed {run.seed}: {run.seconds:.2f} s, {run.epochs} epochs, test accuracy {run.test_accuracy:.2%}"
    )


def _print(runs: list[Run], options: argparse.Namespace, console: Console) -> None:
    """Means and sample standard deviations of each kind, and the ratio of the seconds."""
    table = Table("", "runs", "parameters", "epochs", "seconds", "test accuracy, %")
    means = {}
    for kind, name in ((RECIPE, options.recipe or "default options"), (COURSE, "the course's loop")):
        if some := [run for run in runs if run.kind == kind]:
            seconds = [run.seconds for run in some]
            means[kind] = statistics.mean(seconds)
            epochs = statistics.mean(run.epochs for run in some)
            accuracy = _spread([100 * run.test_accuracy for run in some])
            table.add_row(name, str(len(some)), f"{some[0].parameters:,}", f"{epochs:g}", _spread(seconds), accuracy)
    console.print(table)
    if COURSE in means:
        console.print(f"the course's loop takes {means[COURSE] / means[RECIPE]:.1f} times as long")


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    sys.exit(main())
