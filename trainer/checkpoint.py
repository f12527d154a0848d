"""A network in training or trained, on disk: its weights, all that the exported version says about it, and what the
next epoch needs."""

from __future__ import annotations

import pickle
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from serving.errors import ParityserveError
from serving.options import flag
from trainer.config import TrainConfig
from trainer.models import Network

FORMAT = "parityserve-checkpoint-2"

# What may differ when a training is resumed: it decides where and when, not what is computed.
_FREE = {"device", "stream"}
_ENDLESS = ("constant", "step", "plateau")  # schedules that do not depend on how many epochs there will be


class CheckpointError(ParityserveError):
    """A file that is not a checkpoint of ours, or not one of the training that was asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """What `train` leaves and `export` takes."""

    training: dict[str, Any]  # the resolved configuration, as JSON takes it
    weights: dict[str, torch.Tensor]
    history: list[dict[str, Any]]  # one EpochMetrics an epoch
    test_accuracy: float | None = None  # None until training is finished
    test_images: int | None = None
    state: dict[str, Any] | None = None  # of trainer.train.Training; None where no epoch is to follow

    @property
    def config(self) -> TrainConfig:
        """The configuration, checked again.

        Raises:
            CheckpointError: an option has another name or other choices now.
        """
        try:
            return TrainConfig(**self.training)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise CheckpointError(f"the checkpoint's configuration is not one of this version: {problems}") from error

    @property
    def dataset(self) -> str:
        """The name of the data set."""
        return self.config.dataset

    def build(self) -> Network:
        """The trained network on the CPU, in eval mode.

        Raises:
            CheckpointError: the configuration is not known, or the weights are another network's.
        """
        config = self.config
        network = Network(config)
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            raise CheckpointError(f"these are not the weights of network {config.name}: {error}") from error
        return network.eval()

    def check_resumable(self, config: TrainConfig, processes: int) -> dict[str, Any]:
        """The state to go on from with `config`, in that many processes.

        Raises:
            CheckpointError: another training was asked for; the text has each option that differs, and both values.
        """
        if self.state is None:
            raise CheckpointError("the checkpoint is of a finished training, and holds nothing to go on from")
        there = self.config
        free = _FREE | ({"epochs"} if config.schedule in _ENDLESS else set())
        differ = [
            f"{flag(TrainConfig, name)} is {getattr(config, name)} here and {getattr(there, name)} there"
            for name in TrainConfig.model_fields
            if name not in free and getattr(config, name) != getattr(there, name)
        ]
        if (count := len(self.state["random"])) != processes:
            differ.append(f"{processes} processes train here and {count} did there")
        if differ:
            raise CheckpointError("the checkpoint is of another training: " + "; ".join(differ))
        return self.state


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    content = {name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__}
    try:
        with draft.open("wb") as file:  # given the path, torch would name the archive by it, and not take every name
            torch.save({"format": FORMAT, **content}, file)
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
    except (
        OSError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:  # its text may advise to load it unsafely
        raise CheckpointError(f"{path} is damaged or not a checkpoint; `python -m trainer train` writes one") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT} file; train again")
    try:
        return Checkpoint(**content)
    except TypeError as error:
        raise CheckpointError(f"{path} is an incomplete checkpoint: {error}") from error
