"""What the ops share: the reduction, and running outside autocast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

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


def no_autocast(x: Tensor) -> AbstractContextManager:
    """The ops choose their own precision: inputs as they come, sums in fp32 or fp64."""
    if x.is_meta:  # which knows no autocast
        return contextlib.nullcontext()
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


def kernel_mean(reduction: str, dtype: torch.dtype) -> bool:
    """Whether the kernels return the gradients of the mean: for the mean, but in fp16 those of the sum.

    In fp16 the gradient of a mean of many losses underflows. Gradient scaling is there to prevent that, but its factor arrives
    only with the backward, and so does the division. The kernels count the losses themselves: a compiler would take a number
    for a constant, and compile again for every other.
    """
    return reduction == "mean" and dtype != torch.float16


def distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors; for ``torch.compile``, which does not pass a Function one tensor twice, a view of each."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    return [None if x is None else x.view_as(x) for x in tensors]


def scaled(
    grads: Sequence[Tensor | None], by: Tensor | None, factor: float = 1.0
) -> tuple[Tensor | None, ...]:
    """The gradients of a loss, times the gradient that arrives for that loss, None for zero, and ``factor``."""
    if by is None:
        return (None,) * len(grads)
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
    """Makes a Function raise when the gradients that its ``backward(ctx, saved, *gradients)`` gives are differentiated.

    ``once_differentiable`` does so only if the gradient that arrives requires a gradient. It usually does not, and the second
    derivative would be taken for zero in silence. So the gradients pass a node that raises, and that lies on every way on: to the
    gradients that arrive, and to what was saved, so that saved inputs, or results, must lead to all inputs; a Function that saves
    neither returns a :func:`handle`.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grad_outputs: Tensor | None):
        saved = ctx.saved_tensors  # once: checkpointing allows no more
        with torch.no_grad():
            grads = backward(ctx, saved, *grad_outputs)
        # Of what it has compiled, PyTorch gives no second derivatives, whatever is done here.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return grads
        ways = [x for x in (*grad_outputs, *saved) if x is not None and x.requires_grad]
        return _NoSecondDerivative.apply(len(ways), *ways, *grads)

    return wrapper


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ways: int, *ways_and_grads: Tensor | None):
        return tuple(None if grad is None else grad.detach() for grad in ways_and_grads[ways:])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the fused kernels have no second derivative, nor have losses over ranks. Use backend='torch' on one rank."
        )


def handle(ctx, like: Tensor, grad_now: bool) -> Tensor | None:
    """An empty second result of a Function that saves gradients alone: saved, it leads from its node to all its inputs.

    The first result would do, but may be changed in place, as in ``loss /= steps``.
    """
    if not grad_now or torch.compiler.is_compiling():
        return None
    ctx.set_materialize_grads(False)  # its own gradient would be a tensor of zeros
    return like.new_empty(0)


def plain_gradients(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """The gradients of ``function(*inputs)`` that ``needs`` asks for, as differentiable functions of ``inputs`` and ``grad``.

    For second derivatives (R1, WGAN-GP) of ops whose kernels give first ones only.
    """
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # One input may be made from another: each gradient is that of a name of its own.
        inputs = [None if x is None else x.view_as(x) for x in inputs]
        out = function(*inputs)
        wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=True))
    return [next(found) if need else None for need in needs]
