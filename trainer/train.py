"""Train and evaluate: tensors in, metrics out; no files, no printing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from trainer import augment, optim
from trainer.average import Average
from trainer.config import NetworkConfig, TrainConfig
from trainer.data import Split
from trainer.models import Network
from trainer.processes import ALONE, Processes

EVALUATION_BATCH = 200  # on a CPU, larger activations fall out of the cache: 1000 takes half as long again

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EpochMetrics:
    """What one pass over the training set gave."""

    epoch: int  # from 1
    train_loss: float  # mean over the epoch of cross-entropy, with the labels smoothed if so asked, nats
    train_accuracy: float  # while training: of images as augmented, by a network that is still changing
    validation_loss: float | None  # None without validation images, as the accuracy
    validation_accuracy: float | None
    learning_rate: float  # of the epoch's last step
    seconds: float  # of training, validation not counted
    images_per_s: float


def build(config: NetworkConfig | None = None, seed: int = 0, *, init: str = "default", **pixels: float) -> Network:
    """A network whose initial weights depend on `seed` alone; torch's global generator is left as it was.

    Args:
        config: its form, that of `cnn` when not given.
        seed: of the weights.
        init: how they are drawn, as `TrainConfig.init`.
        pixels: `mean` and `std`; see `Network`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(config, **pixels)
        optim.initialise(network, init)
        return network


def fit(
    network: Network,
    train: Split,
    validation: Split | None,
    config: TrainConfig,
    on_step: Callable[[int], None] = lambda _: None,
) -> Iterator[EpochMetrics]:
    """Train `network` in place, and yield metrics after every epoch; see `Training`, which can be interrupted."""
    training = Training(network, train, validation, config, on_step)
    yield from training.epochs()
    network.load_state_dict(training.result())


class Training:
    """A network on its way from initial to trained weights, epoch by epoch; it can be saved between epochs.

    It seeds torch's global generators, from which dropout draws.
    """

    def __init__(
        self,
        network: Network,
        train: Split,
        validation: Split | None,
        config: TrainConfig,
        on_step: Callable[[int], None] = lambda _: None,
        processes: Processes = ALONE,
    ) -> None:
        """Get ready for the first epoch.

        Args:
            network: on the device where it is trained.
            train: on the same device; or, to be moved there by batches, on the CPU.
            validation: on the same device; only measured, never learned from.
            config: how; its device and dataset are not looked at.
            on_step: called after every step with its number of images, those of all processes.
            processes: that train together; the global batch is `config.batch_size` however many there are.

        Raises:
            ValueError: batch normalisation would be given a batch of one image, there are fewer images than an epoch
                is to have, or several processes are to find the hardest.
        """
        self.epoch_images = config.epoch_images or len(train)
        _check(len(train), self.epoch_images, config, processes.count)
        self._network, self._train, self._validation, self._config = network, train, validation, config
        self._on_step, self._processes = on_step, processes
        self._device = network.mean.device
        if not config.channels_last:
            network.to(memory_format=torch.contiguous_format)
        if config.stem != "trained":
            self._freeze_stem()
        torch.manual_seed(config.seed + processes.rank)
        # The order is drawn on the CPU, and by every process alike: the same on every device, for any number of them.
        self._order = torch.Generator().manual_seed(config.seed)
        self._changes = torch.Generator(self._device).manual_seed(config.seed + processes.rank)
        model = processes.wrap(network)
        self._model = cast(nn.Module, torch.compile(model)) if config.compile else model
        self._average = Average(network, config.ema) if config.ema else None
        self._penalised = optim.penalised(network)
        self._optimiser = optim.make_optimiser(optim.trained(network), config, self._device)
        self._left = torch.empty(0, dtype=torch.int64)  # in the order drawn, the images that no epoch has had yet
        steps = [-(-self.epoch_images // self._batch_size(epoch)) for epoch in (0, 1)]
        self._first_steps, self._steps = steps
        self._schedule = optim.Schedule(self._optimiser, config, self._steps, self._first_steps)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=config.precision == "fp16")
        self._best_weights: dict[str, torch.Tensor] | None = None
        self.history: list[EpochMetrics] = []
        self.best_epoch = 0  # from 1; by validation accuracy, then loss

    @property
    def finished(self) -> bool:
        """Whether no epoch is left, or early stopping has ended the training."""
        config, epoch = self._config, len(self.history)
        return epoch >= config.epochs or bool(
            config.early_stopping and epoch - self.best_epoch >= config.early_stopping
        )

    def epochs(self) -> Iterator[EpochMetrics]:
        """Train on until finished."""
        while not self.finished:
            yield self._epoch()

    def result(self) -> dict[str, torch.Tensor]:
        """The weights to keep: their average if there is one, of the last epoch or the best, as `config.keep` says."""
        return self._best_weights if self._best_weights is not None else _copy(self._measured)

    def current(self) -> dict[str, torch.Tensor]:
        """The weights that the latest epoch's validation measured."""
        return _copy(self._measured)

    def state_dict(self) -> dict[str, Any]:
        """All that the epochs to come depend on; of the same shape in every process, which must all ask."""
        return {
            "network": self._network.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": self._average.state_dict() if self._average else None,
            "best_weights": self._best_weights,
            "best_epoch": self.best_epoch,
            "history": [asdict(metrics) for metrics in self.history],
            "random": self._processes.gather(self._random_state()),
            "left": self._left,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly from `state_dict` of a training with the same arguments."""
        self._network.load_state_dict(state["network"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        if self._average:
            self._average.load_state_dict(state["average"])
        self._best_weights, self.best_epoch = state["best_weights"], state["best_epoch"]
        self.history = [EpochMetrics(**metrics) for metrics in state["history"]]
        self._left = state["left"]
        random = state["random"][self._processes.rank]
        self._order.set_state(random["order"])
        self._changes.set_state(random["changes"])
        torch.set_rng_state(random["global"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self._device)

    def _random_state(self) -> dict[str, torch.Tensor]:
        state = {
            "order": self._order.get_state(),
            "changes": self._changes.get_state(),
            "global": torch.get_rng_state(),
        }
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    @property
    def _measured(self) -> Network:
        return cast(Network, self._average.network) if self._average else self._network

    def _epoch(self) -> EpochMetrics:
        start = time.perf_counter()
        images, epoch = self.epoch_images, len(self.history)
        self._network.train()
        # Summed on the device: reading the loss at every step would wait for it.
        totals = torch.zeros(2, device=self._device)
        step = self._first_steps + (epoch - 1) * self._steps if epoch else 0
        for indices in self._next_images().to(self._train.labels.device).split(self._batch_size(epoch)):
            self._schedule.before_step(step)
            self._step(indices, totals)
            step += 1
            self._on_step(len(indices))
        loss, correct = self._processes.add(totals).tolist()
        seconds = time.perf_counter() - start
        self._processes.agree(self._measured)
        validation = evaluate(self._measured, self._validation, self._processes) if self._validation else (None, None)
        self._schedule.after_epoch(validation[0])
        metrics = EpochMetrics(
            epoch=epoch + 1,
            train_loss=loss / images,
            train_accuracy=correct / images,
            validation_loss=validation[0],
            validation_accuracy=validation[1],
            learning_rate=self._schedule.learning_rate,
            seconds=seconds,
            images_per_s=images / seconds,
        )
        self._note(metrics)
        return metrics

    def _step(self, indices: torch.Tensor, totals: torch.Tensor) -> None:
        """One step on the images at `indices`; adds its loss and number of right answers to `totals`."""
        config = self._config
        images, labels = self._batch(self._processes.share(indices))
        if config.flip or config.shift or config.erase:
            images = augment.augment(images, config, self._changes)
        size, choosing = len(indices), config.hardest < 1 and bool(self.history)
        if choosing:
            images, labels = self._hardest(images, labels, totals)
            size = len(labels)
        with self._precision():
            logits = self._model(images)
        summed = functional.cross_entropy(
            logits.float(), labels, reduction="sum", label_smoothing=config.label_smoothing
        )
        # The processes' gradients are averaged: so each loss is that of its images, as if there were as many of all.
        loss = summed * (self._processes.count / size)
        if config.l1 or config.l2:
            loss = loss + optim.penalty(self._penalised, config.l1, config.l2)
        self._optimiser.zero_grad()
        self._scaler.scale(loss).backward()
        if config.clip_norm:
            self._scaler.unscale_(self._optimiser)
            nn.utils.clip_grad_norm_(self._network.parameters(), config.clip_norm)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        if self._average:
            self._average.update()
        if not choosing:
            totals += torch.stack([summed.detach(), (logits.detach().argmax(1) == labels).sum()])

    @torch.no_grad()
    def _hardest(
        self, images: torch.Tensor, labels: torch.Tensor, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a batch, the share with the largest losses; adds the loss and right answers of all to `totals`."""
        config = self._config
        with self._precision():
            logits = self._model(images)
        losses = functional.cross_entropy(
            logits.float(), labels, reduction="none", label_smoothing=config.label_smoothing
        )
        totals += torch.stack([losses.sum(), (logits.argmax(1) == labels).sum()])
        chosen = losses.topk(max(1, round(config.hardest * len(labels)))).indices
        return images[chosen], labels[chosen]

    def _batch_size(self, epoch: int) -> int:
        """How many images a step looks at, in an epoch counted from 0."""
        return round(self._config.batch_size / self._config.hardest) if epoch else self._config.batch_size

    def _next_images(self) -> torch.Tensor:
        """The images of the next epoch, in their order: int64 [epoch_images]."""
        images = len(self._train)
        while len(self._left) < self.epoch_images:
            order = torch.randperm(images, generator=self._order) if self._config.shuffle else torch.arange(images)
            self._left = torch.cat([self._left, order])
        now, self._left = self._left[: self.epoch_images], self._left[self.epoch_images :].clone()
        return now

    def _freeze_stem(self) -> None:
        """Have the first convolution as it is to stay."""
        layer = next(layer for layer in self._network.features if isinstance(layer, nn.Conv2d))
        layer.requires_grad_(False)
        if self._config.stem == "whitened":
            pixels = self._train.images[: optim.WHITENING_IMAGES].to(self._device)
            generator = torch.Generator().manual_seed(self._config.seed)
            optim.whiten(layer, self._network.normalise(pixels), generator)

    def _batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self._train.take(indices)
        if batch.labels.device != self._device:
            if self._device.type == "cuda":  # from pinned memory the copy need not be waited for
                batch = Split(batch.images.pin_memory(), batch.labels.pin_memory())
            batch = batch.to(self._device)
        return batch.images, batch.labels

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if self._config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, _DTYPES[self._config.precision])

    def _note(self, metrics: EpochMetrics) -> None:
        """Remember an epoch, and its weights if they are the best so far and are to be kept."""
        self.history.append(metrics)
        if metrics.validation_accuracy is None:
            return
        best = self.history[self.best_epoch - 1]
        if not self.best_epoch or _merit(metrics) > _merit(best):
            self.best_epoch = metrics.epoch
            if self._config.keep == "best":
                self._best_weights = self.current()


def _check(images: int, epoch_images: int, config: TrainConfig, processes: int) -> None:
    """What only the number of images and processes tells; raises ValueError."""
    if epoch_images > images:
        raise ValueError(f"--epoch-images: got {epoch_images}, want at most {images}")
    if config.hardest < 1 and processes > 1:
        raise ValueError(f"--hardest compares all images of a step, and {processes} processes share them here")
    last = epoch_images % config.batch_size or config.batch_size
    if config.batch_norm and min(last, epoch_images) // processes < 2:
        shared = f", shared by {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"--batch-norm needs 2 images at least, and the last of {epoch_images} images are a batch of "
            f"{last}{shared}; choose another --batch-size"
        )


def _merit(metrics: EpochMetrics) -> tuple[float, float]:
    assert metrics.validation_accuracy is not None, "compared only where validation was measured"
    assert metrics.validation_loss is not None, "measured with the accuracy"
    return metrics.validation_accuracy, -metrics.validation_loss


def _copy(network: nn.Module) -> dict[str, torch.Tensor]:
    """A network's weights on the CPU, laid out as usual."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in network.state_dict().items()
    }


def evaluate(network: nn.Module, split: Split, processes: Processes = ALONE) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy from 0 to 1 over a split on the network's device.

    Several processes, which must all ask, measure a part each.
    """
    images, labels = processes.share(split.images), processes.share(split.labels)
    logits = predict(network, images)
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    totals = processes.add(torch.stack([loss, (logits.argmax(dim=1) == labels).sum()]))
    total_loss, correct = totals.tolist()
    return total_loss / len(split), correct / len(split)


def predict(network: nn.Module, images: torch.Tensor, batch_size: int = EVALUATION_BATCH) -> torch.Tensor:
    """Logits float32 [N, 10] of images uint8 [N, 1, 28, 28], in batches."""
    network.eval()
    with torch.inference_mode():
        return torch.cat([network(batch) for batch in images.split(batch_size)])
