"""What a network's layers hold: the maps that its convolutions make of an image, and the filters of its first layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.config import HEIGHT, WIDTH


def feature_maps(network: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each convolution of `network` answers for one image, before any activation, in the order in which they run.

    Args:
        network: any network that takes one image; left in eval mode, otherwise as it was.
        image: uint8 [1, 28, 28], on the network's device.

    Returns:
        The module's name in the network -> float32 [channels, height, width] on the CPU; empty without convolutions.
    """
    maps: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            maps[name] = output[0].detach().to("cpu", torch.float32)

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    network.eval()
    try:
        with torch.inference_mode():
            network(image.unsqueeze(0))
    finally:
        for handle in handles:
            handle.remove()
    return maps


def first_filters(network: nn.Module) -> torch.Tensor | None:
    """The weights of the first layer that sees pixels, as pictures.

    Returns:
        float32 [filters, height, width] on the CPU: a convolution's kernels, or a linear layer's weights laid out as
        the image that they are multiplied with. None when the first layer is neither.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            weights = module.weight[:, 0] if module.in_channels == 1 else None
        elif isinstance(module, nn.Linear):
            weights = module.weight.unflatten(1, (HEIGHT, WIDTH)) if module.in_features == HEIGHT * WIDTH else None
        else:
            continue
        return None if weights is None else weights.detach().to("cpu", torch.float32)
    return None
