"""What the ops share: the reduction, and running outside autocast."""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """The ``mean`` or ``sum`` of all losses, or the losses themselves."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def row_weight(count: int, reduction: str) -> float | None:
    """The weight of each of ``count`` losses in the reduced one; None where nothing is reduced."""
    return {"mean": 1 / count, "sum": 1.0, "none": None}[reduction]


def no_autocast(x: Tensor) -> torch.autocast:
    """The ops choose their own precision: inputs as they come, sums in fp32 or fp64."""
    return torch.autocast(x.device.type, enabled=False)


def wants_grad(*inputs: object) -> bool:
    """Whether autograd will ask for the gradient of any of ``inputs``."""
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in inputs
    )


def scaled(grads: tuple[Tensor | None, ...], by: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of a loss, times the gradient that arrives for that loss."""
    return tuple(None if grad is None else grad * by.to(grad.dtype) for grad in grads)
