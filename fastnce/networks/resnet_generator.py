"""CUT's residual generator, its first half as the encoder of PatchNCE, and where a map's positions lie in the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fastnce.networks.layers import (
    Conv3x3,
    Downsample,
    InstanceNorm,
    ResnetBlock,
    Upsample,
    checked_taps,
    init_xavier,
    run_with_taps,
)
from fastnce.ops import maps


class ResnetGenerator(nn.Module):
    """Image-to-image generator: 7x7 stem, two downsamplings, residual blocks, two upsamplings, 7x7 head, tanh.

    `(B, in_channels, H, W) -> (B, out_channels, H, W)` with H and W multiples of 4 and at least 8. Instance norm without
    affine parameters, so every convolution has a bias. State-dict keys are `model.<index>...` with the indices of the
    published checkpoints; `filt` buffers are part of it.

    With `antialias=True` (the published default) the layers are: 0 pad, 1 conv 7x7, 2 norm, 3 ReLU, 4 conv, 5 norm,
    6 ReLU, 7 downsample, 8 conv, 9 norm, 10 ReLU, 11 downsample, 12... residual blocks, then the decoder. With
    `antialias=False` the two convolutions of the encoder have stride 2 and there is no downsample layer, so later
    indices are lower by up to two (residual blocks start at 10). With `antialias_up=False` a transposed convolution stands for
    each upsampling and the convolution behind it. Both off is the generator of the older repository of CycleGAN and pix2pix.

    **Taps** are layer indices. A tap gives the output of that layer; directly before a ReLU it gives the value after the ReLU,
    which is part of the norm here. (The published ReLU works in place and so overwrites the tapped map.) With `antialias=True`
    the default taps are not concerned: 0 (the padded image), 4 and 8 (convolutions before their norm), 12 and 16. With
    `antialias=False` tap 8 is the output of a norm, and the published value there is the one after the ReLU.

    Source: Park et al., "Contrastive Learning for Unpaired Image-to-Image Translation", ECCV 2020.

    Args:
        in_channels: channels of the input image.
        out_channels: channels of the output image.
        base_channels: channels after the stem; doubled by each downsampling.
        num_blocks: residual blocks.
        antialias: blur before each downsampling instead of strided convolutions.
        antialias_up: double with a filter and convolve, instead of transposed convolutions of stride 2.

    Attributes:
        first_block: index of the first residual block.

    Examples:
        >>> import torch
        >>> g = ResnetGenerator(base_channels=8, num_blocks=2)
        >>> image, (pixels, block) = g(torch.zeros(1, 3, 32, 32), taps=[0, 12])
        >>> image.shape, pixels.shape, block.shape
        (torch.Size([1, 3, 32, 32]), torch.Size([1, 3, 38, 38]), torch.Size([1, 32, 8, 8]))
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        base_channels: int = 64,
        num_blocks: int = 9,
        antialias: bool = True,
        antialias_up: bool = True,
    ) -> None:
        super().__init__()
        c = self.base_channels = base_channels
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(in_channels, c, 7)]
        layers += _norm_and_relu()
        for width in (c, 2 * c):
            layers += _downsampling(width, 2 * width, antialias)
        self.first_block = len(layers)
        layers += [ResnetBlock(4 * c) for _ in range(num_blocks)]
        for width in (4 * c, 2 * c):
            layers += _upsampling(width, width // 2, antialias_up)
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(c, out_channels, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)
        init_xavier(self)

    def forward(
        self, x: Tensor, taps: Sequence[int] | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Translates `x`; with `taps` (ascending layer indices) also returns those layers' features."""
        checked = [] if taps is None else self._checked(taps)
        y, features = self._run(x, checked, stop=len(self.model))
        # An image is small, and whoever takes it need not know of memory formats.
        y = y.contiguous()
        return y if taps is None else (y, features)

    def encode(self, x: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """Features of the layers `taps` (ascending), computing nothing behind the last of them."""
        taps = self._checked(taps)
        return self._run(x, taps, stop=taps[-1] + 1)[1]

    def _run(self, x: Tensor, taps: list[int], stop: int) -> tuple[Tensor, list[Tensor]]:
        x = maps.in_kernel_layout(x, self.base_channels)
        return run_with_taps(self.model[:stop], x, taps)

    def _checked(self, taps: Sequence[int]) -> list[int]:
        return checked_taps("ResnetGenerator", taps, len(self.model))


def _downsampling(in_channels: int, out_channels: int, antialias: bool) -> list[nn.Module]:
    if antialias:
        conv = Conv3x3(in_channels, out_channels)
        return [conv, *_norm_and_relu(), Downsample(out_channels)]
    return [nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1), *_norm_and_relu()]


def _upsampling(in_channels: int, out_channels: int, antialias: bool) -> list[nn.Module]:
    if antialias:
        return [Upsample(in_channels), Conv3x3(in_channels, out_channels), *_norm_and_relu()]
    doubled = {"stride": 2, "padding": 1, "output_padding": 1}
    return [nn.ConvTranspose2d(in_channels, out_channels, 3, **doubled), *_norm_and_relu()]


def _norm_and_relu() -> list[nn.Module]:
    # The identity has the index of the published ReLU.
    return [InstanceNorm(slope=0.0), nn.Identity()]


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
