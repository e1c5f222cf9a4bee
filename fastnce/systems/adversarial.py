"""Adversarial objectives on a discriminator's logits, and penalties that keep it smooth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.networks import DiscriminatorOutput

GANMode = Literal["lsgan", "vanilla", "nonsaturating", "hinge"]
# Of systems that add `gradient_penalty`, without which a critic has no bound.
CriticOrGANMode = Literal[GANMode, "wgangp"]
# Of systems that bound the discriminator by its weights, with spectral norm.
MeansOrGANMode = Literal[GANMode, "w"]


def discriminator_losses(
    real: Tensor, fake: Tensor, mode: CriticOrGANMode | MeansOrGANMode
) -> tuple[Tensor, Tensor]:
    """The two terms (on real, on fake) of the discriminator's loss, each the mean over all logits.

    lsgan: (real - 1)^2, fake^2. vanilla and nonsaturating (binary cross-entropy): softplus(-real), softplus(fake).
    hinge: relu(1 - real), relu(1 + fake). wgangp and w: -real, fake. Half-precision logits are raised to fp32.
    """
    real, fake = at_least_fp32(real), at_least_fp32(fake)
    if mode == "lsgan":
        return (real - 1).square().mean(), fake.square().mean()
    if mode == "hinge":
        return F.relu(1 - real).mean(), F.relu(1 + fake).mean()
    if mode in ("wgangp", "w"):
        return -real.mean(), fake.mean()
    return F.softplus(-real).mean(), F.softplus(fake).mean()


def generator_loss(fake: Tensor, mode: CriticOrGANMode | MeansOrGANMode) -> Tensor:
    """The generator's adversarial loss, the mean over all logits.

    lsgan: (fake - 1)^2. vanilla and nonsaturating: softplus(-fake). hinge, wgangp and w: -fake.
    """
    fake = at_least_fp32(fake)
    if mode == "lsgan":
        return (fake - 1).square().mean()
    if mode in ("hinge", "wgangp", "w"):
        return -fake.mean()
    return F.softplus(-fake).mean()


def at_least_fp32(logits: Tensor) -> Tensor:
    """Half-precision values as fp32, others as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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
        logits: (N, ...), each a function of its own image alone; of an image's logits the sum counts.
        images: (N, C, H, W) that require gradients.

    Returns:
        A scalar that has a gradient with respect to D's weights.
    """
    return _image_gradients(logits, images).square().sum(1).mean()


def gradient_penalty(judge: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """WGAN-GP (Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028): mean of (|d logit / d image| - 1)^2 between images.

    Each image lies at a random place on the line from a translated image to a real one.

    Args:
        judge: the critic: (N, C, H, W) to logits (N, ...), of which an image's sum counts (as published for patch critics).
        real: (N, C, H, W).
        fake: (N, C, H, W).

    Returns:
        A scalar that has a gradient with respect to the critic's weights.
    """
    place = torch.rand(len(real), 1, 1, 1, dtype=real.dtype, device=real.device)
    between = torch.lerp(fake.detach().to(real.dtype), real.detach(), place).requires_grad_()
    norms = _image_gradients(judge(between), between).norm(dim=1)
    return (norms - 1).square().mean()


def _image_gradients(logits: Tensor, images: Tensor) -> Tensor:
    """(N, C * H * W): the gradient of each image's sum of logits, itself differentiable."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return at_least_fp32(gradient).flatten(1)
