"""The residual GANs, BigGAN and SNGAN: their blocks, widths and order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.networks.conditional import (
    ConditionalBatchNorm,
    ConditionalDiscriminator,
    ConditionalGenerator,
    Conditioning,
    DiscriminatorNorm,
    SelfAttention,
    batch_norm,
    conv2d,
    discriminator_norm,
    embedding,
    nominal_size,
    one_hot,
    widths_for,
)

# The rows of 32 to 256 are the published ones; that of 16 is ours,
# narrow where the map is large, as those of 64 and 128 are. Generator: before and after each block. Discriminator: after each block.
# Sizes in between take the row below them, and start from a larger map.
GENERATOR_WIDTHS = {
    16: (4, 2, 1),
    32: (4, 4, 4, 4),
    64: (16, 8, 4, 2, 1),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
}
DISCRIMINATOR_WIDTHS = {
    16: (1, 2, 4),
    32: (2, 2, 2, 2),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
}
# So many blocks at the front of the discriminator halve the map.
DOWNSAMPLING_BLOCKS = {16: 2, 32: 2, 64: 4, 128: 5, 256: 6}


class GeneratorBlock(nn.Module):
    """Doubles the map: cBN, ReLU, upsample, conv3, cBN, ReLU, conv3, plus the upsampled input through conv1.

    `x` (N, in, H, W) and the condition (N, condition_dim) -> (N, out, 2H, 2W). Upsampling repeats pixels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, condition_dim: int, *, spectral: bool
    ) -> None:
        super().__init__()
        self.bn1 = ConditionalBatchNorm(in_channels, condition_dim, spectral=spectral)
        self.bn2 = ConditionalBatchNorm(out_channels, condition_dim, spectral=spectral)
        self.conv2d0 = conv2d(in_channels, out_channels, 1, spectral=spectral)
        self.conv2d1 = conv2d(in_channels, out_channels, 3, spectral=spectral)
        self.conv2d2 = conv2d(out_channels, out_channels, 3, spectral=spectral)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.bn1(x, condition)), scale_factor=2)
        h = self.conv2d2(F.relu(self.bn2(self.conv2d1(h), condition)))
        # A 1x1 convolution of repeated pixels is the repeated convolution, at a quarter of the cost.
        return h + F.interpolate(self.conv2d0(x), scale_factor=2)


class FirstDiscriminatorBlock(nn.Module):
    """Halves the image: conv3, ReLU, conv3, average pool, plus the pooled image through conv1.

    `(N, in, H, W) -> (N, out, H / 2, W / 2)`. With norm="batch" there is one after the first convolution and one before
    that of the skip.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: DiscriminatorNorm) -> None:
        super().__init__()
        spectral = norm == "spectral"
        self.conv2d0 = conv2d(in_channels, out_channels, 1, spectral=spectral)
        self.conv2d1 = conv2d(in_channels, out_channels, 3, spectral=spectral)
        self.conv2d2 = conv2d(out_channels, out_channels, 3, spectral=spectral)
        self.bn0 = discriminator_norm(in_channels, norm)
        self.bn1 = discriminator_norm(out_channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2d2(F.relu(self.bn1(self.conv2d1(x))))
        return F.avg_pool2d(h, 2) + self.conv2d0(self.bn0(F.avg_pool2d(x, 2)))


class DiscriminatorBlock(nn.Module):
    """ReLU, conv3, ReLU, conv3 (average pool), plus a skip: the ReLU'd input (pooled, through conv1).

    `(N, in, H, W) -> (N, out, H / 2, W / 2)` if `downsample`, else (N, out, H, W); the skip has its convolution if it
    halves the map or changes the channels.

    The published ReLU works in place on the block's input, so the skip sees relu(x), not x. With norm="batch" a norm comes
    before each ReLU, and one before the convolution of the skip, which then sees x.
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm: DiscriminatorNorm, *, downsample: bool
    ) -> None:
        super().__init__()
        spectral = norm == "spectral"
        self.downsample = downsample
        self.relu_in_skip = norm != "batch"
        self.has_skip_conv = downsample or in_channels != out_channels
        if self.has_skip_conv:
            self.conv2d0 = conv2d(in_channels, out_channels, 1, spectral=spectral)
            self.bn0 = discriminator_norm(in_channels, norm)
        self.conv2d1 = conv2d(in_channels, out_channels, 3, spectral=spectral)
        self.conv2d2 = conv2d(out_channels, out_channels, 3, spectral=spectral)
        self.bn1 = discriminator_norm(in_channels, norm)
        self.bn2 = discriminator_norm(out_channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        h = self.conv2d2(F.relu(self.bn2(self.conv2d1(activated))))
        skip = activated if self.relu_in_skip else x
        if self.has_skip_conv:
            # Pooling before the 1x1 convolution is the same as behind it, at a quarter of the cost.
            skip = self.conv2d0(self._pool(self.bn0(skip)))
        return self._pool(h) + skip

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.downsample else x


class ResidualGenerator(ConditionalGenerator):
    """Linear layer to a 4x4 map (or 5x5 to 7x7, see `smallest_map`), `GeneratorBlock`s, batch norm, ReLU, conv3, tanh.

    The five sizes are those of `ConditionalGenerator`. State-dict keys: `linear0`, `blocks.{i}.0` (each block or attention layer is an
    entry of `blocks`), `bn4`, `conv2d5`.
    `condition_dim`: length of each block's condition; `attention_after`: as in `BigGANGenerator`; `spectral`: spectral norm on
    every layer.
    """

    WIDTHS = GENERATOR_WIDTHS

    def __init__(
        self, *sizes: int, first_dim: int, condition_dim: int, attention_after: int, spectral: bool
    ) -> None:
        super().__init__(*sizes, first_dim=first_dim, spectral=spectral)
        blocks = [
            GeneratorBlock(before, after, condition_dim, spectral=spectral)
            for before, after in itertools.pairwise(self.widths)
        ]
        self.blocks = _with_attention(self, blocks, self.widths[1:], attention_after, spectral)
        self.bn4 = batch_norm(self.widths[-1])
        self.conv2d5 = conv2d(self.widths[-1], self.image_channels, 3, spectral=spectral)

    def _generate(self, z: Tensor, labels: Tensor) -> Tensor:
        first, conditions = self._conditions(z, labels)
        remaining = iter(conditions)
        x = self._first(first)
        for (layer,) in self.blocks:
            x = layer(x) if isinstance(layer, SelfAttention) else layer(x, next(remaining))
        return self.conv2d5(F.relu(self.bn4(x))).tanh()

    def _conditions(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Iterable[Tensor]]:
        """The input of the linear layer, and the condition of each block."""
        raise NotImplementedError


def _with_attention(
    network: nn.Module,
    blocks: list[nn.Module],
    widths: list[int],
    attention_after: int,
    spectral: bool,
) -> nn.ModuleList:
    """The blocks, and behind number `attention_after` self-attention, each in a list of its own as published."""
    if not 0 <= attention_after <= len(blocks):
        raise ValueError(
            f"{type(network).__name__}: attention_after={attention_after} must be the number of a block, from 1 to "
            f"{len(blocks)}, or 0 for none."
        )
    layers = list(blocks)
    if attention_after:
        attention = SelfAttention(widths[attention_after - 1], spectral=spectral)
        layers.insert(attention_after, attention)
    return nn.ModuleList(nn.ModuleList([layer]) for layer in layers)


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
        latent_dim: length of z, a multiple of the number of chunks: 3 from 16 pixels on, 4 from 32, 5 from 64, 6 from 128,
            7 from 256.
        base_channels: unit of the widths; 96 and 80 as published.
        shared_dim: length of the label's embedding.
        attention_after: self-attention behind the block of this number, counted from 1; 0 for none.
        image_size, num_classes, image_channels: as in `ConditionalGenerator`; a size below 32 is ours.

    Examples:
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
            *(image_size, latent_dim, num_classes, base_channels, image_channels),
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


class SNGANGenerator(ResidualGenerator):
    """`g(z, labels) -> images` (N, image_channels, image_size, image_size) in [-1, 1].

    BigGAN's blocks and widths without its chunks, embedding and attention: the first layer takes the whole of z, the blocks'
    norms are conditioned on the one-hot label.

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018: the tables of its
    residual networks for CIFAR-10 (32 pixels) and ImageNet (128), which have base_channels=64 and latent_dim=128. 64 pixels
    are those of 128 with one of the two widest blocks less, 16 those of 32 with one block less. The label enters as in Miyato
    and Koyama, "cGANs with Projection Discriminator", ICLR 2018.

    Args:
        base_channels: unit of the widths, 64 as published.
        spectral_norm: spectral norm on every layer; the published generator has none.
        image_size, latent_dim, num_classes, image_channels: as in `ConditionalGenerator`.

    Examples:
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
            *(image_size, latent_dim, num_classes, base_channels, image_channels),
            first_dim=latent_dim,
            condition_dim=num_classes,
            attention_after=0,
            spectral=spectral_norm,
        )

    def _conditions(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Iterable[Tensor]]:
        return z, itertools.repeat(one_hot(labels, self.num_classes, z))


class SNGANDiscriminator(ConditionalDiscriminator):
    """`d(images, labels) -> DiscriminatorOutput`.

    A `FirstDiscriminatorBlock`, `DiscriminatorBlock`s, ReLU, the sum over all positions, and the heads. norm="batch" is that of
    ACGAN-Mod and ProjGAN, the weak baselines of the ContraGAN paper. State-dict keys: `blocks.{i}.0` (each block or attention
    layer is an entry of `blocks`), `linear1`, `linear2`, `embedding`.

    Source: as `SNGANGenerator`; its skips through ReLU'd inputs as in `DiscriminatorBlock`. The heads:
    `ConditionalDiscriminator`.

    Args:
        base_channels: unit of the widths, 64 as published.
        norm: "spectral" on every layer, "batch" in the blocks, or "none".
        attention_after: as in `BigGANDiscriminator`; the published one has none.
        image_size, num_classes, conditioning, embed_dim, image_channels: as in `ConditionalDiscriminator`.

    Examples:
        >>> import torch
        >>> d = SNGANDiscriminator(32, num_classes=10, base_channels=8, conditioning="AC")
        >>> d(torch.zeros(2, 3, 32, 32), torch.tensor([3, 7])).class_logits.shape
        torch.Size([2, 10])
    """

    WIDTHS = DISCRIMINATOR_WIDTHS

    def __init__(
        self,
        image_size: int,
        num_classes: int,
        base_channels: int,
        conditioning: Conditioning = "2C",
        embed_dim: int = 512,
        image_channels: int = 3,
        norm: DiscriminatorNorm = "spectral",
        attention_after: int = 0,
    ) -> None:
        super().__init__(
            image_size, num_classes, base_channels, conditioning, embed_dim, image_channels, norm
        )
        blocks: list[nn.Module] = [FirstDiscriminatorBlock(image_channels, self.widths[0], norm)]
        for index, (before, after) in enumerate(itertools.pairwise(self.widths), 1):
            halves = index < DOWNSAMPLING_BLOCKS[nominal_size(image_size)]
            blocks.append(DiscriminatorBlock(before, after, norm, downsample=halves))
        self.blocks = _with_attention(
            self, blocks, self.widths, attention_after, norm == "spectral"
        )

    def _features(self, images: Tensor) -> Tensor:
        x = images
        for (layer,) in self.blocks:
            x = layer(x)
        return F.relu(x).sum((2, 3))


class BigGANDiscriminator(SNGANDiscriminator):
    """`d(images, labels) -> DiscriminatorOutput`, with spectral norm on every layer.

    State-dict keys are those of StudioGAN's checkpoints. Published configurations (image_size, base_channels, embed_dim)
    and their parameters, with attention after block 1 and conditioning "2C":

        CIFAR-10       32, 96,  512:  2,517,186
        Tiny ImageNet  64, 80,  768: 31,678,130
        ImageNet      128, 96, 1536: 90,343,202

    Source: as `BigGANGenerator`; the heads: `ConditionalDiscriminator`.

    Args:
        base_channels: unit of the widths; 96 and 80 as published.
        attention_after: self-attention behind the block of this number, counted from 1; 0 for none.
        image_size, num_classes, conditioning, embed_dim, image_channels: as in `ConditionalDiscriminator`.

    Examples:
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
            *(image_size, num_classes, base_channels, conditioning, embed_dim, image_channels),
            attention_after=attention_after,
        )
