"""Options of the systems that translate images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fastnce.errors import UserError
from fastnce.models import options
from fastnce.models.gan import GANMode


@dataclass(frozen=True, kw_only=True)
class TranslationConfig:
    """The options that mean the same in all of them."""

    in_channels: int = 3
    """Channels of the images of A: 3 for RGB, 1 for grey."""
    out_channels: int = 3
    """Channels of the images of B and of the translations."""
    base_channels: int = 64
    """Generator: channels after the first layer."""
    disc_antialias: bool = True
    """Discriminator: blur before downsampling; with it off, strided convolutions (patch)."""
    disc_channels: int = 64
    """Discriminator: channels of the first layer."""
    disc_layers: int = 3
    """Discriminator: downsampling layers (patch)."""
    lr: float = 2e-4
    """Adam: learning rate of generators and discriminators."""
    beta1: float = 0.5
    """Adam: decay of the mean gradient."""
    beta2: float = 0.999
    """Adam: decay of the squared gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: networks run under autocast; parameters and losses stay fp32."""

    def __post_init__(self) -> None:
        options.at_least(self, 1, "in_channels", "out_channels", "base_channels")
        options.at_least(self, 1, "disc_channels", "disc_layers")
        options.above_zero(self, "lr")
        options.in_unit_interval(self, "beta1", "beta2")
        options.one_of(self, "precision", ("fp32", "bf16"))


@dataclass(frozen=True, kw_only=True)
class UnpairedConfig(TranslationConfig):
    """The options of CUT's networks, which CycleGAN and DCLGAN have once for each direction."""

    generator: Literal["resnet", "stylegan2"] = "resnet"
    """Generator: resnet, or stylegan2 as in SinCUT."""
    num_blocks: int = 9
    """Generator: residual blocks."""
    antialias: bool = True
    """Generator: blur before downsampling (resnet)."""
    antialias_up: bool = True
    """Generator: upsample with a filter; with it off, transposed convolutions (resnet)."""
    discriminator: Literal["patch", "stylegan2"] = "patch"
    """Discriminator: patch, or stylegan2 as in SinCUT."""
    disc_norm: Literal["instance", "none"] = "instance"
    """Discriminator: normalisation (patch)."""
    init_gain: float | None = 0.02
    """Gain of the Xavier initialisation of all networks but stylegan2; None: PyTorch's own, with which short runs start faster."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.one_of(self, "generator", ("resnet", "stylegan2"))
        options.one_of(self, "discriminator", ("patch", "stylegan2"))
        options.one_of(self, "disc_norm", ("instance", "none"))
        options.at_least(self, 1, "num_blocks")
        if self.init_gain is not None:
            options.above_zero(self, "init_gain")
        if self.generator == "stylegan2" and self.num_blocks % 2:
            raise UserError(
                f"num_blocks={self.num_blocks} are shared by encoder and decoder of generator=stylegan2. Use an even number."
            )


@dataclass(frozen=True, kw_only=True)
class TwoWayConfig(UnpairedConfig):
    """The options that CycleGAN and DCLGAN share."""

    gan_mode: GANMode = "lsgan"
    """Adversarial objective."""
    pool_size: int = 0
    """Discriminator: earlier translations to draw from (see `ImagePool`); 0: those of this step only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.one_of(self, "gan_mode", get_args(GANMode))
        options.at_least(self, 0, "pool_size")
