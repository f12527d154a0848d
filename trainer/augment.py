"""Change images at random, a batch at a time, on the device where they are."""

from __future__ import annotations

import torch

from trainer.config import TrainConfig

# Of the image, the rectangle that is erased: https://arxiv.org/abs/1708.04896, table 5.
ERASED_AREA = (0.02, 0.4)
ERASED_ASPECT = (0.3, 1 / 0.3)


def augment(images: torch.Tensor, config: TrainConfig, generator: torch.Generator) -> torch.Tensor:
    """Images uint8 [N, 1, H, W], changed as `config` says; the generator is on their device."""
    if config.flip:
        images = flip(images, generator)
    if config.shift:
        images = shift(images, config.shift, generator)
    if config.erase:
        images = erase(images, config.erase, generator)
    return images


def flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image of [N, C, H, W] mirrored, left to right, or not."""
    return torch.where(_uniform(images, generator, 0, 1) < 0.5, images.flip(3), images)


def shift(images: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """Each image of [N, C, H, W] moved by -most to most pixels each way; what comes in is 0."""
    count, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (most, most, most, most))
    down, right = torch.randint(0, 2 * most + 1, (2, count, 1, 1), device=images.device, generator=generator)
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)
    wide = width + 2 * most
    places = rows * wide + columns + (down * wide + right)  # [N, H, W], within a channel
    places = places.reshape(count, 1, height * width)
    return padded.flatten(2).gather(2, places.expand(-1, channels, -1)).reshape(images.shape)


def erase(images: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """A rectangle of noise in each image of [N, C, H, W] with that probability; see ERASED_AREA and ERASED_ASPECT."""
    height, width = images.shape[2:]
    area = _uniform(images, generator, *ERASED_AREA) * height * width
    aspect = _uniform(images, generator, *torch.tensor(ERASED_ASPECT).log().tolist()).exp()
    tall = (area * aspect).sqrt().round().clamp(1, height)  # [N, 1, 1, 1], as all below
    wide = (area / aspect).sqrt().round().clamp(1, width)
    top = (_uniform(images, generator, 0, 1) * (height - tall + 1)).floor()
    left = (_uniform(images, generator, 0, 1) * (width - wide + 1)).floor()
    rows = torch.arange(height, device=images.device).reshape(1, 1, -1, 1)
    columns = torch.arange(width, device=images.device).reshape(1, 1, 1, -1)
    inside = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
    chosen = _uniform(images, generator, 0, 1) < probability
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8, device=images.device, generator=generator)
    return torch.where(inside & chosen, noise, images)


def _uniform(images: torch.Tensor, generator: torch.Generator, low: float, high: float) -> torch.Tensor:
    """A number for each image, float32 [N, 1, 1, 1]."""
    numbers = torch.rand((len(images), 1, 1, 1), device=images.device, generator=generator)
    return low + (high - low) * numbers
