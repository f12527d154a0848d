"""The network, and the form of it that is exported. Normalisation is inside, so no one downstream can get it wrong."""

from __future__ import annotations

import torch
from torch import nn

CLASSES = 10
HEIGHT = WIDTH = 28


class Cnn(nn.Module):
    """Two convolutions and two linear layers, 225,034 parameters: raw pixels in, logits out."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        """`mean` and `std` are of the training set's pixels, 0 to 255; they are saved with the weights."""
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.features = nn.Sequential(  # [N, 1, 28, 28]
            nn.Conv2d(1, 32, kernel_size=3),  # [N, 32, 26, 26]
            nn.ReLU(),
            nn.MaxPool2d(2),  # [N, 32, 13, 13]
            nn.Conv2d(32, 64, kernel_size=3),  # [N, 64, 11, 11]
            nn.ReLU(),
            nn.MaxPool2d(2),  # [N, 64, 5, 5]
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),  # [N, 1600]
            nn.Linear(64 * 5 * 5, 128),
            nn.ReLU(),
            nn.Linear(128, CLASSES),  # [N, 10]
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits float32 [N, 10], unnormalised, of images uint8 [N, 1, 28, 28]."""
        normalised = (image.to(torch.float32) - self.mean) / self.std
        logits: torch.Tensor = self.classifier(self.features(normalised))
        return logits


class Deployed(nn.Module):
    """What is exported: a network's logits, and the probabilities that they stand for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and probabilities, both float32 [N, 10], of images uint8 [N, 1, 28, 28]."""
        logits = self.network(image)
        return logits, torch.softmax(logits, dim=1)


NETWORKS: dict[str, type[Cnn]] = {"cnn": Cnn}


def count_parameters(network: nn.Module) -> int:
    """How many numbers training adjusts."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
