"""Train and evaluate: tensors in, metrics out; no files, no printing."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from serving.backends.cuda import device_problem
from serving.errors import DeviceError
from trainer.config import TrainConfig
from trainer.data import Split

EVALUATION_BATCH = 200  # on a CPU, larger activations fall out of the cache: 1000 takes half as long again


@dataclass(frozen=True)
class EpochMetrics:
    """What one pass over the training set gave."""

    epoch: int  # from 1
    train_loss: float  # mean cross-entropy over the epoch, nats
    validation_loss: float
    validation_accuracy: float
    learning_rate: float  # of the epoch's last step
    seconds: float  # of training, validation not counted
    images_per_s: float


def select_device(spec: str) -> tuple[torch.device, str]:
    """The device to train on and why.

    Args:
        spec: `auto`, `cpu`, `mps`, `cuda` or `cuda:N`; only `auto` falls back.

    Raises:
        DeviceError: the device named is not here; the text has the cause.
    """
    kind, _, index = spec.partition(":")
    if kind == "cpu":
        return torch.device("cpu"), "asked for"
    cuda_problem = device_problem(int(index or 0))
    if cuda_problem is None and not torch.cuda.is_available():
        cuda_problem = f"torch {torch.__version__} (built for CUDA {torch.version.cuda}) finds no CUDA device"
    if kind == "cuda":
        if cuda_problem:
            raise DeviceError(cuda_problem)
        return torch.device("cuda", int(index or 0)), "asked for"
    mps = torch.backends.mps.is_available()
    if kind == "mps":
        if not mps:
            raise DeviceError("mps: torch finds no Apple GPU here; use --device auto or cpu")
        return torch.device("mps"), "asked for"
    if cuda_problem is None:
        return torch.device("cuda", 0), "auto: the driver offers it and torch uses it"
    if mps:
        return torch.device("mps"), "auto: an Apple GPU"
    return torch.device("cpu"), f"auto: {cuda_problem}"


def set_deterministic() -> None:
    """Have torch use, in the whole process, fp32 without TF32, and algorithms that give the same bits every time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # missing in the stubs
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def build(network: type[nn.Module], seed: int, **arguments: float) -> nn.Module:
    """A network whose initial weights depend on `seed` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network(**arguments)


def fit(
    network: nn.Module,
    train: Split,
    validation: Split,
    config: TrainConfig,
    on_step: Callable[[int], None] = lambda _: None,
) -> Iterator[EpochMetrics]:
    """Train `network` in place with AdamW and the one-cycle schedule; yields metrics after every epoch.

    Args:
        network: on the device where it is trained.
        train: on the same device.
        validation: on the same device; only measured, never learned from.
        config: how; its device and dataset are not looked at.
        on_step: called after every step with its number of images.
    """
    device = train.labels.device
    generator = torch.Generator().manual_seed(config.seed)  # on the CPU: the same order of images on every device
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=device.type != "mps"
    )
    steps = -(-len(train) // config.batch_size)
    warm_up = config.warm_up
    if math.isclose(warm_up * steps * config.epochs, 1):  # torch's schedule divides by how far this is from 1
        warm_up *= 1 - 1e-6
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        max_lr=config.learning_rate,
        total_steps=steps * config.epochs,
        pct_start=warm_up,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    for epoch in range(1, config.epochs + 1):
        start = time.perf_counter()
        network.train()
        total_loss = torch.zeros((), device=device)  # summed on the device: reading it every step would wait for it
        order = torch.randperm(len(train), generator=generator).to(device)
        for indices in order.split(config.batch_size):
            loss = functional.cross_entropy(network(train.images[indices]), train.labels[indices])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            learning_rate = float(schedule.get_last_lr()[0])
            schedule.step()
            total_loss += loss.detach() * len(indices)
            on_step(len(indices))
        train_loss = total_loss.item() / len(train)
        seconds = time.perf_counter() - start
        validation_loss, accuracy = evaluate(network, validation)
        yield EpochMetrics(
            epoch=epoch,
            train_loss=train_loss,
            validation_loss=validation_loss,
            validation_accuracy=accuracy,
            learning_rate=learning_rate,
            seconds=seconds,
            images_per_s=len(train) / seconds,
        )


def evaluate(network: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy from 0 to 1 over a split on the network's device."""
    logits = predict(network, split.images)
    loss = functional.cross_entropy(logits, split.labels).item()
    accuracy = (logits.argmax(dim=1) == split.labels).float().mean().item()
    return loss, accuracy


def predict(network: nn.Module, images: torch.Tensor, batch_size: int = EVALUATION_BATCH) -> torch.Tensor:
    """Logits float32 [N, 10] of images uint8 [N, 1, 28, 28], in batches."""
    network.eval()
    with torch.inference_mode():
        return torch.cat([network(batch) for batch in images.split(batch_size)])
