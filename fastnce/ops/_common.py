"""What the ops share: the reduction, and running outside autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

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


def alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the tensors of each device and dtype, for one call of the kernels.

    Under autocast the pixels are float32 and the features of convolutions bfloat16.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, x in enumerate(tensors):
        groups.setdefault((x.device, x.dtype), []).append(index)
    return list(groups.values())


def wants_grad(*inputs: object) -> bool:
    """Whether autograd will ask for the gradient of any of ``inputs``."""
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in inputs
    )


def kernel_weight(weight: float, dtype: torch.dtype) -> float:
    """The weight that the kernels put on each loss: ``weight``, but 1 in fp16.

    In fp16 the gradient of a mean of many losses underflows. Gradient scaling is there to prevent that, but its factor arrives
    only with the backward; so there the kernels return the gradients of the sum.
    """
    return 1.0 if dtype == torch.float16 else weight


def scaled(
    grads: tuple[Tensor | None, ...], by: Tensor, factor: float = 1.0
) -> tuple[Tensor | None, ...]:
    """The gradients of a loss, times the gradient that arrives for that loss and ``factor``."""
    by = by * factor

    def times(grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        if grad.device.type == "cpu" and not torch.compiler.is_compiling():
            return grad * by  # which reads a number on the CPU in its own dtype, and rounds once
        # In the wide dtype: fp16 cannot hold GradScaler's 65536.
        wide = torch.promote_types(grad.dtype, by.dtype)
        return (grad.to(wide) * by).to(grad.dtype)

    return tuple(times(grad) for grad in grads)


def first_derivative_only(backward: Callable) -> Callable:
    """Makes the ``backward`` of a Function raise, when the gradients that it gives are themselves differentiated.

    ``once_differentiable`` does so only if the gradient that arrives requires a gradient. It usually does not, and the second
    derivative would be taken for zero in silence. ``ctx.create_graph`` tells the ``backward`` whether they may be.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grad_outputs: Tensor):
        ctx.create_graph = torch.is_grad_enabled()
        with torch.no_grad():
            grads = backward(ctx, *grad_outputs)
        if not ctx.create_graph:
            return grads
        leaves = [None if grad is None else grad.detach().requires_grad_() for grad in grads]
        return _NoSecondDerivative.apply(*leaves)

    return wrapper


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *grads: Tensor | None):
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the fused kernels have no second derivative. Use backend='torch'.")
