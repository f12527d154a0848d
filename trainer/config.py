"""Every knob of training once: name, default, bounds, help."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

DatasetName = Literal["mnist", "fashion-mnist"]
TrainDevice = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]

# Enough for 98.9 % on MNIST and 91 % on Fashion-MNIST.
DEFAULT_EPOCHS = {"mnist": 3, "fashion-mnist": 5}


class TrainConfig(BaseModel):
    """How the network is trained. The defaults were chosen on the validation set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: DatasetName = Field("mnist", description="what to train on")
    epochs: int = Field(
        default_factory=lambda given: DEFAULT_EPOCHS.get(given.get("dataset", ""), 3),
        ge=1,
        le=1000,
        description=f"passes over the training set (default: {DEFAULT_EPOCHS})",
    )
    batch_size: int = Field(128, ge=1, le=60_000, description="images in one step")
    learning_rate: float = Field(4e-3, gt=0, le=10, description="the peak of the one-cycle schedule")
    warm_up: float = Field(0.25, ge=0, lt=1, description="fraction of the steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW's decoupled weight decay")
    validation_images: int = Field(5000, ge=1, description="images of the training set kept for validation")
    seed: int = Field(0, ge=0, lt=2**63, description="of the split, the initial weights and the shuffling")
    device: TrainDevice = Field("auto", description="auto, cpu, mps, cuda or cuda:N; only auto falls back")
