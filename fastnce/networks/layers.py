"""Building blocks shared by the convolutional networks: anti-aliased resampling, residual block, initialisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _depthwise_filter(taps: list[float], scale: float, channels: int) -> Tensor:
    """Outer product of `taps` with itself times `scale`, once per channel: (channels, 1, k, k)."""
    row = torch.tensor(taps)
    kernel = torch.outer(row, row) * scale
    return kernel.expand(channels, 1, -1, -1).clone()


class Downsample(nn.Module):
    """Halves height and width: 3x3 binomial blur `outer([1, 2, 1]) / 16`, stride 2, reflection padding 1.

    `(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))`. The filter is the persistent buffer `filt` (C, 1, 3, 3).
    H and W must be at least 2 (the padding reflects).
    """

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("filt", _depthwise_filter([1.0, 2.0, 1.0], 1 / 16, channels))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.filt, stride=2, groups=self.channels)


class Upsample(nn.Module):
    """Doubles height and width: transposed depthwise 4x4 filter `outer([1, 3, 3, 1]) / 16`, replication padding 1.

    `(B, C, H, W) -> (B, C, 2H, 2W)`. The filter is the persistent buffer `filt` (C, 1, 4, 4).
    """

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("filt", _depthwise_filter([1.0, 3.0, 3.0, 1.0], 1 / 16, channels))

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        # padding=3 drops the border that the replicated pixels produce, one pixel more than the filter's own 2.
        return F.conv_transpose2d(padded, self.filt, stride=2, padding=3, groups=self.channels)


class ResnetBlock(nn.Module):
    """`x + f(x)`, f = reflection pad, 3x3 convolution, instance norm, ReLU, and the first three again. No ReLU after."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def init_xavier(module: nn.Module, gain: float = 0.02) -> None:
    """Xavier-normal weights and zero biases for every convolution and linear layer (CUT's initialisation)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(layer.weight, gain=gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_default(module: nn.Module) -> None:
    """PyTorch's own initialisation of every convolution and linear layer."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()


def init_normal(module: nn.Module, std: float = 0.02) -> None:
    """Normal weights and zero biases for convolutions and linear layers; weights around 1 for norms (pix2pix's initialisation)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, 0.0, std)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, std)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
