"""BigGAN's generator and discriminator."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastnce.networks.class_layers import embedding
from fastnce.networks.conditional import Conditioning, widths_for
from fastnce.networks.gan_blocks import (
    GENERATOR_WIDTHS,
    ResidualDiscriminator,
    ResidualGenerator,
)


class BigGANGenerator(ResidualGenerator):
    """`g(z, labels) -> images` (N, image_channels, image_size, image_size) in [-1, 1].

    z is cut into one chunk for the first linear layer and one for each block. A block's condition is its chunk behind the
    label's shared embedding. Spectral norm on every layer but that embedding. State-dict keys are those of StudioGAN's
    checkpoints. Published configurations (image_size, latent_dim, base_channels, attention_after) and their parameters:

        CIFAR-10       32,  80, 96, 2:  9,416,196
        Tiny ImageNet  64, 100, 80, 3: 17,335,204
        ImageNet      128, 120, 96, 4: 70,433,988

    Source: Brock et al., "Large Scale GAN Training for High Fidelity Natural Image Synthesis", ICLR 2019; sizes of the
    layers as in Kang and Park, "ContraGAN", NeurIPS 2020.

    Args:
        image_size: 4, 5, 6 or 7 times a power of two, from 16 to 448; below 32 it is ours.
        latent_dim: length of z, a multiple of the number of chunks: 3 from 16 pixels on, 4 from 32, 5 from 64, 6 from 128, 7 from 256.
        num_classes: number of classes.
        base_channels: unit of the widths; 96 and 80 as published.
        shared_dim: length of the label's embedding.
        attention_after: self-attention behind the block of this number, counted from 1; 0 for none.
        image_channels: channels of the images.

    Example:
        >>> import torch
        >>> g = BigGANGenerator(32, latent_dim=80, num_classes=10, base_channels=8)
        >>> g(torch.randn(2, 80), torch.tensor([3, 7])).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        image_size: int,
        latent_dim: int,
        num_classes: int,
        base_channels: int,
        shared_dim: int = 128,
        attention_after: int = 2,
        image_channels: int = 3,
    ) -> None:
        num_chunks = len(widths_for(self, GENERATOR_WIDTHS, image_size))
        if latent_dim % num_chunks:
            raise ValueError(
                f"BigGANGenerator: latent_dim={latent_dim} must be a multiple of {num_chunks}, the number of chunks at "
                f"image_size={image_size}."
            )
        chunk = latent_dim // num_chunks
        super().__init__(
            image_size,
            latent_dim,
            num_classes,
            base_channels,
            image_channels,
            first_dim=chunk,
            condition_dim=shared_dim + chunk,
            attention_after=attention_after,
            spectral=True,
        )
        self.chunk = chunk
        self.shared = embedding(num_classes, shared_dim, spectral=False)

    def _conditions(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Iterable[Tensor]]:
        first, *chunks = z.split(self.chunk, dim=1)
        shared = self.shared(labels)
        return first, [torch.cat([shared, chunk], dim=1) for chunk in chunks]


class BigGANDiscriminator(ResidualDiscriminator):
    """`d(images, labels) -> DiscriminatorOutput`, with spectral norm on every layer.

    State-dict keys are those of StudioGAN's checkpoints. Published configurations (image_size, base_channels, embed_dim)
    and their parameters, with attention after block 1 and conditioning "2C":

        CIFAR-10       32, 96,  512:  2,517,186
        Tiny ImageNet  64, 80,  768: 31,678,130
        ImageNet      128, 96, 1536: 90,343,202

    Source: as `BigGANGenerator`; the heads: `ConditionalDiscriminator`.

    Args:
        image_size: 4, 5, 6 or 7 times a power of two, from 16 to 448.
        num_classes: number of classes.
        base_channels: unit of the widths; 96 and 80 as published.
        attention_after: self-attention behind the block of this number, counted from 1; 0 for none.
        conditioning: "none", "2C", "D2DCE", "AC" or "PD".
        embed_dim: length of embedding and proxy (2C, D2DCE).
        image_channels: channels of the images.

    Example:
        >>> import torch
        >>> d = BigGANDiscriminator(32, num_classes=10, base_channels=8)
        >>> out = d(torch.zeros(2, 3, 32, 32), torch.tensor([3, 7]))
        >>> out.adversarial.shape, out.features.shape, out.embedding.shape, out.proxy.shape, out.class_logits
        (torch.Size([2]), torch.Size([2, 16]), torch.Size([2, 512]), torch.Size([2, 512]), None)
    """

    def __init__(
        self,
        image_size: int,
        num_classes: int,
        base_channels: int,
        attention_after: int = 1,
        conditioning: Conditioning = "2C",
        embed_dim: int = 512,
        image_channels: int = 3,
    ) -> None:
        super().__init__(
            image_size,
            num_classes,
            base_channels,
            image_channels,
            conditioning,
            embed_dim=embed_dim,
            attention_after=attention_after,
            norm="spectral",
        )
