"""Where the positions of a feature map lie in the image it was computed from."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn

from fastnce.networks.layers import Downsample, Upsample
from fastnce.networks.resnet_generator import ResnetGenerator


class PixelGrid(NamedTuple):
    """Position i of a feature map looks at pixel `offset + stride * i`, along both axes; pixels count from 0."""

    offset: float
    stride: float

    def pixel(self, position: float) -> float:
        """The pixel in the middle of what a position sees."""
        return self.offset + self.stride * position

    def nearest(self, pixel: float, size: int) -> int:
        """The position nearest to a pixel, in a map with `size` positions along this axis."""
        return min(max(math.floor((pixel - self.offset) / self.stride + 0.5), 0), size - 1)


def pixel_grid(generator: nn.Module, tap: int, feature: Tensor, image: Tensor) -> PixelGrid:
    """The pixels that the positions of the tap's feature map look at.

    In a `ResnetGenerator` they follow from its layers. The padded image of tap 0 begins 3 pixels outside; maps behind a
    downsampling have their positions on every second pixel, the first of them on pixel 0. For other generators the map is laid
    over the image with the centres on each other, which is where symmetric resampling puts it.

    Args:
        generator: the network that gave the feature.
        tap: index of the layer.
        feature: (B, C, h, w).
        image: (B, C, H, W), what it was computed from.

    Examples:
        >>> import torch
        >>> g, x = ResnetGenerator(base_channels=2, num_blocks=1), torch.zeros(1, 3, 32, 32)
        >>> [pixel_grid(g, t, f, x) for t, f in zip((0, 12), g.encode(x, (0, 12)))]
        [PixelGrid(offset=-3.0, stride=1.0), PixelGrid(offset=0.0, stride=4.0)]
    """
    if isinstance(generator, ResnetGenerator):
        offset, stride = 0.0, 1.0
        for layer in generator.model[: tap + 1]:
            offset, stride = _behind(layer, offset, stride)
        return PixelGrid(offset, stride)
    stride = image.shape[-1] / feature.shape[-1]
    if stride < 1:  # a padded image
        return PixelGrid((image.shape[-1] - feature.shape[-1]) / 2, 1.0)
    return PixelGrid((stride - 1) / 2, stride)


def _behind(layer: nn.Module, offset: float, stride: float) -> tuple[float, float]:
    """Offset and stride behind a layer, from those before it. What is not named here keeps the positions in place."""
    if isinstance(layer, nn.ReflectionPad2d):
        return offset - layer.padding[0] * stride, stride
    if isinstance(layer, nn.Conv2d):
        outside = (layer.kernel_size[0] - 1) / 2 - layer.padding[0]
        return offset + outside * stride, stride * layer.stride[0]
    if isinstance(layer, Downsample):
        return offset, stride * 2
    if isinstance(
        layer, Upsample
    ):  # the new positions lie a quarter of a step to both sides of the old ones
        return offset - stride / 4, stride / 2
    return offset, stride
