"""The exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class Average:
    """A copy of a network whose weights and statistics follow the original's.

    After update t, counted from 0, average = d * average + (1 - d) * weight with d = min(decay, (1 + t) / (10 + t)):
    the ramp has the average forget the initial weights, which in a short run would otherwise be most of it.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Begin with the weights of `network`, whose later changes `update` follows."""
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._decay = decay
        self._updates = 0
        # The tensors that both networks stay made of: collecting them for each update takes longer than the update.
        pairs = list(zip(self.network.state_dict().values(), network.state_dict().values(), strict=True))
        self._numbers = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the weights as they are now."""
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        averages, currents = zip(*self._numbers, strict=True)
        torch._foreach_lerp_(averages, currents, 1 - decay)
        for average, current in self._counts:
            average.copy_(current)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on."""
        return {"weights": self.network.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.network.load_state_dict(state["weights"])
        self._updates = state["updates"]
