"""CUT's options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from fastnce.models import options
from fastnce.models.gan import GANMode
from fastnce.models.translation_config import NetworkConfig, PatchContrastConfig


@dataclass(frozen=True, kw_only=True)
class CUTConfig(NetworkConfig, PatchContrastConfig):
    """What defines CUT's networks, losses and optimisers. The defaults are the published CUT."""

    gan_mode: GANMode = "lsgan"
    """Adversarial objective."""
    lambda_gan: float = 1.0
    """Weight of the generator's adversarial loss."""
    lambda_nce: float = 1.0
    """Weight of the contrastive loss; 0 turns it off, together with everything it needs."""
    nce_idt: bool = True
    """Add the contrastive loss between images of B and their translation (the identity loss of CUT)."""
    flip_equivariance: bool = False
    """FastCUT: mirror the generator's input in half of the steps and its features back."""
    reuse_features: bool = True
    """Take the keys from the generator's own forward pass (exact) instead of encoding the input again."""

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        PatchContrastConfig.__post_init__(self)
        options.at_least(self, 0, "lambda_gan", "lambda_nce")
        options.one_of(self, "gan_mode", get_args(GANMode))
