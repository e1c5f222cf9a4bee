"""ContraGAN's conditional contrastive (2C) loss."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastnce import backends, reference
from fastnce.ops import _checks, _common


def conditional_contrastive(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""ContraGAN's 2C loss (Kang and Park 2020, https://arxiv.org/abs/2006.12681).

    .. math:: \ell_i = \log \Big( e^{s_{ip} / \tau} + \sum_{j \ne i} e^{s_{ij} / \tau} \Big)
              - \log \Big( e^{s_{ip} / \tau} + \sum_{j \ne i,\, y_j = y_i} e^{s_{ij} / \tau} \Big)

    with the cosine :math:`s_{ij}` of two samples and :math:`s_{ip}` of a sample and its own class's proxy. The published form
    builds an N x N x D array; plain PyTorch with one matrix product is :func:`fastnce.reference.conditional_contrastive`.

    Args:
        embeddings: (N, D); float64, float32, bfloat16 or float16. Normalisation is part of the op.
        proxies: (N, D), row i the embedding of the class of sample i.
        labels: (N,) integers.
        temperature: positive float, or tensor of one element, which gets its gradient.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for (N,).
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The loss, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or options that do not fit together.
        RuntimeError: the requested backend cannot run this.

    Example:
        >>> import torch, fastnce
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> classes = torch.nn.Embedding(2, 16)
        >>> fastnce.conditional_contrastive(torch.randn(4, 16), classes(labels), labels).backward()
    """
    op = "conditional_contrastive"
    embeddings, proxies = _checks.same_dtype_under_autocast(embeddings, proxies)
    _checks.expect_float_tensor(op, "embeddings", embeddings, (2,), "(N, D)")
    _checks.expect_float_tensor(op, "proxies", proxies, (2,), "(N, D)")
    _checks.expect_shape(
        op, "proxies", proxies, tuple(embeddings.shape), "one proxy per sample, proxies[labels]"
    )
    _checks.expect_alike(op, "proxies", proxies, "embeddings", embeddings)
    labels = _checks.expect_labels(op, labels, embeddings, "embeddings")
    temperature = _checks.expect_temperature(op, temperature, embeddings)
    _checks.expect_choice(op, "reduction", reduction, _common.REDUCTIONS)

    kernels = backends.select(op, embeddings, backend)
    with _common.no_autocast(embeddings):
        if kernels is reference:
            losses = reference.conditional_contrastive(embeddings, proxies, labels, temperature)
            return _common.reduce(losses, reduction)
        _checks.expect_fusable(op, embeddings)
        grad_now = reduction != "none" and _common.wants_grad(embeddings, proxies, temperature)
        loss, _ = ConditionalContrastiveFunction.apply(
            *_common.distinct((embeddings, proxies)),
            temperature,
            labels,
            kernels,
            reduction,
            grad_now,
        )
        return loss


class ConditionalContrastiveFunction(torch.autograd.Function):
    """Autograd of :func:`conditional_contrastive` over the kernels of any fused backend."""

    @staticmethod
    def forward(
        ctx,
        embeddings: Tensor,
        proxies: Tensor,
        temperature: float | Tensor,
        labels: Tensor,
        kernels: ModuleType,
        reduction: str,
        grad_now: bool,
    ) -> tuple[Tensor, Tensor | None]:
        needs = ctx.needs_input_grad[:3]
        kernel_mean = _common.kernel_mean(reduction, embeddings.dtype)
        losses, lse, grads = kernels.conditional_contrastive_forward(
            embeddings,
            proxies,
            labels,
            temperature,
            grad_scale=1.0 if grad_now else None,
            mean=kernel_mean,
            needs=needs,
        )
        ctx.reduced = reduction != "none"
        if ctx.reduced:
            weight = _common.row_weight(embeddings.shape[0], reduction)
            ctx.factor = 1.0 if kernel_mean else weight
            handle = _common.handle(ctx, embeddings, grad_now)
            ctx.save_for_backward(handle, *grads)
            return losses.sum() * weight, handle
        ctx.kernels, ctx.needs = kernels, needs
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        saved = temperature if ctx.temperature is None else None
        ctx.save_for_backward(embeddings, proxies, labels, lse, saved)
        return losses, None

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad_loss: Tensor, _: object):
        nothing = (None,) * 4
        if ctx.reduced:
            return *_common.scaled(saved[1:], grad_loss, ctx.factor), *nothing
        embeddings, proxies, labels, lse, temperature = saved
        temperature = ctx.temperature if temperature is None else temperature
        grads = ctx.kernels.conditional_contrastive_backward(
            grad_loss, embeddings, proxies, labels, temperature, lse, needs=ctx.needs
        )
        return *grads, *nothing
