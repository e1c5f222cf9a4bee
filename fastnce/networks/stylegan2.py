"""SinCUT's generator and discriminator, built from the layers of StyleGAN2."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastnce.networks.stylegan2_layers import ConvLayer, EqualLinear, ResBlock, UpsamplingStyledConv


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

    Example:
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
        features = []
        for index, layer in enumerate(self.encoder.convs[:stop]):
            x = layer(x)
            if index in taps:
                features.append(x)
        return x, features

    def _checked(self, taps: Sequence[int]) -> list[int]:
        taps, count = list(taps), len(self.encoder.convs)
        if not taps or taps != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < count:
            raise ValueError(
                f"StyleGAN2Generator: taps={taps} must be ascending, distinct layer indices from 0 to {count - 1} (this "
                f"generator's encoder has {count} layers)."
            )
        return taps


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

    Example:
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
