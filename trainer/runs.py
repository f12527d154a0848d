"""A training from its configuration to its checkpoint files; can be resumed. No printing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from trainer import data
from trainer.checkpoint import Checkpoint, CheckpointError, load, save
from trainer.config import TrainConfig
from trainer.data import Dataset, Split
from trainer.devices import select_device, set_deterministic
from trainer.models import Network
from trainer.processes import ALONE, Processes, device_spec
from trainer.train import EpochMetrics, Training, build, evaluate


@dataclass(frozen=True)
class Files:
    """The files of a training, named after that of its result."""

    result: Path  # the finished network, for `export`

    @property
    def last(self) -> Path:
        """What to resume from: written after every epoch."""
        return self.result.with_suffix(f".last{self.result.suffix}")

    @property
    def best(self) -> Path:
        """The weights of the best epoch by validation; `export` takes them too."""
        return self.result.with_suffix(f".best{self.result.suffix}")


@dataclass(frozen=True)
class Watcher:
    """Who is told how a training goes; every call is optional."""

    on_start: Callable[[Network, torch.device, str, int, int], None] = lambda *_: None
    """The network, its device and why, the epochs that are done already, the images of one epoch."""
    on_step: Callable[[int], None] = lambda _: None
    on_epoch: Callable[[EpochMetrics], None] = lambda _: None


@dataclass(frozen=True)
class Prepared:
    """A training before its first epoch."""

    training: Training
    network: Network  # the one that is trained, on `device`
    device: torch.device
    why: str  # that device
    fitting: Split  # what is trained on, where it waits for its turn
    validation: Split | None  # on `device`


def run(
    config: TrainConfig,
    splits: tuple[Split, Split],
    files: Files,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    processes: Processes = ALONE,
) -> Checkpoint:
    """Train, and write `files`; the test set is looked at once, at the end.

    Args:
        config: all options.
        splits: the whole training set and the test set, on the CPU.
        files: where the checkpoints go.
        resume: go on from `files.last` instead of starting anew.
        watcher: who is told.
        processes: that train together; each calls this, the first one writes.

    Returns:
        What `files.result` holds.

    Raises:
        CheckpointError: there is nothing to resume, or it is of another training.
        DeviceError: the device cannot be used.
        ValueError: there are fewer images than asked for.
    """
    watcher = watcher or Watcher()
    state = load(files.last).check_resumable(config, processes.count) if resume else None
    prepared = prepare(config, splits[0], watcher.on_step, processes)
    training, network, device = prepared.training, prepared.network, prepared.device
    if state is not None:
        training.load_state_dict(state)
    watcher.on_start(network, device, prepared.why, len(training.history), training.epoch_images)
    for metrics in training.epochs():
        _save_epoch(training, config, files, processes)
        watcher.on_epoch(metrics)
    weights = training.result()
    network.load_state_dict(weights)
    processes.agree(network)
    _, accuracy = evaluate(network, splits[1].to(device), processes)
    history = [asdict(metrics) for metrics in training.history]
    finished = Checkpoint(config.model_dump(mode="json"), weights, history, accuracy, len(splits[1]))
    if processes.first:
        save(finished, files.result)
    return finished


def prepare(
    config: TrainConfig,
    train: Split,
    on_step: Callable[[int], None] = lambda _: None,
    processes: Processes = ALONE,
) -> Prepared:
    """Choose the device, divide the training set, which is on the CPU, and build the network.

    Raises:
        DeviceError: the device cannot be used.
        ValueError: there are fewer images than asked for.
    """
    device, why = select_device(device_spec(config.device, processes))
    set_deterministic(config.deterministic, config.compile)
    fitting, validation = divide(train, config)
    fitting, validation = place(fitting, device, config.stream), validation and validation.to(device)
    pixels = pixel_statistics(config, data.DATASETS[config.dataset])
    network = build(config, config.seed, init=config.init, **pixels).to(device)
    training = Training(network, fitting, validation, config, on_step, processes)
    return Prepared(training, network, device, why, fitting, validation)


def divide(train: Split, config: TrainConfig) -> tuple[Split, Split | None]:
    """The images to train on and those for validation, None where there are to be none.

    Raises:
        ValueError: there are not enough.
    """
    validation = None
    if config.validation_images:
        train, validation = data.split_validation(train, config.validation_images, config.seed)
    if config.train_images > len(train):
        raise ValueError(f"--train-images: got {config.train_images}, want at most {len(train)}")
    if config.train_images:
        train = train.take(torch.arange(config.train_images))
    return train, validation


def place(split: Split, device: torch.device, stream: bool) -> Split:
    """The images to train on where they wait for their turn: on the device, or in main memory."""
    return split if stream else split.to(device)


def pixel_statistics(config: TrainConfig, dataset: Dataset) -> dict[str, float]:
    """`mean` and `std` of the network's normalisation."""
    if config.normalise == "unit":
        return {"mean": 0.0, "std": 255.0}
    return {"mean": dataset.mean, "std": dataset.std}


def _save_epoch(training: Training, config: TrainConfig, files: Files, processes: Processes) -> None:
    """Write the best weights first: the state in `last` must not speak of a best that is not there."""
    state = training.state_dict()
    if not processes.first:
        return
    training_options = config.model_dump(mode="json")
    checkpoint = Checkpoint(training_options, training.current(), state["history"])
    if training.best_epoch == len(training.history):
        save(checkpoint, files.best)
    save(Checkpoint(training_options, checkpoint.weights, state["history"], state=state), files.last)


def saved_options(files: Files) -> dict[str, object]:
    """The options of the training that can be resumed.

    Raises:
        CheckpointError: there is none.
    """
    if not files.last.exists():
        raise CheckpointError(f"nothing to resume: {files.last} is missing; train without --resume")
    return load(files.last).training
