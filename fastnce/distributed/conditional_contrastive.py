"""ContraGAN's conditional contrastive (2C) loss over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastnce import ops
from fastnce.distributed._labelled_lse import LabelledLSE
from fastnce.distributed._losses import GRADIENT_SCALES, Options, expect_rows, make_plan
from fastnce.distributed._ranks import Fact, ranks_of
from fastnce.ops import _checks, _common
from fastnce.reference.normalize import accumulation_dtype, normalize_rows


@torch.compiler.disable
def conditional_contrastive(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    strategy: str = "auto",
    gradient_scale: str = "mean",
    check: bool = True,
    backend: str | None = None,
) -> Tensor:
    """:func:`fastnce.conditional_contrastive` of the samples of all ranks, exactly.

    Args:
        embeddings: (N, D), this rank's; N may differ between ranks, and be 0 on some.
        proxies: (N, D), row i the embedding of the class of sample i.
        labels: (N,) integers.
        temperature: positive float, or tensor of one element, which gets its gradient.
        reduction: ``"mean"`` over the samples of all ranks, ``"sum"``, or ``"none"`` for this rank's (N,).
        group: as ``torch.distributed`` has it; None is the default group. Alone, or without one, the plain op runs.
        strategy: see :mod:`fastnce.distributed`.
        gradient_scale: ``"mean"`` and ``"sum"``, see :mod:`fastnce.distributed`; with ``reduction="none"`` both leave one's own
            ``losses.mean()`` for DDP to average. Or ``"published"``, the gradients of the published code (StudioGAN): 1 / ranks of
            ``"mean"``, so that under DDP the loss weighs 1 / ranks of what it weighs in one process.
        check: see :mod:`fastnce.distributed`.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The same loss on every rank (``"none"``: this rank's losses), float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or options that do not fit together, here or between ranks.
        RuntimeError: another rank's arguments are invalid, or it has ended.

    Example:
        >>> import torch, fastnce.distributed  # one process: the plain op
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> classes = torch.nn.Embedding(2, 16)
        >>> loss = fastnce.distributed.conditional_contrastive(torch.randn(4, 16), classes(labels), labels)
    """
    op = "conditional_contrastive"
    ranks = ranks_of(group)
    if ranks is None:
        return ops.conditional_contrastive(
            embeddings,
            proxies,
            labels,
            temperature=temperature,
            reduction=reduction,
            backend=backend,
        )
    options = Options(temperature, reduction, strategy, gradient_scale, check, backend)
    embeddings, proxies = _checks.same_dtype_under_autocast(embeddings, proxies)

    def validate() -> dict[str, Fact]:
        expect_rows(op, "embeddings", embeddings)
        expect_rows(op, "proxies", proxies)
        shape = tuple(embeddings.shape)
        _checks.expect_shape(op, "proxies", proxies, shape, "one proxy per sample, proxies[labels]")
        _checks.expect_alike(op, "proxies", proxies, "embeddings", embeddings)
        _checks.expect_labels(op, labels, embeddings, "embeddings")
        grad = _common.wants_grad(embeddings, proxies, temperature)
        facts = options.validated(op, embeddings, (*GRADIENT_SCALES, "published"))
        return facts | {"whether gradients are needed": grad}

    plan = make_plan(op, "labelled_lse", ranks, embeddings, options, validate)
    tau = _checks.expect_temperature(op, temperature, embeddings)
    with _common.no_autocast(embeddings):
        lse = LabelledLSE.apply(embeddings, tau, labels.long(), plan.exchange, plan.kernels, 1)
        dtype = accumulation_dtype(embeddings.dtype)
        units = normalize_rows(embeddings.to(dtype)) * normalize_rows(proxies.to(dtype))
        to_proxy = units.sum(dim=1).double() / tau
        losses = torch.logaddexp(lse[:, 0], to_proxy) - torch.logaddexp(lse[:, 1], to_proxy)
        return plan.reduce(losses, None, embeddings.dtype)
