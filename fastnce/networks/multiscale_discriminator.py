"""PatchGAN discriminators of one image at several scales, with spectral norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.networks.layers import (
    FeatureLossInit,
    InstanceNorm,
    init_feature_loss,
    spectral_norm,
)
from fastnce.ops import maps


class MultiscaleDiscriminator(nn.Module):
    """`d(x) -> [[feature, ..., logits] per scale]`: PatchGANs of `x` (B, in_channels, H, W) and of halves of it.

    Each has `num_layers` 4x4 convolutions of stride 2 (the last of several 1), with leaky ReLU 0.2, and a last one to the logits,
    (B, 1, h, w). All are padded by 2. Between the first and the last there is spectral norm, no bias, and instance norm. A
    scale's list holds the maps behind every ReLU, for feature matching, then the logits. The next scale sees the mean of 3x3
    pixels, every second one, only pixels of the image counted. A 256x512 image has logits of 35x67 and 19x35.

    State-dict keys are the published ones: `discriminator_0.model0.0.weight`, `discriminator_0.model1.0.0.weight_orig`, ...

    Source: Wang et al., "High-Resolution Image Synthesis and Semantic Manipulation with Conditional GANs", CVPR 2018. With
    spectral norm: Park et al., "Semantic Image Synthesis with Spatially-Adaptive Normalization", CVPR 2019.

    Args:
        in_channels: of the semantic map and the image together.
        base_channels: channels of the first map, doubled per layer up to 8 times as many.
        num_layers: convolutions before the last.
        num_scales: discriminators.
        init: see `fastnce.networks.layers.init_feature_loss`.

    Raises:
        ValueError: less than one of anything, or an image of less than 3 * 2^(num_scales - 2) pixels on a side.

    Examples:
        >>> import torch
        >>> d = MultiscaleDiscriminator(8, base_channels=4)
        >>> [[tuple(x.shape[1:]) for x in scale[-2:]] for scale in d(torch.zeros(1, 8, 32, 64))]
        [[(32, 6, 10), (1, 7, 11)], [(32, 4, 6), (1, 5, 7)]]
    """

    def __init__(
        self,
        in_channels: int,
        base_channels: int = 64,
        num_layers: int = 4,
        num_scales: int = 2,
        init: FeatureLossInit = "published",
    ) -> None:
        super().__init__()
        if min(in_channels, base_channels, num_layers, num_scales) < 1:
            raise ValueError(
                f"MultiscaleDiscriminator: in_channels={in_channels}, base_channels={base_channels}, num_layers={num_layers}, "
                f"num_scales={num_scales}: expected numbers of at least 1."
            )
        self.base_channels = base_channels
        self.num_scales = num_scales
        for scale in range(num_scales):
            layers = _patch_layers(in_channels, base_channels, num_layers)
            self.add_module(f"discriminator_{scale}", layers)
        init_feature_loss("MultiscaleDiscriminator", self, init)

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        """The maps of each scale, the logits last."""
        x = maps.in_kernel_layout(x, self.base_channels)
        results = []
        for scale in range(self.num_scales):
            if scale:
                x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
            outputs = [x]
            for layer in self.get_submodule(f"discriminator_{scale}").children():
                outputs.append(layer(outputs[-1]))
            results.append(outputs[1:])
        return results


def _patch_layers(channels: int, base_channels: int, num_layers: int) -> nn.Module:
    layers = nn.Module()
    for index in range(num_layers):
        width = base_channels * min(2**index, 8)
        stride = 2 if index == 0 or index < num_layers - 1 else 1
        shape = {"kernel_size": 4, "stride": stride, "padding": 2}
        if index == 0:
            layer = nn.Sequential(nn.Conv2d(channels, width, **shape), nn.LeakyReLU(0.2))
        else:
            conv = spectral_norm(nn.Conv2d(channels, width, **shape, bias=False))
            # Nested for the published keys; the instance norm includes the leaky ReLU.
            layer = nn.Sequential(nn.Sequential(conv, InstanceNorm(slope=0.2)))
        layers.add_module(f"model{index}", layer)
        channels = width
    last = nn.Sequential(nn.Conv2d(channels, 1, 4, padding=2))
    layers.add_module(f"model{num_layers}", last)
    return layers
