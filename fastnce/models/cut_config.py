"""CUT's options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fastnce.errors import UserError
from fastnce.models import options
from fastnce.models.channels import can_convert
from fastnce.models.gan import CriticOrGANMode
from fastnce.models.patch_contrast_config import PatchContrastConfig


@dataclass(frozen=True, kw_only=True)
class CUTConfig(PatchContrastConfig):
    """What defines CUT's networks, losses and optimisers. The defaults are the published CUT."""

    in_channels: int = 3
    """Channels of the images of A: 3 for RGB, 1 for grey."""
    out_channels: int = 3
    """Channels of the images of B and of the translations."""
    generator: Literal["resnet", "stylegan2"] = "resnet"
    """Generator: resnet, or stylegan2 as in SinCUT."""
    base_channels: int = 64
    """Generator: channels after the first layer."""
    num_blocks: int = 9
    """Generator: residual blocks (resnet)."""
    antialias: bool = True
    """Generator: blur before downsampling (resnet)."""
    discriminator: Literal["patch", "stylegan2"] = "patch"
    """Discriminator: patch, or stylegan2 as in SinCUT."""
    disc_antialias: bool = True
    """Discriminator: blur before downsampling; with it off, strided convolutions (patch)."""
    disc_channels: int = 64
    """Discriminator: channels of the first layer."""
    disc_layers: int = 3
    """Discriminator: downsampling layers (patch)."""
    disc_norm: Literal["instance", "none"] = "instance"
    """Discriminator: normalisation (patch)."""
    init_gain: float | None = 0.02
    """Gain of the Xavier initialisation of all networks but stylegan2; None: PyTorch's own, with which short runs start faster."""
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
    lr: float = 2e-4
    """Adam: learning rate of all networks."""
    beta1: float = 0.5
    """Adam: decay of the mean gradient."""
    beta2: float = 0.999
    """Adam: decay of the squared gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: networks run under autocast; parameters and losses stay fp32."""

    def __post_init__(self) -> None:
        PatchContrastConfig.__post_init__(self)
        options.at_least(self, 1, "in_channels", "out_channels", "base_channels", "num_blocks")
        options.at_least(self, 1, "disc_channels", "disc_layers")
        options.above_zero(self, "lr")
        if self.init_gain is not None:
            options.above_zero(self, "init_gain")
        options.in_unit_interval(self, "beta1", "beta2")
        options.one_of(self, "generator", ("resnet", "stylegan2"))
        options.one_of(self, "discriminator", ("patch", "stylegan2"))
        options.one_of(self, "disc_norm", ("instance", "none"))
        options.one_of(self, "precision", ("fp32", "bf16"))
        options.at_least(self, 0, "lambda_gan", "lambda_nce", "lambda_r1", "lambda_identity")
        options.above_zero(self, "lambda_gp")
        options.one_of(self, "gan_mode", get_args(CriticOrGANMode))
        if self.generator == "stylegan2" and self.num_blocks % 2:
            raise UserError(
                f"num_blocks={self.num_blocks} are shared by encoder and decoder of generator=stylegan2. Use an even number."
            )
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
