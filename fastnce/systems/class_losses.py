"""Losses that bind an image's embedding or logits to its class: 2C, D2D-CE and the auxiliary classifier's."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnce.distributed
from fastnce.systems.adversarial import at_least_fp32


def contrastive_2c(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    group_size: int | None = None,
    extra: tuple[Tensor, Tensor, Tensor] | None = None,
    gradient_scale: Literal["mean", "published"] = "mean",
    backend: str | None = None,
) -> Tensor:
    """ContraGAN's 2C loss over a batch, over groups of it, or with further samples to contrast with.

    With `torch.distributed`, the batch is that of all ranks, exactly; groups and further samples are each rank's own.

    Args:
        embeddings: (N, E), not normalised.
        proxies: (N, E), row i the proxy of the class of sample i.
        labels: (N,) int64.
        temperature: of the similarities.
        group_size: contrast each sample only with those of its group of so many consecutive samples; the last group may be
            smaller. None, the published form: with the whole batch.
        extra: embeddings (M, E), proxies (M, E) and labels (M,) of samples that join the contrast but have no loss of their own.
        gradient_scale: over ranks, see `fastnce.distributed.conditional_contrastive`: "mean" gives, with gradients averaged
            over ranks, those of one process; "published" divides them by the number of ranks, as the published code does.
        backend: as of `fastnce.conditional_contrastive`.

    Returns:
        The mean over the N samples; those of all ranks for a whole batch.

    Source:
        Kang and Park 2020, https://arxiv.org/abs/2006.12681; the groups and the further samples are ours.
    """
    if group_size is None and extra is None:
        return fastnce.distributed.conditional_contrastive(
            embeddings,
            proxies,
            labels,
            temperature=temperature,
            gradient_scale=gradient_scale,
            backend=backend,
        )
    size = group_size or len(embeddings)
    total = embeddings.new_zeros((), dtype=torch.promote_types(embeddings.dtype, torch.float32))
    parts = (embeddings.split(size), proxies.split(size), labels.split(size))
    for part in zip(*parts, strict=True):
        own = len(part[0])
        if extra is not None:
            part = tuple(torch.cat(pair) for pair in zip(part, extra, strict=True))
        losses = fastnce.conditional_contrastive(
            *part, temperature=temperature, reduction="none", backend=backend
        )
        total = total + losses[:own].sum()
    return total / len(embeddings)


def d2d_ce(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.5,
    margin: float = 0.98,
) -> Tensor:
    r"""ReACGAN's data-to-data cross-entropy (Kang et al. 2021, https://arxiv.org/abs/2111.01118).

    .. math:: \ell_i = a_i + \log \Big( e^{-a_i} + \sum_{j : y_j \ne y_i} e^{[b_{ij}]_+ - m_i} \Big), \quad
              a_i = [(\mu - s_{ip}) / \tau]_+, \quad b_{ij} = (s_{ij} + \mu - 1) / \tau, \quad m_i = \max_{j \ne i} b_{ij}

    with the cosines :math:`s_{ij}` of two samples and :math:`s_{ip}` of a sample and its class's proxy, and the margin
    :math:`\mu`. Subtracting :math:`m_i`, without gradient, is part of the published loss: it does not cancel.

    Args:
        embeddings: (N, E), not normalised.
        proxies: (N, E), row i the proxy of the class of sample i.
        labels: (N,) int64.
        temperature: tau.
        margin: mu; similarities to the proxy above it, and to other classes below 1 - mu, cost nothing.

    Returns:
        The mean over the samples. Takes N x N memory.
    """
    embeddings, proxies = (F.normalize(at_least_fp32(x)) for x in (embeddings, proxies))
    positive = F.relu((margin - (embeddings * proxies).sum(1)) / temperature)
    logits = (embeddings @ embeddings.T + margin - 1) / temperature
    itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    largest = logits.detach().masked_fill(itself, -torch.inf).amax(1, keepdim=True)
    largest = largest.nan_to_num(neginf=0.0)  # a sample alone
    same_class = labels[:, None] == labels
    negatives = (F.relu(logits) - largest).masked_fill(same_class, -torch.inf).exp().sum(1)
    return (positive + torch.log(torch.exp(-positive) + negatives)).mean()


def auxiliary_classifier(class_logits: Tensor, labels: Tensor) -> Tensor:
    """ACGAN's cross-entropy of the classifier beside the discriminator. (N, K) and (N,) to a scalar."""
    return F.cross_entropy(at_least_fp32(class_logits), labels)
