"""Running average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of a module's parameters, in `module`.

        average <- average + (1 - d_t) (weights - average)

    With `start=None`, d_t = decay (1 - decay^t) / (1 - decay^(t + 1)), t counting the updates from 0. This is the average with
    Adam's bias correction: the weights of update s count in proportion to decay^(t - s) and the random initialisation not at
    all. Buffers are copied.

    With a number, the form that is common for GANs: d_t = 0, a copy, in the first `start` updates and `decay` after them.
    Floating-point buffers, such as the statistics of batch norm, are averaged like the parameters.

    Parameters that have no gradient when the average is made are never trained, and are not copied: both modules hold the same.

    Args:
        source: the module to follow; it is copied.
        decay: in [0, 1); 0 makes the average equal to the last weights.
        start: see above.
    """

    def __init__(self, source: nn.Module, decay: float, start: int | None = None) -> None:
        shared = {id(p): p for p in source.parameters() if not p.requires_grad}
        self.module = copy.deepcopy(source, shared).eval().requires_grad_(False)
        self.decay, self.start = decay, start
        self.updates = 0

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Moves the average towards the weights of `source`."""
        weight = 1 - self._next_decay()
        self.updates += 1
        pairs = zip(self.module.parameters(), source.parameters(), strict=True)
        moving = [(average, p) for average, p in pairs if average is not p]
        if moving:
            torch._foreach_lerp_(*map(list, zip(*moving, strict=True)), weight)
        for average, buffer in zip(self.module.buffers(), source.buffers(), strict=True):
            if self.start is not None and buffer.is_floating_point():
                average.lerp_(buffer, weight)
            else:
                average.copy_(buffer)

    def _next_decay(self) -> float:
        if self.start is not None:
            return 0.0 if self.updates < self.start else self.decay
        return self.decay * (1 - self.decay**self.updates) / (1 - self.decay ** (self.updates + 1))

    def state_dict(self) -> dict[str, object]:
        """The average and the number of updates."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave."""
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]
