"""LARS, the optimiser of large-batch training."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class LARS(torch.optim.Optimizer):
    r"""Layer-wise adaptive rate scaling (You et al. 2017, https://arxiv.org/abs/1708.03888), as SimCLR uses it.

    With the gradient g of a weight w and its velocity v:

        u = g + weight_decay w
        v <- momentum v + lr (trust |w| / |u|) u
        w <- w - v

    The factor `trust |w| / |u|` is 1 where one of the norms is 0, and in groups with `adapt=False`, which are plain SGD with
    momentum: biases and the parameters of norms (see `lars_groups`). The norms are of the whole parameter tensor.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: decay of the velocity.
        weight_decay: weight of the parameters in u.
        trust: the trust coefficient, eta in the paper.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 2)
        >>> optimizer = LARS(lars_groups([layer]), lr=0.3, weight_decay=1e-6)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults | {"adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update; the loss that `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict) -> None:
        updates = torch._foreach_add(
            [p.grad for p in parameters], parameters, alpha=group["weight_decay"]
        )
        if group["adapt"]:
            norms = torch._foreach_norm(parameters), torch._foreach_norm(updates)
            ratios = [
                torch.where((w > 0) & (u > 0), group["trust"] * w / u, 1.0)
                for w, u in zip(*norms, strict=True)
            ]
            torch._foreach_mul_(updates, ratios)
        for p in parameters:
            if "velocity" not in self.state[p]:
                self.state[p]["velocity"] = torch.zeros_like(p)
        velocities = [self.state[p]["velocity"] for p in parameters]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, updates, alpha=group["lr"])
        torch._foreach_sub_(parameters, velocities)


def lars_groups(modules: Iterable[nn.Module]) -> list[dict]:
    """The parameters in two groups: weights, and what LARS neither scales nor decays, biases and the parameters of norms."""
    parameters = [p for module in modules for p in module.parameters()]
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "adapt": False, "weight_decay": 0.0},
    ]
