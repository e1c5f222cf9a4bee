"""ResNet encoders, under the field's parameter names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.networks.layers import StridedConv1x1, conv_without_bias

Stem = Literal["cifar", "imagenet"]

# Blocks of each stage, and whether they are bottlenecks. The small one is ours, for images of 16 or 32 pixels on a CPU.
RESNETS: dict[str, tuple[tuple[int, ...], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
    "small": ((1, 1, 1), False),
}


class BasicBlock(nn.Module):
    """`relu(shortcut(x) + f(x))`, f = conv3, norm, ReLU, conv3, norm; the first convolution has the stride."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_without_bias(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv_without_bias(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.bn1(self.conv1(x)))
        return F.relu_(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """The same with f = conv1, conv3 and conv1 to four times the width; the middle one has the stride."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = conv_without_bias(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv_without_bias(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv_without_bias(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.bn1(self.conv1(x)))
        y = F.relu_(self.bn2(self.conv2(y)))
        return F.relu_(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNetEncoder(nn.Module):
    """`encoder(images) -> features`: (N, C, H, W) to (N, `feature_dim`), the mean over all positions of the last map.

    Each stage doubles the width, and all but the first halve height and width. Parameters are named as in the checkpoints of
    the field: `conv1`, `bn1`, `layer1.0.conv1`, ..., `layer2.0.downsample.0`; there is no `fc`.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (https://arxiv.org/abs/1512.03385), with the
    stride of a bottleneck in its 3x3 convolution. The cifar stem is that of SimCLR, appendix B.9.

    Args:
        blocks: blocks of each stage; those of the published ones are in `RESNETS`.
        bottleneck: bottlenecks instead of basic blocks.
        base_channels: width of the first stage.
        image_channels: 3 for RGB, 1 for grey.
        stem: "imagenet", a 7x7 convolution of stride 2 and a max-pool; "cifar", a 3x3 convolution.

    Raises:
        ValueError: a size below 1, or an unknown stem.

    Examples:
        >>> import torch
        >>> encoder = ResNetEncoder((1, 1, 1), base_channels=8, stem="cifar")
        >>> encoder(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        blocks: Sequence[int],
        bottleneck: bool = False,
        *,
        base_channels: int = 64,
        image_channels: int = 3,
        stem: Stem = "imagenet",
    ) -> None:
        super().__init__()
        if min(*blocks, len(blocks), base_channels, image_channels) < 1:
            raise ValueError(
                f"ResNetEncoder: blocks={tuple(blocks)}, base_channels={base_channels}, image_channels={image_channels}: "
                "expected numbers of at least 1."
            )
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f'ResNetEncoder: stem="{stem}": use "cifar" or "imagenet".')
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = conv_without_bias(image_channels, base_channels, kernel, stride)
        self.bn1 = nn.BatchNorm2d(base_channels)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        self.num_stages = len(blocks)
        block = Bottleneck if bottleneck else BasicBlock
        channels = base_channels
        for stage, count in enumerate(blocks):
            width, layer = base_channels * 2**stage, nn.Sequential()
            for index in range(count):
                layer.append(block(channels, width, 2 if stage and index == 0 else 1))
                channels = width * block.expansion
            self.add_module(f"layer{stage + 1}", layer)
        self.feature_dim = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        for x in self.stages(images):
            last = x
        return last.mean((2, 3))

    def stages(self, images: Tensor) -> Iterator[Tensor]:
        """The map behind the stem, then that of each stage, as they are computed."""
        x = self.maxpool(F.relu_(self.bn1(self.conv1(images))))
        yield x
        for stage in range(self.num_stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
            yield x


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = (
        conv_without_bias(in_channels, out_channels, 1)
        if stride == 1
        else StridedConv1x1(in_channels, out_channels, stride)
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
