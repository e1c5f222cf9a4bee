"""What the systems that translate in both directions share, CycleGAN and DCLGAN: networks and the discriminators' side."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor, nn

from fastnce.models.cut_networks import build_discriminator, build_generator, initialise
from fastnce.models.gan import discriminator_losses
from fastnce.models.image_pool import ImagePool
from fastnce.models.translation import adam, autocast, descend, together
from fastnce.models.translation_config import TwoWayConfig


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
        self.a_to_b = build_generator(config)
        self.b_to_a = build_generator(reverse(config))

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, in_channels, H, W) of A, translated to B."""
        return self.a_to_b(x)


class TwoWayModel(nn.Module):
    """Base of CycleGAN and DCLGAN: `generators`, `discriminator_a`, `discriminator_b`, their Adam `optimizers` and pools.

    As published, D_A judges images of B, the translations of G_A, and D_B judges images of A.

    Args:
        config: see `TwoWayConfig`.
        image_size: (height, width) of the training images.
    """

    def __init__(self, config: TwoWayConfig, image_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.generators = TwoWayGenerators(config)
        self.discriminator_a = build_discriminator(config, image_size)
        self.discriminator_b = build_discriminator(reverse(config), image_size)
        self.pool_a, self.pool_b = ImagePool(config.pool_size), ImagePool(config.pool_size)
        self._two_way = config
        discriminators = (self.discriminator_a, self.discriminator_b)
        for network in (self.generators, *discriminators):
            initialise(network, config.init_gain)
        self.optimizers = {"G": adam(config, self.generators), "D": adam(config, *discriminators)}

    def _update_discriminators(
        self, real_a: Tensor, real_b: Tensor, fake_a: Tensor, fake_b: Tensor
    ) -> dict[str, Tensor]:
        """One step of both; their losses "D_A" and "D_B", each the mean of the terms on real and on translated images."""
        losses = {
            "D_A": self._discriminator_loss(self.discriminator_a, real_b, self.pool_a(fake_b)),
            "D_B": self._discriminator_loss(self.discriminator_b, real_a, self.pool_b(fake_a)),
        }
        descend(losses["D_A"] + losses["D_B"], self.optimizers["D"])
        return losses

    def _discriminator_loss(self, discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        discriminator.requires_grad_(True)
        with self._autocast():
            real_logits, fake_logits = together(discriminator, real, fake.to(real))
        mode = self._two_way.gan_mode
        real_loss, fake_loss = discriminator_losses(real_logits, fake_logits, mode)
        return 0.5 * (real_loss + fake_loss)

    def _judge(self, fake_a: Tensor, fake_b: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the frozen discriminators: D_A on `fake_b` and D_B on `fake_a`."""
        self.discriminator_a.requires_grad_(False)
        self.discriminator_b.requires_grad_(False)
        with self._autocast():
            return self.discriminator_a(fake_b), self.discriminator_b(fake_a)

    def _autocast(self) -> AbstractContextManager:
        return autocast(self._two_way, next(self.parameters()).device)


def reverse(config: TwoWayConfig) -> TwoWayConfig:
    """The options of the networks from B to A."""
    return replace(config, in_channels=config.out_channels, out_channels=config.in_channels)
