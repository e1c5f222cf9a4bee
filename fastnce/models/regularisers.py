"""Penalties on a discriminator that keep it smooth: consistency under a change of its input, and R1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.models.gan import at_least_fp32
from fastnce.networks import DiscriminatorOutput


def consistency(one: DiscriminatorOutput, other: DiscriminatorOutput) -> Tensor:
    """Mean squared differences of the logits, the unit embeddings and the class logits of the same N images, added up.

    Source: CR (Zhang et al. 2020, https://arxiv.org/abs/1910.12027) and ICR (Zhao et al. 2021, https://arxiv.org/abs/2002.04724).
    """
    total = F.mse_loss(*(at_least_fp32(output.adversarial) for output in (one, other)))
    if one.embedding is not None:
        units = (F.normalize(at_least_fp32(output.embedding)) for output in (one, other))
        total = total + F.mse_loss(*units)
    if one.class_logits is not None:
        logits = (at_least_fp32(output.class_logits) for output in (one, other))
        total = total + F.mse_loss(*logits)
    return total


def r1(logits: Tensor, images: Tensor) -> Tensor:
    """R1 (Mescheder et al. 2018, https://arxiv.org/abs/1801.04406): mean over images of |d logit / d image|^2.

    Args:
        logits: (N,), each a function of its own image alone.
        images: (N, C, H, W) that require gradients.

    Returns:
        A scalar that has a gradient with respect to D's weights.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return at_least_fp32(gradient).square().flatten(1).sum(1).mean()
