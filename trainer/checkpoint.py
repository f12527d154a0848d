"""A trained network on disk: its weights, and all that the exported version says about it."""

from __future__ import annotations

import pickle
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from serving.errors import ParityserveError
from trainer.models import NETWORKS, Cnn

FORMAT = "parityserve-checkpoint-1"


class CheckpointError(ParityserveError):
    """A file that is not a checkpoint of ours, or of a network that is not known."""


@dataclass(frozen=True)
class Checkpoint:
    """What `train` leaves and `export` takes."""

    network: str  # a name in trainer.models.NETWORKS
    dataset: str
    weights: dict[str, torch.Tensor]
    training: dict[str, Any]  # the resolved configuration
    history: list[dict[str, float]]  # one EpochMetrics an epoch
    test_accuracy: float
    test_images: int

    def build(self) -> Cnn:
        """The trained network on the CPU, in eval mode.

        Raises:
            CheckpointError: the network is not known, or the weights are another's.
        """
        if self.network not in NETWORKS:
            raise CheckpointError(f"network {self.network!r} is not known, only: {', '.join(NETWORKS)}")
        network = NETWORKS[self.network]()
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            raise CheckpointError(f"these are not the weights of network {self.network}: {error}") from error
        return network.eval()


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        torch.save({"format": FORMAT, **asdict(checkpoint)}, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint of this format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: python -m trainer train --checkpoint {path}") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {error}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT} file")
    try:
        return Checkpoint(**content)
    except TypeError as error:
        raise CheckpointError(f"{path} is an incomplete checkpoint: {error}") from error
