"""Shared by the ops: the reduction, running outside autocast, and the autograd of losses of rows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks

REDUCTIONS = ("mean", "sum", "none")


def row_weight(count: int, reduction: str) -> float | None:
    """The weight of each of ``count`` losses in the reduced one; None where nothing is reduced."""
    return {"mean": 1 / count, "sum": 1.0, "none": None}[reduction]


def reduced(losses: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """The losses times their weights, their sum, or their mean, which is over the weights' sum: 0 where that is 0."""
    losses = losses if weights is None else losses * weights
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if weights is None:
        return losses.mean()
    total = weights.sum()
    return losses.sum() / total.masked_fill(total == 0, 1)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """The ops choose their own precision: inputs as they come, sums in fp32 or fp64."""
    # Of meta tensors there is none; and to leave one costs more than to see that there is none to leave.
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
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


def kept_scale(rows: Tensor) -> float:
    """What the gradients of the sum of the losses of ``rows`` (..., N, D) are multiplied by while they are kept.

    fp16 ends at 65504, which the gradient of a key can pass where many rows are near it and that of their mean would not. It also
    ends at 6e-8, so few rows keep 1. There are three powers of two, for a compiler would take one of each N for a constant.
    """
    if rows.dtype != torch.float16 or rows.shape[-2] <= 2**11:
        return 1.0
    return 2**-4 if rows.shape[-2] <= 2**15 else 2**-8


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
    if factor != 1.0:
        by = by * factor

    def times(grad: Tensor) -> Tensor:
        eager = not torch.compiler.is_compiling()
        if grad.device.type == "cpu" and eager:
            return grad * by  # which reads a number on the CPU in its own dtype, and rounds once
        # In the wide dtype: fp16 cannot hold GradScaler's 65536.
        wide = torch.promote_types(grad.dtype, by.dtype)
        if grad.device.type == "cuda" and grad.dim() > 0 and wide != grad.dtype and eager:
            # One launch: of a vector, unlike a number, the dtype counts.
            return torch.mul(grad, by.reshape(1), out=torch.empty_like(grad))
        return (grad.to(wide) * by).to(grad.dtype)

    present = [grad for grad in grads if grad is not None]
    together = _as_one(present)
    if together is None:
        found = iter([times(grad) for grad in present])
    else:
        parts = times(together).split([grad.numel() for grad in present])
        found = iter([x.view(grad.shape) for x, grad in zip(parts, present, strict=True)])
    return tuple(None if grad is None else next(found) for grad in grads)


def _as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """The numbers of all ``tensors`` as one, if they lie one after another in one memory of a GPU; else None."""
    if len(tensors) < 2 or tensors[0].device.type == "cpu" or torch.compiler.is_compiling():
        return None
    first, end = tensors[0], tensors[0].storage_offset()
    memory = first.untyped_storage()._cdata
    for x in tensors:
        if x.untyped_storage()._cdata != memory or x.storage_offset() != end:
            return None
        if not x.is_contiguous() or x.dtype != first.dtype:
            return None
        end += x.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


def first_derivative_only(backward: Callable) -> Callable:
    """Makes a Function raise when the gradients that its ``backward(ctx, saved, *gradients)`` gives are differentiated.

    ``once_differentiable`` does so only if the gradient that arrives requires a gradient. It usually does not, and the second
    derivative would be taken for zero in silence. So the gradients pass a node that raises, and that lies on every way on: to the
    gradients that arrive, and to what was saved, so that saved inputs, or results, must lead to all inputs; a Function that saves
    neither returns a ``handle``.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grad_outputs: Tensor | None):
        saved = ctx.saved_tensors  # once: checkpointing allows no more
        present = (x for x in (*grad_outputs, *saved) if x is not None)
        like = next(present, None)
        outside = contextlib.nullcontext() if like is None else no_autocast(like)
        with torch.no_grad(), outside:
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


def gradients(
    function: Callable[..., Tensor], inputs: Sequence, needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of ``(grad * function(*inputs)).sum()`` that ``needs`` asks for."""
    with torch.enable_grad():
        leaves = [
            x.detach().requires_grad_(need) if isinstance(x, Tensor) else x
            for x, need in zip(inputs, needs, strict=True)
        ]
        out = function(*leaves)
    wanted = [x for x, need in zip(leaves, needs, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad) if wanted else ())
    return [next(found) if need else None for need in needs]


def row_loss(
    op: str,
    plain: Callable[..., Tensor | tuple[Tensor, Tensor]],
    rows: Sequence[Tensor],
    labels: Tensor | None,
    temperature: object,
    reduction: object,
    backend: str | None,
    operators: str = "",
) -> Tensor:
    """The losses of checked rows, their sum or mean, on the ``backend`` that is asked for.

    Args:
        op: the public function.
        plain: ``(*rows, labels, temperature)`` -> the losses; and whether each counts in the mean, if not all do.
        rows: the tensors that may need a gradient, at most three, in the order of the operators' arguments.
        labels: the argument that follows them, if there is one.
        temperature: is checked here.
        reduction: is checked here.
        backend: as the public functions take it.
        operators: whose ``<op>_forward`` and ``<op>_backward`` are run, if not those of ``op``.
    """
    temperature = _checks.expect_temperature(op, temperature, rows[0])
    _checks.expect_choice(op, "reduction", reduction, REDUCTIONS)
    kernels = backends.select(op, rows[0], backend, rows)
    with no_autocast(rows[0]):
        others = () if labels is None else (labels,)
        if kernels is not backends.reference:
            return fused_row_loss(op, kernels, rows, others, temperature, reduction, operators)
        found = plain(*rows, *others, temperature)
        losses, counts = found if isinstance(found, tuple) else (found, None)
        if reduction == "none":
            return losses
        if reduction == "mean":
            return losses.mean() if counts is None else losses.sum() / positives(counts)
        return losses.sum()


def fused_row_loss(
    op: str,
    kernels: ModuleType,
    rows: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
    temperature: float | Tensor,
    reduction: str,
    operators: str = "",
    **options: object,
) -> Tensor:
    """``row_loss`` of the kernels of a fused backend, with the tensors that follow the rows and the ``options`` of its operators."""
    _checks.expect_fusable(op, rows[0])
    grad_now = reduction != "none" and wants_grad(*rows, temperature)
    loss, _ = RowLossFunction.apply(
        operators or op,
        kernels,
        options,
        reduction,
        grad_now,
        len(rows),
        temperature,
        *distinct([*rows, None, None][:3]),
        *distinct(others),
    )
    return loss


class RowLossFunction(torch.autograd.Function):
    """Autograd of a loss of rows over the kernels of any fused backend.

    A reduced loss gives every row the same, known weight, so the kernels return loss and gradients together and the backward
    only scales them. Unreduced, the backward recomputes the similarities from the saved log-sum-exp.
    """

    @staticmethod
    def forward(
        ctx,
        op: str,
        kernels: ModuleType,
        options: dict,
        reduction: str,
        grad_now: bool,
        count: int,
        temperature: float | Tensor,
        first: Tensor,
        second: Tensor | None,
        third: Tensor | None,
        *others: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        # Of two others torch.compile would take ctx for one too many, where nothing needs a gradient.
        tensors = (*(first, second, third)[:count], *others)
        needs = (*ctx.needs_input_grad[7 : 7 + count], ctx.needs_input_grad[6])
        mean, kept = kernel_mean(reduction, first.dtype), kept_scale(first)
        losses, *sums, grads = getattr(kernels, f"{op}_forward")(
            *tensors,
            temperature,
            **options,
            grad_scale=kept if grad_now else None,
            mean=mean,
            needs=needs,
        )
        ctx.without_gradient, ctx.reduced = 3 - count + len(others), reduction != "none"
        if ctx.reduced:
            shared = handle(ctx, first, grad_now)
            if len(sums) == 2:  # has_positive and lse: the mean is over the rows that have one
                number = positives(sums[0]) if reduction == "mean" else None
                ctx.factor = 1 / kept
                ctx.save_for_backward(shared, None if mean else number, *grads)
                return losses.sum() if number is None else losses.sum() / number, shared
            weight = row_weight(losses.numel(), reduction)
            ctx.factor = (1.0 if mean else weight) / kept
            ctx.save_for_backward(shared, None, *grads)
            return losses.sum() * weight, shared
        ctx.backward_of, ctx.options, ctx.needs = (
            getattr(kernels, f"{op}_backward"),
            options,
            needs,
        )
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        saved = temperature if ctx.temperature is None else None
        lse = sums[-1] if sums else None
        ctx.save_for_backward(lse, saved, *tensors)
        return losses, None

    @staticmethod
    @first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad_loss: Tensor, _: object):
        if ctx.reduced:
            _, number, *grads = saved
            by = grad_loss if number is None or grad_loss is None else grad_loss / number
            grads = scaled(grads, by, ctx.factor)
        else:
            lse, temperature, *tensors = saved
            temperature = ctx.temperature if temperature is None else temperature
            sums = () if lse is None else (lse,)
            grads = ctx.backward_of(
                grad_loss, *tensors, temperature, *sums, **ctx.options, needs=ctx.needs
            )
        *of_rows, of_temperature = grads
        return *(None,) * 6, of_temperature, *of_rows, *(None,) * ctx.without_gradient


def positives(has_positive: Tensor) -> Tensor:
    """The number of rows that a mean is over."""
    return has_positive.sum().clamp(min=1)
