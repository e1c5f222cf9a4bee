"""Running average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of a module's parameters, in `module`; its buffers are copied.

        average <- average + (1 - d_t) (weights - average),   d_t = decay (1 - decay^t) / (1 - decay^(t + 1))

    t counts the updates from 0. This is the average with Adam's bias correction: the weights of update s count in proportion to
    decay^(t - s) and the random initialisation not at all.

    Args:
        source: the module to follow; it is copied.
        decay: in [0, 1); 0 makes the average equal to the last weights.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(source).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Moves the average towards the weights of `source`."""
        decay = self.decay * (1 - self.decay**self.updates) / (1 - self.decay ** (self.updates + 1))
        self.updates += 1
        weights = [parameter.detach() for parameter in source.parameters()]
        torch._foreach_lerp_(list(self.module.parameters()), weights, 1 - decay)
        for average, buffer in zip(self.module.buffers(), source.buffers(), strict=True):
            average.copy_(buffer)

    def state_dict(self) -> dict[str, object]:
        """The average and the number of updates."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave."""
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]
