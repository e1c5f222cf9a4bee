"""The small networks without skips, in the manner of DCGAN (SNDCGAN)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.networks.conditional import (
    ConditionalBatchNorm,
    ConditionalDiscriminator,
    ConditionalGenerator,
    Conditioning,
    DiscriminatorNorm,
    Widths,
    conv2d,
    discriminator_norm,
    one_hot,
    upsample_conv2d,
)

# The generator's maps from the smallest on, the discriminator's reversed.
WIDTHS = {
    16: (4, 2, 1),
    32: (8, 4, 2, 1),
    64: (16, 8, 4, 2, 1),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 16, 8, 4, 2, 1),
}


class DCGANGenerator(ConditionalGenerator):
    """`g(z, labels) -> images` (N, image_channels, image_size, image_size) in [-1, 1].

    Linear layer to a 4x4 map (or 5x5 to 7x7, see `smallest_map`); 4x4 transposed convolutions of stride 2, each with a batch
    norm conditioned on the one-hot label and ReLU; conv3, tanh.

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018, Table 3, which is 32
    pixels with base_channels=64 and latent_dim=128 and has no labels; the conditional norm is that of its residual network.
    The other sizes have as many stages as they need.

    Args:
        base_channels: channels of the last map, 64 as published.
        image_size, latent_dim, num_classes, image_channels: as in `ConditionalGenerator`.

    Examples:
        >>> import torch
        >>> g = DCGANGenerator(32, latent_dim=128, num_classes=10, base_channels=8)
        >>> g(torch.randn(2, 128), torch.tensor([3, 7])).shape
        torch.Size([2, 3, 32, 32])
    """

    WIDTHS = WIDTHS

    def __init__(
        self,
        image_size: int,
        latent_dim: int,
        num_classes: int,
        base_channels: int,
        image_channels: int = 3,
    ) -> None:
        super().__init__(
            *(image_size, latent_dim, num_classes, base_channels, image_channels),
            first_dim=latent_dim,
            spectral=False,
        )
        widths = self.widths
        self.convs = nn.ModuleList(map(upsample_conv2d, widths[:-1], widths[1:]))
        self.norms = nn.ModuleList(
            ConditionalBatchNorm(width, num_classes, spectral=False) for width in widths[1:]
        )
        self.last = conv2d(widths[-1], image_channels, 3, spectral=False)

    def _generate(self, z: Tensor, labels: Tensor) -> Tensor:
        condition = one_hot(labels, self.num_classes, z)
        x = self._first(z)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x), condition))
        return self.last(x).tanh()


class DCGANDiscriminator(ConditionalDiscriminator):
    """`d(images, labels) -> DiscriminatorOutput`.

    For each width a conv3, and but for the last a 4x4 convolution of stride 2, all with leaky ReLU 0.1; then the sum over
    all positions, and the heads.

    Source: as `DCGANGenerator`, but for the sum, which gives all families the same kind of features: Table 3 ends in a linear
    layer over all positions. The heads: `ConditionalDiscriminator`.

    Args:
        base_channels: channels of the first map, 64 as published.
        image_size, num_classes, conditioning, embed_dim, image_channels: as in `ConditionalDiscriminator`.
        norm: "spectral" on every layer, "batch" behind every convolution but the first, or "none".

    Examples:
        >>> import torch
        >>> d = DCGANDiscriminator(32, num_classes=10, base_channels=8, conditioning="PD")
        >>> d(torch.zeros(2, 3, 32, 32), torch.tensor([3, 7])).features.shape
        torch.Size([2, 64])
    """

    WIDTHS: ClassVar[Widths] = {size: widths[::-1] for size, widths in WIDTHS.items()}

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
            image_size, num_classes, base_channels, conditioning, embed_dim, image_channels, norm
        )
        self.layers = nn.Sequential()
        channels = image_channels
        for width in self.widths:
            if self.layers:
                self._append(channels, channels, norm, kernel=4, stride=2)
            self._append(channels, width, norm)
            channels = width

    def _append(
        self, before: int, after: int, norm: DiscriminatorNorm, kernel: int = 3, stride: int = 1
    ) -> None:
        behind = discriminator_norm(after, norm) if self.layers else nn.Identity()
        conv = conv2d(before, after, kernel, stride=stride, spectral=norm == "spectral")
        self.layers.extend([conv, behind, nn.LeakyReLU(0.1)])

    def _features(self, images: Tensor) -> Tensor:
        return self.layers(images).sum((2, 3))
