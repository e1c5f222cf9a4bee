"""What CycleGAN and DCLGAN share: CUT's generator and discriminator, once for each direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastnce.models import options
from fastnce.models.translation import TranslationConfig
from fastnce.networks import PatchDiscriminator, ResnetGenerator


@dataclass(frozen=True, kw_only=True)
class TwoWayConfig(TranslationConfig):
    """The options that CycleGAN and DCLGAN share."""

    num_blocks: int = 9
    """Generator: residual blocks."""
    antialias: bool = True
    """Generator: blur before downsampling."""
    disc_norm: Literal["instance", "none"] = "instance"
    """Discriminator: normalisation."""
    init_gain: float | None = 0.02
    """Gain of the Xavier initialisation of all networks; None: PyTorch's own initialisation, with which short runs start faster."""
    pool_size: int = 0
    """Discriminator: earlier translations to draw from (see `ImagePool`); 0: those of this step only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 1, "num_blocks")
        options.at_least(self, 0, "pool_size")
        options.one_of(self, "disc_norm", ("instance", "none"))
        if self.init_gain is not None:
            options.above_zero(self, "init_gain")


class TwoWayGenerators(nn.Module):
    """The generators of both directions as one network; called, it translates A to B.

    Args:
        config: see `TwoWayConfig`.

    Attributes:
        a_to_b: the published G_A.
        b_to_a: the published G_B.

    Example:
        >>> import torch
        >>> generators = TwoWayGenerators(TwoWayConfig(base_channels=4, num_blocks=1, out_channels=1))
        >>> images = torch.zeros(2, 3, 16, 16)
        >>> generators(images).shape, generators.b_to_a(generators(images)).shape
        (torch.Size([2, 1, 16, 16]), torch.Size([2, 3, 16, 16]))
    """

    def __init__(self, config: TwoWayConfig) -> None:
        super().__init__()
        rest = (config.base_channels, config.num_blocks, config.antialias)
        self.a_to_b = ResnetGenerator(config.in_channels, config.out_channels, *rest)
        self.b_to_a = ResnetGenerator(config.out_channels, config.in_channels, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, in_channels, H, W) of A, translated to B."""
        return self.a_to_b(x)


def build_discriminator(config: TwoWayConfig, in_channels: int) -> PatchDiscriminator:
    """A discriminator of images with that many channels."""
    return PatchDiscriminator(
        in_channels,
        config.disc_channels,
        config.disc_layers,
        antialias=config.disc_antialias,
        norm=config.disc_norm,
    )
