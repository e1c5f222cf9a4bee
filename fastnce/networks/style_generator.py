"""StyleGAN2, configuration f: a mapping network, a synthesis network driven by styles, and the discriminator.

Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020 (https://arxiv.org/abs/1912.04958),
written from its equations. The names and shapes of the weights are those of rosinality's stylegan2-pytorch, in which most trained
generators are handed on.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.files import atomic_path
from fastnce.networks.stylegan2 import (
    DEMODULATION_EPS,
    Blur,
    ConvLayer,
    EqualLinear,
    FusedLeakyReLU,
    ResBlock,
    flatten_biases,
)
from fastnce.networks.weights import load_strictly, read_plain
from fastnce.ops.conv3x3 import conv3x3

Noise = Literal["fixed", "random"]

# Channels at 4x4, 8x8, ... up to 1024x1024 in configuration f.
PUBLISHED_CHANNELS = (512, 512, 512, 512, 512, 256, 128, 64, 32)
_NORM_EPS = 1e-8  # of the latent and of the minibatch's standard deviation
_STDDEV_GROUP = 4


class Upsample(nn.Module):
    """Twice the size: zeros between the pixels, then `outer([1, 3, 3, 1]) / 16`; (B, C, H, W) -> (B, C, 2H, 2W).

    The filter is the persistent buffer `kernel` (4, 4).
    """

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", Blur(padding=0, gain=4.0).kernel)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, 1, -1, -1)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=channels)


class ModulatedConv2d(nn.Module):
    """Convolution whose weights are scaled by a style for each image: x (B, in, H, W) and w (B, D) -> (B, out, H, W).

    With the style `s = modulation(w)`, (B, in), an image is convolved with

        W[o, i] = s[i] * weight[o, i] / sqrt(in * k^2),    demodulated W[o] / sqrt(sum over i, k of W[o]^2 + 1e-8)

    computed as one convolution for the whole batch: the input is scaled by s, the output by the factor of the demodulation.
    `upsample` doubles the size: a transposed convolution of stride 2, then a blur.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        latent_dim: int,
        *,
        demodulate: bool = True,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        # The leading 1 is the batch axis of a weight that styles make different for each image.
        self.weight = nn.Parameter(
            torch.randn(1, out_channels, in_channels, kernel_size, kernel_size)
        )
        self.modulation = EqualLinear(latent_dim, in_channels, bias=1.0)
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.padding = kernel_size // 2
        self.demodulate = demodulate
        self.blur = Blur(padding=1, gain=4.0) if upsample else None

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.modulation(w)  # (B, in)
        weight = self.weight[0] * self.scale
        x = x * style[:, :, None, None]
        if self.blur is not None:
            x = self.blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))
        elif self.padding == 1:
            x = conv3x3(x, weight)
        else:
            x = F.conv2d(x, weight)
        if self.demodulate:
            norms = style.square() @ weight.square().sum((2, 3)).T  # (B, out)
            x = x * torch.rsqrt(norms + DEMODULATION_EPS)[:, :, None, None]
        return x


class GivenNoise(nn.Module):
    """`x + weight * noise`, with noise (1 or B, 1, H, W) for all channels; `weight` (1,) starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return x + self.weight * noise


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, noise, activation; with `upsample` of twice the size."""

    def __init__(
        self, in_channels: int, out_channels: int, latent_dim: int, upsample: bool = False
    ) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, 3, latent_dim, upsample=upsample)
        self.noise = GivenNoise()
        self.activate = FusedLeakyReLU(out_channels)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        return self.activate(self.noise(self.conv(x, w), noise))


class ToRGB(nn.Module):
    """The image of a resolution: a modulated 1x1 convolution without demodulation, plus the smaller image, doubled."""

    def __init__(
        self, in_channels: int, image_channels: int, latent_dim: int, upsample: bool = True
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, image_channels, 1, 1))
        self.conv = ModulatedConv2d(in_channels, image_channels, 1, latent_dim, demodulate=False)
        if upsample:
            self.upsample = Upsample()

    def forward(self, x: Tensor, w: Tensor, smaller: Tensor | None = None) -> Tensor:
        image = self.conv(x, w) + self.bias
        return image if smaller is None else image + self.upsample(smaller)


class ConstantInput(nn.Module):
    """The learnt 4x4 map (1, C, 4, 4) that every image starts from."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))


class StyleGenerator(nn.Module):
    """StyleGAN2's generator: `mapping` makes latents w of noise z, `forward` makes images of latents.

    An image has `num_styles = 2 log2(image_size) - 2` places at which a latent enters; each may have its own (the space W+).
    Images are about in [-1, 1], and not clamped.

    The buffer `latent_avg` (D,) is the mean latent, which truncation and ReStyle start from. It is zero until a training or a file
    sets it, and is part of the state dict. `published_state` leaves it out, as rosinality's files do.

    Args:
        image_size: side of the images in pixels, a power of two from 8 on.
        latent_dim: D, of z and of w.
        mapping_layers: layers of the mapping network.
        channels: widths at 4x4, 8x8, ... up to `image_size`; by default those of configuration f.
        image_channels: channels of the images.

    Raises:
        ValueError: another `image_size`, another number of `channels`, or latents of another shape.

    Examples:
        >>> import torch
        >>> g = StyleGenerator(16, latent_dim=8, channels=[8, 8, 4])
        >>> w = g.mapping(torch.randn(2, 8))
        >>> w.shape, g.num_styles, g(w).shape
        (torch.Size([2, 8]), 6, torch.Size([2, 3, 16, 16]))
        >>> g(g.mix(w[:1], w[1:], at=2), noise="random").shape
        torch.Size([1, 3, 16, 16])
    """

    latent_avg: Tensor

    def __init__(
        self,
        image_size: int,
        latent_dim: int = 512,
        mapping_layers: int = 8,
        channels: Sequence[int] | None = None,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        widths = _widths("StyleGenerator", image_size, channels)
        self.image_size, self.latent_dim = image_size, latent_dim
        self.channels, self.image_channels = widths, image_channels
        self.num_styles = 2 * len(widths)
        pixel_norm = nn.RMSNorm(latent_dim, eps=_NORM_EPS, elementwise_affine=False)
        layers = [
            EqualLinear(latent_dim, latent_dim, activation=True, lr_mul=0.01)
            for _ in range(mapping_layers)
        ]
        self.style = nn.Sequential(pixel_norm, *layers)
        self.input = ConstantInput(widths[0])
        self.conv1 = StyledConv(widths[0], widths[0], latent_dim)
        self.to_rgb1 = ToRGB(widths[0], image_channels, latent_dim, upsample=False)
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        for narrow, wide in zip(widths, widths[1:], strict=False):
            self.convs.append(StyledConv(narrow, wide, latent_dim, upsample=True))
            self.convs.append(StyledConv(wide, wide, latent_dim))
            self.to_rgbs.append(ToRGB(wide, image_channels, latent_dim))
        flatten_biases(self)
        self.noises = nn.Module()
        for j in range(self.num_styles - 1):
            side = 4 * 2 ** ((j + 1) // 2)
            self.noises.register_buffer(f"noise_{j}", torch.randn(1, 1, side, side))
        self.register_buffer("latent_avg", torch.zeros(latent_dim))

    def mapping(self, z: Tensor) -> Tensor:
        """Latents w (B, D) of noise z (B, D), which is drawn from N(0, 1)."""
        return self.style(z)

    def forward(self, w: Tensor, noise: Noise = "fixed") -> Tensor:
        """Images (B, image_channels, image_size, image_size) of latents.

        Args:
            w: (B, D), or (B, num_styles, D) for a latent at each place.
            noise: "fixed", the buffers `noises`, the same for all images, or "random", drawn from the default generator.
        """
        w, layers = self.spread(w), [self.conv1, *self.convs]
        batch = w.shape[0]  # not len, which a trace takes for a constant
        noises = [self.noises.get_buffer(f"noise_{j}") for j in range(len(layers))]
        if noise == "random":
            noises = [torch.randn_like(x.expand(batch, -1, -1, -1)) for x in noises]
        elif noise != "fixed":
            raise ValueError(f"StyleGenerator: noise={noise!r}. Use 'fixed' or 'random'.")
        x = self.conv1(self.input.input.expand(batch, -1, -1, -1), w[:, 0], noises[0])
        image = self.to_rgb1(x, w[:, 1])
        for block, to_rgb in enumerate(self.to_rgbs):
            # An image's latent is also that of the next resolution's first convolution.
            for j in (2 * block + 1, 2 * block + 2):
                x = layers[j](x, w[:, j], noises[j])
            image = to_rgb(x, w[:, 2 * block + 3], image)
        return image

    def spread(self, w: Tensor) -> Tensor:
        """Latents (B, num_styles, D) of latents (B, D), which are repeated, or (B, num_styles, D)."""
        if w.ndim == 2 and w.shape[1] == self.latent_dim:
            return w[:, None].expand(-1, self.num_styles, -1)
        if w.ndim == 3 and tuple(w.shape[1:]) == (self.num_styles, self.latent_dim):
            return w
        raise ValueError(
            f"StyleGenerator: w has the shape {tuple(w.shape)}, expected (B, {self.latent_dim}) or "
            f"(B, {self.num_styles}, {self.latent_dim}) for images of {self.image_size} pixels."
        )

    def mix(self, w1: Tensor, w2: Tensor, at: int) -> Tensor:
        """Latents (B, num_styles, D): those of `w1` in the first `at` places (coarse), those of `w2` in the others (fine)."""
        if not 0 <= at <= self.num_styles:
            raise ValueError(f"StyleGenerator.mix: at={at}. Use 0 to {self.num_styles}.")
        return torch.cat([self.spread(w1)[:, :at], self.spread(w2)[:, at:]], dim=1)

    def truncate(self, w: Tensor, psi: float) -> Tensor:
        """`latent_avg + psi * (w - latent_avg)`: 1 leaves latents, of any shape, as they are; less gives more typical images."""
        return self.latent_avg + psi * (w - self.latent_avg)

    @torch.no_grad()
    def mean_latent(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """The mean (D,) of `count` mapped samples, whose noise is drawn on the CPU from `generator`."""
        total = torch.zeros(self.latent_dim, dtype=torch.float64)
        for start in range(0, count, 10_000):
            z = torch.randn(min(10_000, count - start), self.latent_dim, generator=generator)
            total += self.mapping(z.to(self.latent_avg)).sum(0).double().cpu()
        return (total / count).to(self.latent_avg)

    def published_state(self) -> dict[str, Tensor]:
        """The state dict in the published layout: without `latent_avg`."""
        return {name: x for name, x in self.state_dict().items() if name != "latent_avg"}


class StyleDiscriminator(nn.Module):
    """StyleGAN2's discriminator: one real-or-fake logit per image, (B, image_channels, S, S) -> (B, 1), S = `image_size`.

    A 1x1 convolution, residual blocks down to 4x4, the standard deviation over a few images of the batch as one more channel, a 3x3
    convolution and two linear layers. A logit so depends on the other images of its group.

    Args:
        image_size: side of the images in pixels, a power of two from 8 on.
        channels: widths at 4x4, 8x8, ... up to `image_size`; by default those of configuration f.
        image_channels: channels of the images.

    Raises:
        ValueError: another `image_size`, another number of `channels`, or images of another shape.

    Examples:
        >>> import torch
        >>> StyleDiscriminator(16, channels=[8, 8, 4])(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 1])
    """

    def __init__(
        self, image_size: int, channels: Sequence[int] | None = None, image_channels: int = 3
    ) -> None:
        super().__init__()
        widths = _widths("StyleDiscriminator", image_size, channels)
        self.expected = (image_channels, image_size, image_size)
        down = widths[::-1]
        blocks = [ResBlock(a, b, downsample=True) for a, b in zip(down, down[1:], strict=False)]
        self.convs = nn.Sequential(ConvLayer(image_channels, down[0], 1), *blocks)
        last = widths[0]
        self.final_conv = ConvLayer(last + 1, last, 3)
        self.final_linear = nn.Sequential(
            EqualLinear(last * 4 * 4, last, activation=True), EqualLinear(last, 1)
        )
        flatten_biases(self)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the images `x`."""
        if tuple(x.shape[1:]) != self.expected:
            raise ValueError(
                f"StyleDiscriminator: x has the shape {tuple(x.shape)}, expected (B, {', '.join(map(str, self.expected))})."
            )
        x = self.convs(x)
        x = torch.cat([x, minibatch_stddev(x)], dim=1)
        return self.final_linear(self.final_conv(x).flatten(1))


def minibatch_stddev(x: Tensor) -> Tensor:
    """How much the maps of a group of images differ: (B, C, H, W) -> (B, 1, H, W), one number per group.

    The mean over C, H and W of `sqrt(variance over the group + 1e-8)`. A group has 4 images, or the largest smaller number that
    divides B: images b, b + B / 4, b + B / 2, ...
    """
    batch = len(x)
    size = max(n for n in range(1, _STDDEV_GROUP + 1) if batch % n == 0)
    groups = x.reshape(size, batch // size, *x.shape[1:])
    deviation = torch.sqrt(groups.var(0, correction=0) + _NORM_EPS).mean((1, 2, 3))  # (B / size,)
    return deviation.repeat(size)[:, None, None, None].expand(-1, 1, *x.shape[2:])


def _widths(what: str, image_size: int, channels: Sequence[int] | None) -> tuple[int, ...]:
    """The channels at 4x4, 8x8, ... up to `image_size`, checked."""
    if image_size < 8 or image_size & (image_size - 1):
        raise ValueError(
            f"{what}: image_size={image_size} must be a power of two from 8 on. Use 32, 256 or 1024."
        )
    count = image_size.bit_length() - 2
    widths = PUBLISHED_CHANNELS[:count] if channels is None else tuple(channels)
    if len(widths) != count:
        raise ValueError(
            f"{what}: channels={widths} has {len(widths)} widths, but images of {image_size} pixels are made at {count} sizes "
            f"from 4x4 on. Give {count} widths."
        )
    return widths


_FILE_HELP = (
    "Expected rosinality's layout: {g_ema: the generator's state dict, latent_avg: its mean latent}. A pickle of NVIDIA's or of "
    "StyleGAN2-ADA has to be converted first, with mapping.w_avg as latent_avg."
)
# Samples that the mean latent is estimated from, and the seed of their noise, where a file has none.
_SAMPLES, _SAMPLES_SEED = 100_000, 0


def style_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of the `StyleGenerator` with this published state dict, from keys and shapes; KeyError if it is none."""
    doublings = sum(bool(re.fullmatch(r"to_rgbs\.\d+\.bias", name)) for name in state)
    convolutions = ["conv1", *(f"convs.{2 * block}" for block in range(doublings))]
    return {
        "image_size": 4 * 2**doublings,
        "latent_dim": state["conv1.conv.modulation.weight"].shape[1],
        "mapping_layers": sum(bool(re.fullmatch(r"style\.\d+\.weight", name)) for name in state),
        "channels": tuple(state[f"{name}.conv.weight"].shape[1] for name in convolutions),
        "image_channels": state["to_rgb1.bias"].shape[1],
    }


def load_rosinality(path: Path | str) -> tuple[StyleGenerator, StyleDiscriminator | None]:
    """The generator in a file of rosinality's stylegan2-pytorch, averaged weights, and the discriminator where it has one.

    Such a file is {g_ema, latent_avg}, or the checkpoint of a training {g, d, g_ema, ...}. That one has no mean latent, which is
    then estimated from 100,000 samples, always the same; a line on standard error says so. Sizes and widths are those of the file.

    Raises:
        UserError: there is no such file, it is damaged, holds code, or something else than such a generator.
    """
    path = Path(path)
    # A training's options are in its checkpoints, as a Namespace of plain values.
    content = read_plain(path, _FILE_HELP, allowed=[argparse.Namespace])
    content = content if isinstance(content, Mapping) else {}
    generator = generator_of(content.get("g_ema"), content.get("latent_avg"), path, "g_ema")
    if "d" not in content:
        return generator, None
    discriminator = StyleDiscriminator(
        generator.image_size, generator.channels, generator.image_channels
    )
    load_strictly(discriminator, content["d"], path)
    return generator, discriminator


def generator_of(
    state: Mapping[str, Tensor] | None, mean: Tensor | None, path: Path, entry: str
) -> StyleGenerator:
    """The generator with a published state dict, read under `entry` of the file `path`, and a mean latent, (D,) or k times the same.

    With None for the mean it is estimated from 100,000 samples, always the same; a line on standard error says so.

    Raises:
        UserError: it is no such state dict, or a mean latent of another shape.
    """
    try:
        state = dict(state or {})
        generator = StyleGenerator(**style_options(state))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(
            f"{path}: has no StyleGAN2 generator under {entry}. {_FILE_HELP}"
        ) from error
    load_strictly(generator, state | {"latent_avg": generator.latent_avg}, path, _FILE_HELP)
    if mean is None:
        print(
            f"{path}: has no latent_avg; the mean of {_SAMPLES} mapped samples is taken.",
            file=sys.stderr,
        )
        mean = generator.mean_latent(_SAMPLES, torch.Generator().manual_seed(_SAMPLES_SEED))
    rows = mean.reshape(-1, mean.shape[-1])
    if rows.shape[1] != generator.latent_dim or not (rows == rows[0]).all():
        raise UserError(
            f"{path}: latent_avg has the shape {tuple(mean.shape)}, expected ({generator.latent_dim},), or rows of it. {_FILE_HELP}"
        )
    generator.latent_avg.copy_(rows[0])
    return generator


def save_rosinality(
    path: Path | str, generator: StyleGenerator, discriminator: StyleDiscriminator | None = None
) -> None:
    """Writes {g_ema, latent_avg}, and d where it is given, as `load_rosinality` and the published programs read it."""
    content: dict[str, Any] = {
        "g_ema": {name: x.cpu() for name, x in generator.published_state().items()},
        "latent_avg": generator.latent_avg.cpu(),
    }
    if discriminator is not None:
        content["d"] = {name: x.cpu() for name, x in discriminator.state_dict().items()}
    with atomic_path(path) as temporary:
        torch.save(content, temporary)
