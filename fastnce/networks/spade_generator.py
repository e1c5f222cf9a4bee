"""The SPADE generator: from a semantic map to an image, with a norm whose scale and shift are read off the map at every place."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.networks.layers import (
    BatchNormOfRanks,
    Conv3x3,
    FeatureLossInit,
    init_feature_loss,
    spectral_norm,
)
from fastnce.ops import maps
from fastnce.ranks import ranks_of

Upsampling = Literal["normal", "more", "most"]
_SLOPE = 0.2


class SPADE(nn.Module):
    """`norm(x) * (1 + gamma(s)) + beta(s)`: batch norm without parameters, scaled and shifted as a semantic map says.

    `x` (B, C, H, W) and `s` (B, semantic_channels, any size) -> (B, C, H, W). The moments are of all ranks' batches. gamma and beta are 3x3 convolutions of one hidden
    map, `relu(conv3x3(s resized to x))` of `hidden_channels`.

    Source: Park et al., "Semantic Image Synthesis with Spatially-Adaptive Normalization", CVPR 2019.
    """

    def __init__(self, channels: int, semantic_channels: int, hidden_channels: int = 128) -> None:
        super().__init__()
        self.param_free_norm = BatchNormOfRanks(channels)
        self.mlp_shared = nn.Sequential(Conv3x3(semantic_channels, hidden_channels), nn.ReLU())
        self.mlp_gamma = Conv3x3(hidden_channels, channels)
        self.mlp_beta = Conv3x3(hidden_channels, channels)

    def forward(self, x: Tensor, semantics: Tensor) -> Tensor:
        hidden = self.mlp_shared(_resized(semantics, x.shape[2:]))
        gain = 1 + self.mlp_gamma(hidden)
        return self.param_free_norm(x) * gain + self.mlp_beta(hidden)


class SPADEBlock(nn.Module):
    """`shortcut(x) + conv_1(act(norm_1(conv_0(act(norm_0(x))))))`, with SPADE norms, leaky ReLU 0.2 and spectral norm.

    The shortcut is x itself, or a 1x1 convolution of `norm_s(x)` where the channels change.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        semantic_channels: int,
        hidden_channels: int = 128,
    ) -> None:
        super().__init__()
        middle = min(in_channels, out_channels)
        condition = (semantic_channels, hidden_channels)
        self.learns_shortcut = in_channels != out_channels
        # In the order of the published parameters.
        self.conv_0 = spectral_norm(Conv3x3(in_channels, middle))
        self.conv_1 = spectral_norm(Conv3x3(middle, out_channels))
        if self.learns_shortcut:
            self.conv_s = spectral_norm(nn.Conv2d(in_channels, out_channels, 1, bias=False))
        self.norm_0 = SPADE(in_channels, *condition)
        self.norm_1 = SPADE(middle, *condition)
        if self.learns_shortcut:
            self.norm_s = SPADE(in_channels, *condition)

    def forward(self, x: Tensor, semantics: Tensor) -> Tensor:
        semantics = _resized(semantics, x.shape[2:])  # once for all norms
        y = self.conv_0(F.leaky_relu(self.norm_0(x, semantics), _SLOPE))
        y = self.conv_1(F.leaky_relu(self.norm_1(y, semantics), _SLOPE))
        return y + (self.conv_s(self.norm_s(x, semantics)) if self.learns_shortcut else x)


class SPADEGenerator(nn.Module):
    """Semantic map to image: `(B, in_channels, H, W) -> (B, out_channels, H, W)` in [-1, 1].

    The map, shrunk to H / `size_multiple` x W / `size_multiple`, is convolved to 16 * `base_channels` channels. Six `SPADEBlock`s
    follow, or seven, with nearest-neighbour doubling in between, of 16, 16, 16, 8, 4, 2, 1 (and 1/2) times `base_channels`.
    Then leaky ReLU, 3x3 convolution, tanh. There is no noise: one map has one image.

    Height and width are multiples of `size_multiple`. Those of training follow from `crop_size` and `aspect_ratio` and are in
    `image_size`: the width is the multiple just below `crop_size`, the height the multiple nearest to it over `aspect_ratio`.

    State-dict keys are the published ones: `fc`, `head_0`, `G_middle_0`, `G_middle_1`, `up_0` to `up_3` (or `up_4`), `conv_img`.

    In training mode most biases of convolutions have no effect, because a batch norm follows: all but those of SPADE's own,
    of `conv_img` and of the last block's second convolution.

    Source: Park et al., "Semantic Image Synthesis with Spatially-Adaptive Normalization", CVPR 2019.

    Args:
        in_channels: channels of the semantic map: classes, "don't care", instance edges.
        out_channels: channels of the image.
        base_channels: channels of the last map.
        upsampling: doublings: "normal" has 5, "more" 6, "most" 7 and one block more.
        crop_size: width of the training images.
        aspect_ratio: their width over their height.
        hidden_channels: of the map inside each SPADE norm.
        init: see `fastnce.networks.layers.init_feature_loss`.

    Attributes:
        size_multiple: 32, 64 or 128.
        image_size: height and width of the training images.

    Raises:
        ValueError: an unknown upsampling or initialisation, no channels, an image smaller than `size_multiple`, a semantic map of
            another form, or a training batch of one position in the first map.

    Examples:
        >>> import torch
        >>> g = SPADEGenerator(5, base_channels=4, crop_size=64, aspect_ratio=2.0, hidden_channels=8)
        >>> g.image_size, g(torch.zeros(2, 5, 32, 64)).shape
        ((32, 64), torch.Size([2, 3, 32, 64]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 3,
        base_channels: int = 64,
        upsampling: Upsampling = "normal",
        crop_size: int = 256,
        aspect_ratio: float = 1.0,
        hidden_channels: int = 128,
        init: FeatureLossInit = "published",
    ) -> None:
        super().__init__()
        if upsampling not in get_args(Upsampling):
            raise ValueError(
                f"SPADEGenerator: upsampling={upsampling!r} must be one of {get_args(Upsampling)}."
            )
        self.in_channels = in_channels
        if base_channels < (2 if upsampling == "most" else 1):
            raise ValueError(
                f"SPADEGenerator: base_channels={base_channels} must be at least 1, and 2 with upsampling='most'."
            )
        self.base_channels = base_channels
        self.size_multiple = 2 ** (5 + get_args(Upsampling).index(upsampling))
        self.image_size = self._image_size(crop_size, aspect_ratio)
        # Name, channels in units of the last block's, and whether the map is doubled before.
        blocks = [
            ("head_0", 16, False),
            ("G_middle_0", 16, True),
            ("G_middle_1", 16, upsampling != "normal"),
            ("up_0", 8, True),
            ("up_1", 4, True),
            ("up_2", 2, True),
            ("up_3", 1, True),
        ]
        if upsampling == "most":
            blocks.append(("up_4", 0.5, True))
        self.blocks = [(name, doubles) for name, _, doubles in blocks]
        channels = 16 * base_channels
        self.fc = Conv3x3(in_channels, channels)
        for name, factor, _ in blocks:
            width = int(factor * base_channels)
            self.add_module(name, SPADEBlock(channels, width, in_channels, hidden_channels))
            channels = width
        self.conv_img = Conv3x3(channels, out_channels)
        init_feature_loss("SPADEGenerator", self, init)

    def _image_size(self, crop_size: int, aspect_ratio: float) -> tuple[int, int]:
        width = crop_size // self.size_multiple
        height = round(width / aspect_ratio)
        if min(height, width) < 1:
            raise ValueError(
                f"SPADEGenerator: crop_size={crop_size} with aspect_ratio={aspect_ratio:g} gives a first map of {height}x{width}, "
                f"which has to be 1x1 at least. Use a crop_size of {self._smallest_crop(aspect_ratio)} or more, or less upsampling."
            )
        return height * self.size_multiple, width * self.size_multiple

    def _smallest_crop(self, aspect_ratio: float) -> int:
        width = 1
        while round(width / aspect_ratio) < 1:
            width += 1
        return width * self.size_multiple

    def forward(self, semantics: Tensor) -> Tensor:
        """The image of a semantic map."""
        size = self._first_map(semantics)
        # Most convolutions have kernels, whatever the last maps' channels are.
        semantics = maps.in_kernel_layout(semantics, 16 * self.base_channels)
        x = self.fc(_resized(semantics, size))
        for name, doubles in self.blocks:
            if doubles:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = self.get_submodule(name)(x, semantics)
        # An image is small, and whoever takes it need not know of memory formats.
        return self.conv_img(F.leaky_relu(x, _SLOPE)).tanh().contiguous()

    def _first_map(self, semantics: Tensor) -> tuple[int, int]:
        shape, step = tuple(semantics.shape), self.size_multiple
        if len(shape) != 4 or shape[1] != self.in_channels:
            raise ValueError(
                f"SPADEGenerator: semantics must have shape (B, in_channels={self.in_channels}, H, W), got {shape}."
            )
        if shape[2] % step or shape[3] % step:
            raise ValueError(
                f"SPADEGenerator: height and width of semantics must be multiples of {step}, got {shape[2]}x{shape[3]}. Crop or "
                "resize the label maps."
            )
        one_position = shape[0] * shape[2] * shape[3] == step**2
        if self.training and one_position and ranks_of(None) is None:
            raise ValueError(
                f"SPADEGenerator: a batch of one image of {step}x{step} has a first map of one position, of which batch norm has no "
                "variance. Use a larger batch or crop_size, or less upsampling."
            )
        return shape[2] // step, shape[3] // step


def _resized(semantics: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbours; `semantics` itself where it has the size."""
    return semantics if semantics.shape[2:] == size else F.interpolate(semantics, size)
