"""Ranger, the optimiser of pSp and ReStyle."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_RECTIFIED_ABOVE = 5.0


class Ranger(torch.optim.Optimizer):
    r"""RAdam with centred gradients, and Lookahead around it.

    With the gradient g of a weight w, less its mean over all axes but the first where it has more than one, in step t of this
    weight:

        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
        w <- w - lr s_t m / (sqrt(v) + eps)    if rho_t > 5,    else    w <- w - lr m / (1 - beta1^t)

        rho_t = rho - 2 t beta2^t / (1 - beta2^t),    rho = 2 / (1 - beta2) - 1
        s_t = sqrt((1 - beta2^t) (rho_t - 4) (rho_t - 2) rho / ((rho - 4) (rho - 2) rho_t)) / (1 - beta1^t)

    and every `lookahead_every` steps the slow weights u, which start as w was before its first step, follow:

        u <- u + lookahead (w - u),    w <- u

    With beta2 = 0.999 the first five steps are plain momentum, and not small: lr 20 m, then 10.3, 7.0, 5.4 and 4.4 with the
    defaults. A weight without a gradient is left alone, and its steps do not count.

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020; Zhang et al., "Lookahead
    Optimizer", NeurIPS 2019; Yong et al., "Gradient Centralization", ECCV 2020; put together by L. Wright.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of m and of v.
        eps: see above.
        lookahead_every: steps between two of the slow weights.
        lookahead: how far they go.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 2)
        >>> optimizer = Ranger(layer.parameters(), lr=1e-4)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        lookahead_every: int = 6,
        lookahead: float = 0.5,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps}
        super().__init__(
            params, defaults | {"lookahead_every": lookahead_every, "lookahead": lookahead}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update; the loss that `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_step[self._count(p)].append(p)
            for step, parameters in by_step.items():
                self._update(parameters, step, group)
        return loss

    def _count(self, p: Tensor) -> int:
        state = self.state[p]
        if not state:
            state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p), slow=p.clone())
        state["step"] += 1
        return state["step"]

    def _update(self, parameters: list[Tensor], step: int, group: dict) -> None:
        beta1, beta2 = group["betas"]
        m, v, slow = ([self.state[p][name] for p in parameters] for name in ("m", "v", "slow"))
        gradients = [_centred(p.grad) for p in parameters if p.grad is not None]
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        rectified, factor = step_factor(step, beta1, beta2)
        if rectified:
            widths = torch._foreach_sqrt(v)
            torch._foreach_add_(widths, group["eps"])
            torch._foreach_addcdiv_(parameters, m, widths, -group["lr"] * factor)
        else:
            torch._foreach_add_(parameters, m, alpha=-group["lr"] * factor)
        if step % group["lookahead_every"] == 0:
            torch._foreach_lerp_(slow, parameters, group["lookahead"])
            torch._foreach_copy_(parameters, slow)


def _centred(gradient: Tensor) -> Tensor:
    if gradient.ndim < 2:
        return gradient
    return gradient - gradient.mean(dim=tuple(range(1, gradient.ndim)), keepdim=True)


def step_factor(step: int, beta1: float, beta2: float) -> tuple[bool, float]:
    """Whether RAdam divides by sqrt(v) in a step, counted from 1, and what it multiplies lr with: see `Ranger`."""
    decayed = beta2**step
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * step * decayed / (1 - decayed)
    bias = 1 - beta1**step
    if rho <= _RECTIFIED_ABOVE:
        return False, 1 / bias
    shrinks = (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)
    return True, math.sqrt((1 - decayed) * shrinks) / bias
