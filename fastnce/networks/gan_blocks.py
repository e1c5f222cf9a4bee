"""Residual generator and discriminator that BigGAN and SNGAN have in common: blocks, widths, order."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.networks.class_layers import (
    ConditionalBatchNorm,
    DiscriminatorNorm,
    SelfAttention,
    batch_norm,
    conv2d,
    discriminator_norm,
    linear,
)
from fastnce.networks.conditional import (
    ConditionalDiscriminator,
    ConditionalGenerator,
    Conditioning,
    nominal_size,
    smallest_map,
    widths_for,
)

# Channels, in units of base_channels, by image size. The rows of 32 to 256 are the published ones; that of 16 is ours,
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

    A family implements `_conditions(z, labels)`: the input of the linear layer and the condition of each block.

    State-dict keys: `linear0`, `blocks.{i}.0` (each block or attention layer is an entry of `blocks`), `bn4`, `conv2d5`.

    Args:
        image_size, latent_dim, num_classes, image_channels: as in `ConditionalGenerator`.
        base_channels: unit of `GENERATOR_WIDTHS`.
        first_dim: length of the linear layer's input.
        condition_dim: length of a block's condition.
        attention_after: self-attention behind the block of this number, counted from 1; 0 for none.
        spectral: spectral norm on every layer.
    """

    def __init__(
        self,
        image_size: int,
        latent_dim: int,
        num_classes: int,
        base_channels: int,
        image_channels: int,
        *,
        first_dim: int,
        condition_dim: int,
        attention_after: int,
        spectral: bool,
    ) -> None:
        super().__init__(image_size, latent_dim, num_classes, image_channels)
        widths = [base_channels * w for w in widths_for(self, GENERATOR_WIDTHS, image_size)]
        self.first_map = smallest_map(image_size)
        self.linear0 = linear(first_dim, self.first_map**2 * widths[0], spectral=spectral)
        blocks = [
            GeneratorBlock(before, after, condition_dim, spectral=spectral)
            for before, after in zip(widths, widths[1:], strict=False)
        ]
        self.blocks = _with_attention(self, blocks, widths[1:], attention_after, spectral)
        self.bn4 = batch_norm(widths[-1])
        self.conv2d5 = conv2d(widths[-1], image_channels, 3, spectral=spectral)

    def _generate(self, z: Tensor, labels: Tensor) -> Tensor:
        first, conditions = self._conditions(z, labels)
        remaining = iter(conditions)
        x = self.linear0(first).unflatten(1, (-1, self.first_map, self.first_map))
        for (layer,) in self.blocks:
            x = layer(x) if isinstance(layer, SelfAttention) else layer(x, next(remaining))
        return self.conv2d5(F.relu(self.bn4(x))).tanh()

    def _conditions(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Iterable[Tensor]]:
        raise NotImplementedError


class ResidualDiscriminator(ConditionalDiscriminator):
    """A `FirstDiscriminatorBlock`, `DiscriminatorBlock`s, ReLU, the sum over all positions, and the heads.

    State-dict keys: `blocks.{i}.0` (each block or attention layer is an entry of `blocks`), `linear1`, `linear2`,
    `embedding`.

    Args:
        image_size, num_classes, image_channels, conditioning, embed_dim: as in `ConditionalDiscriminator`.
        base_channels: unit of `DISCRIMINATOR_WIDTHS`.
        attention_after: self-attention behind the block of this number, counted from 1; 0 for none.
        norm: spectral norm on every layer, batch norm in the blocks, or neither.
    """

    def __init__(
        self,
        image_size: int,
        num_classes: int,
        base_channels: int,
        image_channels: int,
        conditioning: Conditioning,
        *,
        embed_dim: int,
        attention_after: int,
        norm: DiscriminatorNorm,
    ) -> None:
        widths = [base_channels * w for w in widths_for(self, DISCRIMINATOR_WIDTHS, image_size)]
        super().__init__(
            image_size,
            num_classes,
            image_channels,
            conditioning,
            feature_dim=widths[-1],
            embed_dim=embed_dim,
            norm=norm,
        )
        blocks: list[nn.Module] = [FirstDiscriminatorBlock(image_channels, widths[0], norm)]
        for index in range(1, len(widths)):
            halves = index < DOWNSAMPLING_BLOCKS[nominal_size(image_size)]
            block = DiscriminatorBlock(widths[index - 1], widths[index], norm, downsample=halves)
            blocks.append(block)
        self.blocks = _with_attention(self, blocks, widths, attention_after, norm == "spectral")

    def _features(self, images: Tensor) -> Tensor:
        x = images
        for (layer,) in self.blocks:
            x = layer(x)
        return F.relu(x).sum((2, 3))


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
