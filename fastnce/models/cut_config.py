"""CUT's options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from fastnce.errors import UserError
from fastnce.models import options
from fastnce.models.channels import can_convert
from fastnce.models.gan import CriticOrGANMode
from fastnce.models.patch_contrast_config import PatchContrastConfig
from fastnce.models.translation_config import UnpairedConfig


@dataclass(frozen=True, kw_only=True)
class CUTConfig(PatchContrastConfig, UnpairedConfig):
    """What defines CUT's networks, losses and optimisers. The defaults are the published CUT."""

    gan_mode: CriticOrGANMode = "lsgan"
    """Adversarial objective."""
    lambda_gp: float = 10.0
    """Weight of the gradient penalty of wgangp, relative to the critic's loss."""
    lambda_r1: float = 0.0
    """Weight of R1, the penalty on the discriminator's gradient at real images; 0 turns it off."""
    lambda_gan: float = 1.0
    """Weight of the generator's adversarial loss."""
    lambda_nce: float = 1.0
    """Weight of the contrastive loss; 0 turns it off, together with everything it needs."""
    nce_idt: bool = True
    """Add the contrastive loss between images of B and their translation (the identity loss of CUT)."""
    lambda_identity: float = 0.0
    """Weight of the L1 distance between images of B and their translation; 0 turns it off."""
    flip_equivariance: bool = False
    """FastCUT: mirror the generator's input in half of the steps and its features back."""
    reuse_features: bool = True
    """Take the keys from the generator's own forward pass (exact) instead of encoding the input again."""

    def __post_init__(self) -> None:
        PatchContrastConfig.__post_init__(self)
        UnpairedConfig.__post_init__(self)
        options.at_least(self, 0, "lambda_gan", "lambda_nce", "lambda_r1", "lambda_identity")
        options.above_zero(self, "lambda_gp")
        options.one_of(self, "gan_mode", get_args(CriticOrGANMode))
        self._check_channels()

    def _check_channels(self) -> None:
        if self.in_channels == self.out_channels:
            return
        both = f"in_channels={self.in_channels} and out_channels={self.out_channels}"
        if self.lambda_identity > 0:
            raise UserError(
                f"lambda_identity={self.lambda_identity} compares images of B with their translations, which {both} make "
                "different. Use lambda_identity=0."
            )
        if self.lambda_nce > 0 and not can_convert(self.in_channels, self.out_channels):
            raise UserError(
                f"{both}: the contrastive loss encodes translations like images of A, and only grey (1) and RGB (3) turn into "
                "each other. Use the same number of channels, or lambda_nce=0."
            )
