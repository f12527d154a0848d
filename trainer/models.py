"""The network, and the form of it that is exported. Normalisation is inside, so no one downstream can get it wrong."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from trainer.config import CLASSES, NetworkConfig

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class MaxPool2d(nn.MaxPool2d):
    """Max-pooling that is quick where no gradient will go through it in training, as after a frozen convolution.

    torch's own always notes where each maximum was.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As torch's."""
        if not self.training or x.requires_grad or self.kernel_size != 2:
            return functional.max_pool2d(x, self.kernel_size)
        height, width = (size // 2 * 2 for size in x.shape[2:])
        rows = torch.maximum(x[:, :, 0:height:2], x[:, :, 1:height:2])
        return torch.maximum(rows[..., 0:width:2], rows[..., 1:width:2])


class GlobalAveragePool2d(nn.Module):
    """Each channel's mean over its pixels.

    Of torch's own the ONNX exporter makes a chain with a Shape node, which CUDA leaves to the CPU.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, 1, 1] of [N, C, H, W]."""
        return x.mean((2, 3), keepdim=True)


class Network(nn.Module):
    """Blocks of convolutions, then linear layers: raw pixels in, logits out."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: NetworkConfig | None = None, mean: float = 0.0, std: float = 1.0) -> None:
        """`config` is the form, that of `cnn` when not given.

        `mean` and `std` are of the training set's pixels, 0 to 255; they are saved with the weights.
        """
        super().__init__()
        self.config = (config or NetworkConfig()).form
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        features, size = _features(self.config)
        self.features = nn.Sequential(*features)  # [N, 1, 28, 28] -> [N, C, S, S]
        self.classifier = nn.Sequential(*_classifier(self.config, size))  # -> [N, 10]
        self.to(memory_format=torch.channels_last)  # two to three times as fast on a CPU, in TorchScript too

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits float32 [N, 10], unnormalised, of images uint8 [N, 1, 28, 28]."""
        logits: torch.Tensor = self.classifier(self.features(self.normalise(image)))
        return logits

    def normalise(self, image: torch.Tensor) -> torch.Tensor:
        """What the first layer gets: float32 [N, 1, 28, 28]."""
        return (image.to(torch.float32) - self.mean) / self.std


def _features(config: NetworkConfig) -> tuple[list[nn.Module], int]:
    """The layers of the blocks, and how many numbers they make of one image."""
    layers: list[nn.Module] = []
    width = 1
    padding = config.kernel_size // 2 if config.padding == "same" else 0
    for channels in config.channels:
        for last in [*[False] * (config.convs - 1), True]:
            layers.append(nn.Conv2d(width, channels, config.kernel_size, padding=padding))
            width = channels
            if config.batch_norm:
                layers.append(nn.BatchNorm2d(channels))
            # Before the activation: the same numbers where that is monotonic, as the default is, for less work.
            if last and config.pool > 1:
                layers.append(MaxPool2d(config.pool))
            layers.append(_ACTIVATIONS[config.activation]())
    if config.global_pool:
        return [*layers, GlobalAveragePool2d()], width
    return layers, width * config.feature_size**2


def _classifier(config: NetworkConfig, inputs: int) -> list[nn.Module]:
    """The linear layers, from what the blocks give, or from the pixels where there is no block."""
    layers: list[nn.Module] = [nn.Flatten()]
    for number, size in enumerate(config.hidden):
        if config.channels or number:  # never of pixels
            layers += _dropout(config)
        layers.append(nn.Linear(inputs, size))
        if config.batch_norm:
            layers.append(nn.BatchNorm1d(size))
        layers.append(_ACTIVATIONS[config.activation]())
        inputs = size
    if config.channels or config.hidden:
        layers += _dropout(config)
    return [*layers, nn.Linear(inputs, CLASSES)]


def _dropout(config: NetworkConfig) -> list[nn.Module]:
    return [nn.Dropout(config.dropout)] if config.dropout else []


class Deployed(nn.Module):
    """What is exported: a network's logits, and the probabilities that they stand for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and probabilities, both float32 [N, 10], of images uint8 [N, 1, 28, 28]."""
        logits = self.network(image)
        return logits, torch.softmax(logits, dim=1)


def count_parameters(network: nn.Module) -> int:
    """How many numbers a network learns; those that one training leaves as they are count too."""
    return sum(parameter.numel() for parameter in network.parameters())
