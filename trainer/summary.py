"""The layers of a network as a table."""

from __future__ import annotations

import re

import torch
import torchinfo

from trainer.config import HEIGHT, WIDTH, NetworkConfig
from trainer.models import Network


def layer_table(config: NetworkConfig) -> str:
    """Each layer's output shape, parameters, kernel and mult-adds, for a batch of one image."""
    columns = ("output_size", "num_params", "kernel_size", "mult_adds")
    table = torchinfo.summary(
        Network(config),
        input_data=torch.zeros(1, 1, HEIGHT, WIDTH, dtype=torch.uint8),
        col_names=columns,
        row_settings=("var_names", "depth"),
        device="cpu",
        verbose=0,
    )
    text = re.sub(r"Units\.(\w)\w+", r"\1", str(table))  # torchinfo means to write M and G
    return f"network: {config.name}\n{text}"
