"""pix2pix's generator: a U-Net."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TestStatistics = Literal["image", "running"]


class UNetGenerator(nn.Module):
    """Image-to-image generator: halves the image `num_downs` times, doubles it as often, and joins maps of equal size.

    `(B, in_channels, H, W) -> (B, out_channels, H, W)` with H and W multiples of `size_multiple` = 2^num_downs. Level l has
    `base_channels * min(2^l, 8)` channels. Each goes down by a 4x4 convolution with stride 2 (leaky ReLU 0.2 before it, batch
    norm after it, except at both ends). It goes up by a transposed one (ReLU before it, batch norm after it, and dropout 1/2 in
    the deeper ones). What comes back up is appended to what went down, and the last layer is a tanh.

    State-dict keys are those of the published checkpoints: `model.model.0...`, and level by level inside one another
    `model.model.1.model.1...`, `model.model.1.model.3.model.1...`.

    **Testing.** The published code tests as it trains: one image at a time with that image's own statistics, and with dropout.
    In eval mode this network takes each image's own statistics too (`test_statistics="image"`), so that a result depends on
    nothing else in its batch. But it leaves dropout out, so that it is the same each time. In training mode the statistics are
    those of the batch. "running" takes the averages of the training instead, as the published `--eval`.

    Source: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017.

    Args:
        in_channels: channels of the input image.
        out_channels: channels of the output image.
        base_channels: channels after the first layer.
        num_downs: 8 is the published unet_256, 7 unet_128.
        dropout: whether the deeper levels drop half of their channels' values in training.
        test_statistics: what normalises in eval mode.

    Attributes:
        size_multiple: what height and width must be multiples of.

    Raises:
        ValueError: fewer than 2 levels, or an image of another size.

    Examples:
        >>> UNetGenerator(base_channels=4, num_downs=5)(torch.zeros(2, 3, 32, 64)).shape
        torch.Size([2, 3, 32, 64])
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        base_channels: int = 64,
        num_downs: int = 8,
        dropout: bool = True,
        test_statistics: TestStatistics = "image",
    ) -> None:
        super().__init__()
        if num_downs < 2:
            raise ValueError(
                f"UNetGenerator: num_downs={num_downs} must be at least 2: the first and the last level."
            )
        self.size_multiple = 2**num_downs
        widths = [base_channels * min(2**level, 8) for level in range(num_downs)]
        # From the innermost level out, as each level contains the next.
        block: _Level | None = None
        for level in reversed(range(1, num_downs)):
            # As published: the levels of full width but for the innermost.
            drops = dropout and 4 <= level < num_downs - 1
            block = _Level(widths[level - 1], widths[level], block, drops, test_statistics)
        assert block is not None
        self.model = _Outermost(in_channels, widths[0], block, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """The translated images."""
        height, width = x.shape[2:]
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"UNetGenerator: images of {height}x{width} cannot be halved {self.size_multiple.bit_length() - 1} times. "
                f"Use heights and widths that are multiples of {self.size_multiple}, or a smaller num_downs."
            )
        return self.model(x)


class _Outermost(nn.Module):
    """From the image to the first level's map, and from all that comes back to the image."""

    def __init__(self, in_channels: int, width: int, inner: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(in_channels, width, 4, stride=2, padding=1, bias=False),
            inner,
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, out_channels, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class _Level(nn.Module):
    """`cat([x, f(x)])`, f: down, the level inside, up. `inner` None: the innermost level."""

    def __init__(
        self,
        outer_width: int,
        width: int,
        inner: nn.Module | None,
        dropout: bool,
        test_statistics: TestStatistics,
    ) -> None:
        super().__init__()
        down: list[nn.Module] = [
            nn.LeakyReLU(0.2),
            nn.Conv2d(outer_width, width, 4, stride=2, padding=1, bias=False),
        ]
        if inner is not None:
            down += [_BatchNorm(width, test_statistics), inner]
        from_below = width if inner is None else 2 * width
        up: list[nn.Module] = [
            nn.ReLU(),
            nn.ConvTranspose2d(from_below, outer_width, 4, stride=2, padding=1, bias=False),
            _BatchNorm(outer_width, test_statistics),
        ]
        if dropout:
            up.append(nn.Dropout(0.5))
        self.model = nn.Sequential(*down, *up)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], dim=1)


class _BatchNorm(nn.BatchNorm2d):
    """Batch norm that in eval mode may take each image's own statistics."""

    def __init__(self, channels: int, test_statistics: TestStatistics) -> None:
        super().__init__(channels)
        self.test_statistics = test_statistics

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.test_statistics == "running":
            return super().forward(x)
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
