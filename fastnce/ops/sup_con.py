"""The supervised contrastive loss."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastnce import backends, reference
from fastnce.ops import _checks, _common


def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Supervised contrastive loss, the L_out form (Khosla et al. 2020, https://arxiv.org/abs/2004.11362).

    .. math:: \ell_i = \log \sum_{a \ne i} e^{s_{ia} / \tau} - \frac{1}{|P_i|} \sum_{p \in P_i} s_{ip} / \tau

    with the cosine s and the other samples :math:`P_i` of the class of i. Several views of an image are rows of their own with
    the same label. The published code multiplies by ``temperature / base_temperature`` (0.07); this is the loss itself.

    Args:
        features: (N, D); float64, float32, bfloat16 or float16. Normalisation is part of the op.
        labels: (N,) integers.
        temperature: positive float, or tensor of one element, which gets its gradient.
        reduction: ``"mean"`` over the samples that have a positive (0 if none has), ``"sum"``, or ``"none"`` for (N,), with 0
            for samples without a positive.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The loss, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or options that do not fit together.
        RuntimeError: the requested backend cannot run this.

    Example:
        >>> import torch, fastnce
        >>> loss = fastnce.sup_con(torch.randn(8, 32), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    """
    op = "sup_con"
    _checks.expect_float_tensor(op, "features", features, (2,), "(N, D)")
    labels = _checks.expect_labels(op, labels, features, "features")
    return sup_con_reduced(op, features, labels, temperature, reduction, backend)


def sup_con_reduced(
    op: str,
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    reduction: str,
    backend: str | None,
) -> Tensor:
    """:func:`sup_con` of validated features (N, D) and labels (N,) int64, under the name ``op``."""
    temperature = _checks.expect_temperature(op, temperature, features)
    _checks.expect_choice(op, "reduction", reduction, _common.REDUCTIONS)
    kernels = backends.select(op, features, backend)
    with _common.no_autocast(features):
        if kernels is reference:
            losses, has_positive = reference.sup_con(features, labels, temperature)
            if reduction == "mean":
                return losses.sum() / _mean_count(has_positive)
            return _common.reduce(losses, reduction)
        _checks.expect_fusable(op, features)
        grad_now = reduction != "none" and _common.wants_grad(features, temperature)
        loss, _ = SupConFunction.apply(features, temperature, labels, kernels, reduction, grad_now)
        return loss


def _mean_count(has_positive: Tensor) -> Tensor:
    return has_positive.sum().clamp(min=1)


class SupConFunction(torch.autograd.Function):
    """Autograd of :func:`sup_con` over the kernels of any fused backend."""

    @staticmethod
    def forward(
        ctx,
        features: Tensor,
        temperature: float | Tensor,
        labels: Tensor,
        kernels: ModuleType,
        reduction: str,
        grad_now: bool,
    ) -> tuple[Tensor, Tensor | None]:
        needs = ctx.needs_input_grad[:2]
        kernel_mean = _common.kernel_mean(reduction, features.dtype)
        losses, has_positive, lse, grads = kernels.sup_con_forward(
            features,
            labels,
            temperature,
            grad_scale=1.0 if grad_now else None,
            mean=kernel_mean,
            needs=needs,
        )
        ctx.reduced = reduction != "none"
        if ctx.reduced:
            count = _mean_count(has_positive) if reduction == "mean" else None
            handle = _common.handle(ctx, features, grad_now)
            ctx.save_for_backward(handle, None if kernel_mean else count, *grads)
            return losses.sum() if count is None else losses.sum() / count, handle
        ctx.kernels, ctx.needs = kernels, needs
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        saved = temperature if ctx.temperature is None else None
        ctx.save_for_backward(features, labels, lse, saved)
        return losses, None

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad_loss: Tensor, _: object):
        nothing = (None,) * 4
        if ctx.reduced:
            _, count, *grads = saved
            by = grad_loss if count is None or grad_loss is None else grad_loss / count
            return *_common.scaled(grads, by), *nothing
        features, labels, lse, temperature = saved
        temperature = ctx.temperature if temperature is None else temperature
        grads = ctx.kernels.sup_con_backward(
            grad_loss, features, labels, temperature, lse, needs=ctx.needs
        )
        return *grads, *nothing
