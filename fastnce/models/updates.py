"""What updates of networks need: means of losses over them, and statistics and norms that stay as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm


class LossMeans:
    """Means of named losses over the updates of a step, each update's parts weighted by their share of its batch."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, losses: Mapping[str, Tensor], share: float) -> None:
        """Adds the losses of a part."""
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + share * loss.detach()
            self._weights[name] = self._weights.get(name, 0.0) + share

    def means(self) -> dict[str, Tensor]:
        """The means so far."""
        return {name: total / self._weights[name] for name, total in self._sums.items()}


@contextlib.contextmanager
def statistics_untracked(network: nn.Module) -> Iterator[None]:
    """Context in which batch norms in training mode leave their running statistics alone."""
    tracking = [m for m in network.modules() if getattr(m, "track_running_stats", False)]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@contextlib.contextmanager
def one_power_iteration(*networks: nn.Module) -> Iterator[None]:
    """Context that begins with a power iteration of all spectral norms and then keeps them as they are."""
    normed = [
        (module, hook)
        for network in networks
        for module in network.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, SpectralNorm) and module.training
    ]
    with torch.no_grad():
        for module, hook in normed:
            hook.compute_weight(module, do_power_iteration=True)
            module.training = False
    try:
        yield
    finally:
        for module, _ in normed:
            module.training = True
