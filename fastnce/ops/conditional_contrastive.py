"""ContraGAN's conditional contrastive (2C) loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastnce.ops import _checks, _common
from fastnce.ops._over_ranks import GRADIENT_SCALES, OverRanks
from fastnce.ops.labelled_lse import LabelledLSE
from fastnce.ranks import Fact
from fastnce.reference.normalize import accumulation_dtype, normalize_rows, over_temperature
from fastnce.registry import Make, Op, Operator, Sample, declare


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
    builds an N x N x D array; plain PyTorch with one matrix product is ``fastnce.reference.conditional_contrastive``.

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

    Examples:
        >>> import torch, fastnce
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> classes = torch.nn.Embedding(2, 16)
        >>> fastnce.conditional_contrastive(torch.randn(4, 16), classes(labels), labels).backward()
    """
    op = "conditional_contrastive"
    embeddings, proxies = _checks.same_dtype_under_autocast(embeddings, proxies)
    labels = _checked_labels(op, embeddings, proxies, labels)
    rows = (embeddings, proxies)
    return _common.row_loss(op, plain, rows, labels, temperature, reduction, backend)


def plain(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, temperature: float | Tensor
) -> Tensor:
    """``loss_i = log den_i - log num_i``, with the sums over ``exp(cosine / t)``.

    ``den_i`` sums the sample's own proxy and all other samples; ``num_i`` its own proxy and the other samples of its class.

    Args:
        embeddings: (N, D).
        proxies: (N, D); row i is the proxy of sample i's class.
        labels: (N,) int64.
        temperature: t, a float or a 0-d tensor.

    Returns:
        (N,), fp32 (fp64 for fp64 inputs).
    """
    dtype = accumulation_dtype(embeddings.dtype)
    embeddings, proxies = normalize_rows(embeddings.to(dtype)), normalize_rows(proxies.to(dtype))

    is_self = torch.eye(labels.shape[0], dtype=torch.bool, device=labels.device)
    is_other_class = labels[:, None] != labels[None, :]  # (N, N)
    to_proxy = (embeddings * proxies).sum(dim=-1, keepdim=True)  # (N, 1)
    logits = torch.cat([to_proxy, embeddings @ embeddings.T], dim=1)
    logits = over_temperature(logits, temperature)  # (N, 1 + N)

    def lse_without(others: Tensor) -> Tensor:
        return logits.masked_fill(F.pad(others, (1, 0)), -torch.inf).logsumexp(dim=1)

    return lse_without(is_self) - lse_without(is_self | is_other_class)


def _checked_labels(
    op: str, embeddings: Tensor, proxies: Tensor, labels: Tensor, may_be_empty: bool = False
) -> Tensor:
    _checks.expect_rows(op, "embeddings", embeddings, may_be_empty=may_be_empty)
    _checks.expect_rows(
        op,
        "proxies",
        proxies,
        may_be_empty=may_be_empty,
        like=embeddings,
        like_name="embeddings",
        why="one proxy per sample, proxies[labels]",
    )
    return _checks.expect_labels(op, labels, embeddings, "embeddings")


@torch.compiler.disable
def over_ranks(
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
    """``fastnce.conditional_contrastive`` of the samples of all ranks, exactly.

    Args:
        embeddings: (N, D), this rank's; N may differ between ranks, and be 0 on some.
        proxies: (N, D), row i the embedding of the class of sample i.
        labels: (N,) integers.
        temperature: positive float, or tensor of one element, which gets its gradient.
        reduction: ``"mean"`` over the samples of all ranks, ``"sum"``, or ``"none"`` for this rank's (N,).
        group, strategy, check: see ``fastnce.distributed``.
        gradient_scale: ``"mean"`` and ``"sum"``, see ``fastnce.distributed``; with ``reduction="none"`` both leave one's own
            ``losses.mean()`` for DDP to average. Or ``"published"``, the gradients of the published code (StudioGAN): 1 / ranks of
            ``"mean"``, so that under DDP the loss weighs 1 / ranks of what it weighs in one process.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The same loss on every rank (``"none"``: this rank's losses), float32 (float64 for float64 inputs).

    Examples:
        >>> import torch, fastnce.distributed  # one process: the plain op
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> classes = torch.nn.Embedding(2, 16)
        >>> loss = fastnce.distributed.conditional_contrastive(torch.randn(4, 16), classes(labels), labels)
    """
    op = "conditional_contrastive"
    call = OverRanks(op, group, temperature, reduction, strategy, gradient_scale, check, backend)
    if call.alone:
        return conditional_contrastive(embeddings, proxies, labels, **call.plain)
    embeddings, proxies = _checks.same_dtype_under_autocast(embeddings, proxies)

    def validate() -> dict[str, Fact]:
        _checked_labels(op, embeddings, proxies, labels, may_be_empty=True)
        grad = _common.wants_grad(embeddings, proxies, temperature)
        return {"whether gradients are needed": grad}

    call.agree("labelled_lse", embeddings, validate, (*GRADIENT_SCALES, "published"))
    with _common.no_autocast(embeddings):
        lse = LabelledLSE.apply(
            embeddings, call.temperature, labels.long(), call.exchange, call.kernels, 1
        )
        dtype = accumulation_dtype(embeddings.dtype)
        units = normalize_rows(embeddings.to(dtype)) * normalize_rows(proxies.to(dtype))
        to_proxy = units.sum(dim=1).double() / call.temperature
        losses = torch.logaddexp(lse[:, 0], to_proxy) - torch.logaddexp(lse[:, 1], to_proxy)
        return call.reduce(losses, None, embeddings.dtype)


def _samples(make: Make) -> Iterator[Sample]:
    embeddings = make(34, 20)
    labels = torch.randint(5, (34,), generator=make.generator).to(embeddings.device)
    both = {"embeddings": embeddings, "proxies": make.similar(embeddings), "labels": labels}
    yield Sample("mean", both)
    yield Sample("temperature", {**both, "temperature": torch.tensor(0.2, requires_grad=True)})
    yield Sample("none", {**both, "temperature": 0.1, "reduction": "none"})
    yield Sample("int32_labels", {**both, "labels": labels.int(), "reduction": "sum"})
    yield Sample("detached_proxies", {**both, "proxies": both["proxies"].detach()})


def _losses(embeddings: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    rows, dtype = embeddings.shape[0], accumulation_dtype(embeddings.dtype)
    return embeddings.new_empty((rows,), dtype=dtype), embeddings.new_empty((2, rows), dtype=dtype)


declare(
    Op(
        "conditional_contrastive",
        function=conditional_contrastive,
        over_ranks=over_ranks,
        samples=_samples,
    ),
    # loss (N,) = log den - log num; lse (2, N) = [log den, log num].
    Operator(
        "conditional_contrastive_forward(Tensor embeddings, Tensor proxies, Tensor labels, Tensor? temperature_tensor, "
        "float temperature, bool bfloat16_products, float? grad_scale, bool mean, bool need_embeddings, bool need_proxies, bool need_temperature) -> "
        "(Tensor loss, Tensor lse, Tensor grad_embeddings, Tensor grad_proxies, Tensor grad_temperature)",
        _losses,
    ),
    Operator(
        "conditional_contrastive_backward(Tensor grad_loss, Tensor embeddings, Tensor proxies, Tensor labels, "
        "Tensor? temperature_tensor, float temperature, Tensor lse, bool bfloat16_products, bool need_embeddings, bool need_proxies, "
        "bool need_temperature) -> (Tensor grad_embeddings, Tensor grad_proxies, Tensor grad_temperature)"
    ),
    conditional_contrastive=plain,
)
