"""The PatchGAN discriminator: one real-or-fake logit per overlapping patch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fastnce.networks.layers import Downsample, InstanceNorm, init_xavier
from fastnce.ops import maps

_NORMS = ("instance", "batch", "none")


class PatchDiscriminator(nn.Module):
    """Convolutional classifier of overlapping patches: `(B, in_channels, H, W) -> (B, 1, h, w)` logits.

    4x4 convolutions with leaky ReLU 0.2; the first `num_layers` halve the map (stride 1 followed by a blur with
    `antialias=True`, stride 2 otherwise), one more keeps it, the last gives the logit. 256x256 -> 30x30 for 3 layers.

    State-dict keys are `model.{0,3,7,11,14}...` and `model.{2,6,10}.filt` for the default, as in the published
    checkpoints: an instance norm includes the leaky ReLU, and an identity has its index. `norm="none"` puts an identity
    where the instance norm was and keeps every bias, so the indices, the keys and the parameter count are the same as with
    the norm. `norm="batch"` is pix2pix's: the norm has the biases, and the convolution before it none.

    Source: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017; blurred
    downsampling as in CUT.

    Args:
        in_channels: channels of the image.
        base_channels: channels of the first layer, doubled per layer up to 8 times as many.
        num_layers: downsampling layers.
        antialias: blur before each downsampling instead of strided convolutions.
        norm: "instance", "batch" or "none".

    Examples:
        >>> import torch
        >>> PatchDiscriminator(base_channels=8)(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 1, 6, 6])
    """

    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 64,
        num_layers: int = 3,
        antialias: bool = True,
        norm: Literal["instance", "batch", "none"] = "instance",
    ) -> None:
        super().__init__()
        if norm not in _NORMS:
            raise ValueError(f"PatchDiscriminator: norm={norm!r} must be one of {_NORMS}.")
        self.base_channels = base_channels
        layers: list[nn.Module] = []
        channels = in_channels
        for index in range(num_layers + 1):
            downsamples = index < num_layers
            width = base_channels * min(2**index, 8)
            stride = 2 if downsamples and not antialias else 1
            bias = index == 0 or norm != "batch"
            layers.append(nn.Conv2d(channels, width, 4, stride=stride, padding=1, bias=bias))
            if index > 0 and norm == "instance":
                layers += [InstanceNorm(slope=0.2), nn.Identity()]
            else:
                if index > 0:
                    layers.append(nn.BatchNorm2d(width) if norm == "batch" else nn.Identity())
                layers.append(nn.LeakyReLU(0.2))
            if downsamples and antialias:
                layers.append(Downsample(width))
            channels = width
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.model = nn.Sequential(*layers)
        init_xavier(self)

    def forward(self, x: Tensor) -> Tensor:
        """Patch logits of the images `x`."""
        return self.model(maps.in_kernel_layout(x, self.base_channels))
