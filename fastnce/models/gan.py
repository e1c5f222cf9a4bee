"""Adversarial objectives on a discriminator's logits."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GANMode = Literal["lsgan", "vanilla", "nonsaturating", "hinge"]
# Of systems that add `regularisers.gradient_penalty`, without which a critic has no bound.
CriticOrGANMode = Literal[GANMode, "wgangp"]


def discriminator_losses(
    real: Tensor, fake: Tensor, mode: CriticOrGANMode
) -> tuple[Tensor, Tensor]:
    """The two terms (on real, on fake) of the discriminator's loss, each the mean over all logits.

    lsgan: (real - 1)^2, fake^2. vanilla and nonsaturating (binary cross-entropy): softplus(-real), softplus(fake).
    hinge: relu(1 - real), relu(1 + fake). wgangp: -real, fake. Half-precision logits are raised to fp32.
    """
    real, fake = at_least_fp32(real), at_least_fp32(fake)
    if mode == "lsgan":
        return (real - 1).square().mean(), fake.square().mean()
    if mode == "hinge":
        return F.relu(1 - real).mean(), F.relu(1 + fake).mean()
    if mode == "wgangp":
        return -real.mean(), fake.mean()
    return F.softplus(-real).mean(), F.softplus(fake).mean()


def generator_loss(fake: Tensor, mode: CriticOrGANMode) -> Tensor:
    """The generator's adversarial loss, the mean over all logits.

    lsgan: (fake - 1)^2. vanilla and nonsaturating: softplus(-fake). hinge and wgangp: -fake.
    """
    fake = at_least_fp32(fake)
    if mode == "lsgan":
        return (fake - 1).square().mean()
    if mode in ("hinge", "wgangp"):
        return -fake.mean()
    return F.softplus(-fake).mean()


def at_least_fp32(logits: Tensor) -> Tensor:
    """Half-precision values as fp32, others as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
