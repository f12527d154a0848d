"""Optimiser, learning rates, initial weights and penalties, from their names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from trainer.config import TrainConfig

# Of the largest rate, where a one-cycle schedule begins and ends: torch's defaults.
ONECYCLE_START = 1 / 25
ONECYCLE_END = ONECYCLE_START / 1e4

WHITENING_IMAGES = 1000
WHITENING_EPS = 1e-2  # added to variances, of pixels whose own is 1: the smallest components are noise


def initialise(network: nn.Module, init: str) -> None:
    """Draw the weights of convolutions and linear layers anew, from torch's global generator; biases become 0.

    Args:
        network: its normalisation layers are left as they are.
        init: as `TrainConfig.init`; `default` leaves everything as torch made it. With fan_in and fan_out the inputs
            and outputs of one number of a layer, the variance is 2 / (fan_in + fan_out) for xavier, 2 / fan_in for
            kaiming, and 1 / fan_in for lecun.
    """
    if init == "default":
        return
    scheme, _, distribution = init.partition("-")
    for layer in network.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        fan_in = layer.weight[0].numel()
        fan_out = layer.weight.numel() // layer.weight.shape[1]
        variance = {"xavier": 2 / (fan_in + fan_out), "kaiming": 2 / fan_in, "lecun": 1 / fan_in}[scheme]
        if distribution == "normal":
            nn.init.normal_(layer.weight, std=math.sqrt(variance))
        else:
            bound = math.sqrt(3 * variance)
            nn.init.uniform_(layer.weight, -bound, bound)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def whiten(layer: nn.Conv2d, images: torch.Tensor, generator: torch.Generator) -> None:
    """Set a convolution's weights so that its outputs are decorrelated, with a variance of 1; biases become 0.

    The filters are the principal components of the images' patches, each divided by its deviation; the same with the
    other sign, since what follows cuts off the negative; and random mixtures of them.

    Args:
        layer: of one input channel.
        images: float32 [N, 1, H, W], as the layer gets them.
        generator: on the CPU, for the mixtures.
    """
    side, count = layer.kernel_size[0], layer.out_channels
    patches = images.unfold(2, side, 1).unfold(3, side, 1).reshape(-1, side * side).cpu()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    components = (vectors / (values + WHITENING_EPS).sqrt()).T.flip(0)  # the largest first
    mixtures = torch.randn(count, side * side, generator=generator)
    mixtures = mixtures / mixtures.norm(dim=1, keepdim=True) @ components
    filters = torch.cat([components, -components, mixtures])[:count]
    layer.weight.copy_(filters.reshape(layer.weight.shape))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def make_optimiser(
    parameters: Iterable[nn.Parameter], config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The optimiser that `config` names, in its fused form where torch has one."""
    arguments: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    fused = {"fused": device.type != "mps"}
    match config.optimiser:
        case "sgd":
            arguments |= {"momentum": config.momentum, "nesterov": config.nesterov, **fused}
            return torch.optim.SGD(parameters, **arguments)
        case "rmsprop":
            arguments |= {"momentum": config.momentum, "centered": config.centered}
            return torch.optim.RMSprop(parameters, alpha=config.alpha, eps=config.eps, **arguments)
        case "adam" | "adamw":
            kind = torch.optim.Adam if config.optimiser == "adam" else torch.optim.AdamW
            return kind(parameters, betas=(config.beta1, config.beta2), eps=config.eps, **arguments, **fused)


def rate_factor(config: TrainConfig, step: int, steps_per_epoch: int, in_first: int | None = None) -> float:
    """What the largest learning rate is multiplied by at a step, counted from 0; 1 for `constant` and `plateau`.

    `in_first` is the number of steps in the first epoch, where it has another than the rest.
    """
    in_first = in_first or steps_per_epoch
    if config.schedule == "step":
        epoch = 0 if step < in_first else 1 + (step - in_first) // steps_per_epoch
        return float(config.decay ** (epoch // config.step_epochs))
    if config.schedule not in ("cosine", "onecycle"):
        return 1.0
    steps = in_first + (config.epochs - 1) * steps_per_epoch
    peak = max(0.0, config.warm_up * steps - 1)  # the step with the largest rate
    if step < peak:
        return ONECYCLE_START + (1 - ONECYCLE_START) * step / peak
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * (step - peak) / (steps - peak))) / 2
    if step >= steps - 1:
        return ONECYCLE_END if steps > 1 else 1.0
    return 1 + (ONECYCLE_END - 1) * (step - peak) / (steps - 1 - peak)


class Schedule:
    """Sets an optimiser's learning rate before every step."""

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        config: TrainConfig,
        steps_per_epoch: int,
        in_first: int | None = None,
    ) -> None:
        """As `rate_factor`."""
        self._optimiser, self._config = optimiser, config
        self._steps = (steps_per_epoch, in_first)
        self._plateau: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        if config.schedule == "plateau":
            self._plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimiser, factor=config.decay, patience=config.patience
            )

    @property
    def learning_rate(self) -> float:
        """The rate of the latest step."""
        return float(self._optimiser.param_groups[0]["lr"])

    def before_step(self, step: int) -> None:
        """Set the rate of a step, counted from 0 over all epochs."""
        if self._plateau is None:
            rate = self._config.learning_rate * rate_factor(self._config, step, *self._steps)
            for group in self._optimiser.param_groups:
                group["lr"] = rate

    def after_epoch(self, validation_loss: float | None) -> None:
        """Have `plateau` look at an epoch's validation loss."""
        if self._plateau is not None and validation_loss is not None:
            self._plateau.step(validation_loss)

    def state_dict(self) -> dict[str, Any]:
        """What `plateau` remembers; the others depend on the step alone."""
        return self._plateau.state_dict() if self._plateau else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        if self._plateau:
            self._plateau.load_state_dict(state)


def penalty(weights: Sequence[torch.Tensor], l1: float, l2: float) -> torch.Tensor:
    """`l1` times the sum of the weights' absolute values, and `l2` times that of their squares: float32 []."""
    total = torch.zeros((), device=weights[0].device)
    if l1:
        total = total + l1 * torch.stack([weight.abs().sum() for weight in weights]).sum()
    if l2:
        total = total + l2 * torch.stack([weight.square().sum() for weight in weights]).sum()
    return total


def trained(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def penalised(network: nn.Module) -> list[torch.Tensor]:
    """The weights that a penalty counts: those of convolutions and linear layers; neither biases nor scales."""
    return [parameter for parameter in trained(network) if parameter.dim() > 1]
