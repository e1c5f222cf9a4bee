"""SinCUT's generator and discriminator, built from the layers of StyleGAN2, and these layers in plain PyTorch.

StyleGAN2 itself is in `style_generator.py`. The layers run on any device and can be differentiated twice. Source: Karras et al., "Analyzing and Improving the Image Quality of
StyleGAN", CVPR 2020 (https://arxiv.org/abs/1912.04958), written from its equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.networks.layers import checked_taps, run_with_taps
from fastnce.ops.conv3x3 import conv3x3

SLOPE = 0.2  # of the leaky ReLU
DEMODULATION_EPS = 1e-8
_EVAL_NOISE_SEED = 0


class FusedLeakyReLU(nn.Module):
    """`sqrt(2) * leaky_relu(x + bias, 0.2)`: bias, activation and the gain that keeps the variance, (B, C, H, W) to the same.

    `bias` is (1, C, 1, 1), or (C,) as `flatten_biases` makes it, and starts at 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2) * F.leaky_relu(x + self.bias.view(1, -1, 1, 1), SLOPE)


def flatten_biases(network: nn.Module) -> None:
    """Gives the biases of the activations the shape (C,): that of StyleGAN2's published weights, where SinCUT's are (1, C, 1, 1)."""
    for layer in network.modules():
        if isinstance(layer, FusedLeakyReLU):
            layer.bias = nn.Parameter(layer.bias.detach().flatten())


class EqualConv2d(nn.Module):
    """Convolution without bias at an equalised learning rate: weights from N(0, 1), used as `weight / sqrt(fan_in)`.

    fan_in is in_channels * kernel_size^2. An optimiser such as Adam, whose steps do not depend on the gradient's scale, then
    moves the weights of wide and narrow layers by the same share.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        if (weight.shape[-1], self.stride, self.padding) == (3, 1, 1):
            return conv3x3(x, weight)
        return F.conv2d(x, weight, stride=self.stride, padding=self.padding)


class EqualLinear(nn.Module):
    """Linear layer at an equalised learning rate, (..., in_features) -> (..., out_features).

    With `activation`, `sqrt(2) * leaky_relu(., 0.2)` follows. `lr_mul` makes the layer learn as with a learning rate so many
    times as large: the weights start from N(0, 1 / lr_mul^2), and weights and biases are multiplied by it when used. The biases
    start at `bias`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: bool = False,
        lr_mul: float = 1.0,
        bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_features,), bias))
        self.scale = lr_mul / math.sqrt(in_features)
        self.lr_mul = lr_mul
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight * self.scale, self.bias * self.lr_mul)
        return math.sqrt(2) * F.leaky_relu(x, SLOPE) if self.activation else x


class Blur(nn.Module):
    """Low-pass filter `gain * outer([1, 3, 3, 1]) / 64` on each channel, zeros beyond the border.

    `(B, C, H, W) -> (B, C, H', W')` with `H' = (H + 2 padding - 4) // stride + 1`. The filter is the persistent buffer
    `kernel` (4, 4). Its sum is `gain`: 1, or 4 behind a transposed convolution that filled three of four pixels with zeros.
    """

    kernel: Tensor

    def __init__(self, padding: int, stride: int = 1, gain: float = 1.0) -> None:
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", gain * torch.outer(row, row) / 64)
        self.padding, self.stride = padding, stride

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, 1, -1, -1)
        return F.conv2d(x, kernel, stride=self.stride, padding=self.padding, groups=channels)


class ConvLayer(nn.Sequential):
    """Equalised convolution that keeps or halves the size, then `FusedLeakyReLU` unless `activate` is off.

    Halving blurs first, padded so that blur and convolution together are centred on each block of 2x2 pixels. Layers, and so
    state-dict keys: `0` convolution, `1` activation; with `downsample` `0` blur, `1` convolution, `2` activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        downsample: bool = False,
        activate: bool = True,
    ) -> None:
        layers: list[nn.Module] = []
        if downsample and kernel_size == 1:
            # A 1x1 convolution of stride 2 reads every other blurred pixel, so only these are computed.
            layers += [Blur(padding=1, stride=2), EqualConv2d(in_channels, out_channels, 1)]
        elif downsample:
            blur = Blur(padding=(kernel_size + 1) // 2)
            layers += [blur, EqualConv2d(in_channels, out_channels, kernel_size, stride=2)]
        else:
            padding = kernel_size // 2
            layers.append(EqualConv2d(in_channels, out_channels, kernel_size, padding=padding))
        if activate:
            layers.append(FusedLeakyReLU(out_channels))
        super().__init__(*layers)


class ResBlock(nn.Module):
    """`(conv2(conv1(x)) + skip(x)) / sqrt(2)` with two activated 3x3 convolutions.

    With `downsample` the second halves the size. The skip is the identity, or where the channels or the size change a 1x1
    convolution without bias and activation.
    """

    def __init__(self, in_channels: int, out_channels: int, downsample: bool = False) -> None:
        super().__init__()
        self.conv1 = ConvLayer(in_channels, in_channels, 3)
        self.conv2 = ConvLayer(in_channels, out_channels, 3, downsample)
        self.skip: nn.Module = nn.Identity()
        if downsample or in_channels != out_channels:
            self.skip = ConvLayer(in_channels, out_channels, 1, downsample, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class UpsamplingModulatedConv2d(nn.Module):
    """Modulated 3x3 convolution with a style of ones that doubles the size, then a blur: (B, C, H, W) -> (B, C', 2H, 2W).

    A style would scale the weights of each sample; of ones only the normalisation (demodulation) is left:

        y = blur(conv_transpose(x, w / sqrt(sum over i, k of w[o, i, k]^2 + 1e-8)))
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # The leading 1 is the batch axis of a weight that styles would make different for each sample.
        self.weight = nn.Parameter(torch.randn(1, out_channels, in_channels, 3, 3))
        self.scale = 1 / math.sqrt(in_channels * 3**2)
        self.blur = Blur(padding=1, gain=4.0)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight[0] * self.scale
        norms = weight.square().sum((1, 2, 3), keepdim=True)
        weight = weight * torch.rsqrt(norms + DEMODULATION_EPS)
        return self.blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))


class NoiseInjection(nn.Module):
    """Adds `weight` times normal noise, one value per pixel for all channels; `weight` (1,) starts at 0.

    In training mode every image has its own noise, from the default random generator. In eval mode it is the same noise for
    all images of a size, whatever was drawn before: a translation can be repeated, and does not depend on its batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        if self.training:
            noise = x.new_empty(batch, 1, height, width).normal_()
        else:
            noise = fixed_noise(height, width).to(x)
        return x + self.weight * noise


def fixed_noise(height: int, width: int) -> Tensor:
    """The noise of `NoiseInjection` in eval mode, before its weight: (1, 1, height, width) on the CPU."""
    generator = torch.Generator().manual_seed(_EVAL_NOISE_SEED)
    return torch.randn(1, 1, height, width, generator=generator)


class UpsamplingStyledConv(nn.Module):
    """Doubles the size: modulated convolution with a style of ones, noise, activation."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = UpsamplingModulatedConv2d(in_channels, out_channels)
        self.noise = NoiseInjection()
        self.activate = FusedLeakyReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.noise(self.conv(x)))


class StyleGAN2Generator(nn.Module):
    """Image-to-image generator of StyleGAN2's layers: one halving, residual blocks, one doubling, no normalisation.

    `(B, in_channels, H, W) -> (B, out_channels, H, W)` for H and W multiples of 2. The encoder `encoder.convs` is 0 the image
    itself, 1 a 1x1 convolution, 2 the residual block that halves the size and doubles the channels, 3... the first half of
    the residual blocks. The decoder `decoder.convs` is the other half, then a modulated convolution (style of ones) that
    doubles the size, and a 1x1 convolution. As in the published network the last layer is activated by a leaky ReLU and not by
    tanh: the output is not bounded, and the training has to bring it into [-1, 1].

    In training mode the decoder adds noise, with a weight that is learnt and starts at 0; see `NoiseInjection`.

    **Taps** are indices of `encoder.convs`; the defaults of SinCUT are 0, 2 and 4.

    Source: Park et al., "Contrastive Learning for Unpaired Image-to-Image Translation", ECCV 2020 (SinCUT); the layers from
    Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020.

    Args:
        in_channels: channels of the input image.
        out_channels: channels of the output image.
        base_channels: channels at full size, doubled at half size. The published `ngf` = 10 gives 80 for crops of 64 pixels
            (and 8 ngf 64 / s for crops of s).
        num_blocks: residual blocks at half size, an even number.

    Raises:
        ValueError: `num_blocks` is odd; H or W is odd; taps that are not there.

    Examples:
        >>> import torch
        >>> g = StyleGAN2Generator(base_channels=4, num_blocks=2)
        >>> image, (pixels, block) = g(torch.zeros(1, 3, 32, 48), taps=[0, 2])
        >>> image.shape, pixels.shape, block.shape
        (torch.Size([1, 3, 32, 48]), torch.Size([1, 3, 32, 48]), torch.Size([1, 8, 16, 24]))
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        base_channels: int = 80,
        num_blocks: int = 6,
    ) -> None:
        super().__init__()
        if num_blocks % 2:
            raise ValueError(
                f"StyleGAN2Generator: num_blocks={num_blocks} is shared by encoder and decoder. Use an even number."
            )
        c = base_channels
        blocks = [ResBlock(2 * c, 2 * c) for _ in range(num_blocks)]
        half = num_blocks // 2
        self.encoder = _Layers(
            nn.Identity(),
            ConvLayer(in_channels, c, 1),
            ResBlock(c, 2 * c, downsample=True),
            *blocks[:half],
        )
        self.decoder = _Layers(
            *blocks[half:], UpsamplingStyledConv(2 * c, c), ConvLayer(c, out_channels, 1)
        )

    def forward(
        self, x: Tensor, taps: Sequence[int] | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Translates `x`; with `taps` (ascending indices of `encoder.convs`) also returns those layers' features."""
        checked = [] if taps is None else self._checked(taps)
        x, features = self._run(x, checked, stop=len(self.encoder.convs))
        image = self.decoder.convs(x)
        return image if taps is None else (image, features)

    def encode(self, x: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """Features of the layers `taps` (ascending), computing nothing behind the last of them."""
        checked = self._checked(taps)
        return self._run(x, checked, stop=checked[-1] + 1)[1]

    def _run(self, x: Tensor, taps: list[int], stop: int) -> tuple[Tensor, list[Tensor]]:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(
                f"StyleGAN2Generator: x has {x.shape[2]}x{x.shape[3]} pixels, but the size is halved and doubled again. "
                "Use even sides."
            )
        return run_with_taps(self.encoder.convs[:stop], x, taps)

    def _checked(self, taps: Sequence[int]) -> list[int]:
        return checked_taps("StyleGAN2Generator", taps, len(self.encoder.convs))


class StyleGAN2Discriminator(nn.Module):
    """One real-or-fake logit per image: `(B, in_channels, image_size, image_size) -> (B, 1)`.

    A 1x1 convolution, residual blocks that halve the size down to 4x4 and double the channels up to `max_channels`, a 3x3
    convolution and two linear layers. No normalisation and no minibatch statistics, so every logit depends on its own image
    alone. State-dict keys: `convs`, `final_conv`, `final_linear`.

    Source: as for `StyleGAN2Generator`. The published `ndf` = 8 is `base_channels` 32 for crops of 64 pixels.

    Args:
        in_channels: channels of the image.
        base_channels: channels at full size.
        image_size: side of the images in pixels, a power of two from 8 on. The linear layer is bound to it.
        max_channels: where doubling stops.

    Raises:
        ValueError: `image_size` is another number, or an image has another size.

    Examples:
        >>> import torch
        >>> StyleGAN2Discriminator(base_channels=4, image_size=16)(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 32,
        image_size: int = 64,
        max_channels: int = 384,
    ) -> None:
        super().__init__()
        if image_size < 8 or image_size & (image_size - 1):
            raise ValueError(
                f"StyleGAN2Discriminator: image_size={image_size} must be a power of two from 8 on, as the size is halved "
                "down to 4x4. Use 32, 64 or 128."
            )
        self.image_size = image_size
        halvings = image_size.bit_length() - 3
        widths = [min(base_channels * 2**level, max_channels) for level in range(halvings + 1)]
        blocks = [
            ResBlock(width, wider, downsample=True)
            for width, wider in zip(widths, widths[1:], strict=False)
        ]
        self.convs = nn.Sequential(ConvLayer(in_channels, widths[0], 1), *blocks)
        last = widths[-1]
        self.final_conv = ConvLayer(last, last, 3)
        self.final_linear = nn.Sequential(
            EqualLinear(last * 4 * 4, last, activation=True), EqualLinear(last, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the images `x`."""
        if tuple(x.shape[2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"StyleGAN2Discriminator: x has {x.shape[2]}x{x.shape[3]} pixels, but image_size={self.image_size}. "
                "Crop the images to that size."
            )
        return self.final_linear(self.final_conv(self.convs(x)).flatten(1))


class _Layers(nn.Module):
    """Layers under the name `convs`, for the published state-dict keys `encoder.convs.i` and `decoder.convs.i`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.convs = nn.Sequential(*layers)
