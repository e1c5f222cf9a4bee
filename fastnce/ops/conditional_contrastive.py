"""ContraGAN's conditional contrastive (2C) loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks, _common
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
        if kernels is backends.reference:
            losses = plain(embeddings, proxies, labels, temperature)
            return _common.reduce(losses, reduction)
        return _common.row_loss(op, kernels, (embeddings, proxies), labels, temperature, reduction)


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
        samples=_samples,
        typical="temperature",
    ),
    # loss (N,) = log den - log num; lse (2, N) = [log den, log num].
    Operator(
        "conditional_contrastive_forward(Tensor embeddings, Tensor proxies, Tensor labels, Tensor? temperature_tensor, "
        "float temperature, float? grad_scale, bool mean, bool need_embeddings, bool need_proxies, bool need_temperature) -> "
        "(Tensor loss, Tensor lse, Tensor grad_embeddings, Tensor grad_proxies, Tensor grad_temperature)",
        _losses,
    ),
    Operator(
        "conditional_contrastive_backward(Tensor grad_loss, Tensor embeddings, Tensor proxies, Tensor labels, "
        "Tensor? temperature_tensor, float temperature, Tensor lse, bool need_embeddings, bool need_proxies, "
        "bool need_temperature) -> (Tensor grad_embeddings, Tensor grad_proxies, Tensor grad_temperature)"
    ),
    conditional_contrastive=plain,
)
