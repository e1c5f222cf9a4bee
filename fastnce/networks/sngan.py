"""SNGAN's residual generator and discriminator (SNResGAN)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import Tensor

from fastnce.networks.class_layers import DiscriminatorNorm, one_hot
from fastnce.networks.conditional import Conditioning
from fastnce.networks.gan_blocks import ResidualDiscriminator, ResidualGenerator


class SNGANGenerator(ResidualGenerator):
    """`g(z, labels) -> images` (N, image_channels, image_size, image_size) in [-1, 1].

    BigGAN's blocks and widths without its chunks, embedding and attention: the first layer takes the whole of z, the blocks'
    norms are conditioned on the one-hot label.

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018: the tables of its
    residual networks for CIFAR-10 (32 pixels) and ImageNet (128), which have base_channels=64 and latent_dim=128. 64 pixels
    are those of 128 with one of the two widest blocks less, 16 those of 32 with one block less. The label enters as in Miyato
    and Koyama, "cGANs with Projection Discriminator", ICLR 2018.

    Args:
        image_size: 4, 5, 6 or 7 times a power of two, from 16 to 448.
        latent_dim: length of z.
        num_classes: number of classes.
        base_channels: unit of the widths, 64 as published.
        image_channels: channels of the images.
        spectral_norm: spectral norm on every layer; the published generator has none.

    Example:
        >>> import torch
        >>> g = SNGANGenerator(32, latent_dim=128, num_classes=10, base_channels=8)
        >>> g(torch.randn(2, 128), torch.tensor([3, 7])).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        image_size: int,
        latent_dim: int,
        num_classes: int,
        base_channels: int,
        image_channels: int = 3,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__(
            image_size,
            latent_dim,
            num_classes,
            base_channels,
            image_channels,
            first_dim=latent_dim,
            condition_dim=num_classes,
            attention_after=0,
            spectral=spectral_norm,
        )

    def _conditions(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Iterable[Tensor]]:
        return z, itertools.repeat(one_hot(labels, self.num_classes, z))


class SNGANDiscriminator(ResidualDiscriminator):
    """`d(images, labels) -> DiscriminatorOutput`: BigGAN's discriminator without attention.

    norm="batch" is that of ACGAN-Mod and ProjGAN, the weak baselines of the ContraGAN paper.

    Source: as `SNGANGenerator`; its skips through ReLU'd inputs as in `DiscriminatorBlock`. The heads:
    `ConditionalDiscriminator`.

    Args:
        image_size: 4, 5, 6 or 7 times a power of two, from 16 to 448.
        num_classes: number of classes.
        base_channels: unit of the widths, 64 as published.
        conditioning: "none", "2C", "D2DCE", "AC" or "PD".
        embed_dim: length of embedding and proxy (2C, D2DCE).
        image_channels: channels of the images.
        norm: "spectral" on every layer, "batch" in the blocks, or "none".

    Example:
        >>> import torch
        >>> d = SNGANDiscriminator(32, num_classes=10, base_channels=8, conditioning="AC")
        >>> d(torch.zeros(2, 3, 32, 32), torch.tensor([3, 7])).class_logits.shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        image_size: int,
        num_classes: int,
        base_channels: int,
        conditioning: Conditioning = "2C",
        embed_dim: int = 512,
        image_channels: int = 3,
        norm: DiscriminatorNorm = "spectral",
    ) -> None:
        super().__init__(
            image_size,
            num_classes,
            base_channels,
            image_channels,
            conditioning,
            embed_dim=embed_dim,
            attention_after=0,
            norm=norm,
        )
