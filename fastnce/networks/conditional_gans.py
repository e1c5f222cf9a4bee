"""The class-conditional GANs: their layers, the bases with the class heads, and the families BigGAN, SNGAN and DCGAN."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.networks.layers import Conv3x3, spectral_norm

NORM_EPS = 1e-4
SPECTRAL_EPS = 1e-6

Conditioning = Literal["none", "2C", "D2DCE", "AC", "PD"]
DiscriminatorNorm = Literal["spectral", "batch", "none"]
# Channels of the maps, in units of base_channels, by image size.
Widths = dict[int, tuple[int, ...]]


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    bias: bool = True,
    spectral: bool,
) -> nn.Module:
    """Convolution, orthogonal at first, whose map keeps its size at stride 1 (odd kernel) or halves at 2 (kernel 4)."""
    if (kernel, stride) == (3, 1):
        return _prepared(Conv3x3(in_channels, out_channels, bias=bias), spectral)
    padding = (kernel - 1) // 2
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=bias)
    return _prepared(layer, spectral)


def linear(in_dim: int, out_dim: int, *, bias: bool = True, spectral: bool) -> nn.Module:
    """Linear layer, orthogonal at first."""
    return _prepared(nn.Linear(in_dim, out_dim, bias=bias), spectral)


def embedding(num_classes: int, dim: int, *, spectral: bool) -> nn.Module:
    """One vector per class, orthogonal at first."""
    return _prepared(nn.Embedding(num_classes, dim), spectral)


def upsample_conv2d(in_channels: int, out_channels: int) -> nn.Module:
    """4x4 transposed convolution that doubles the map, orthogonal at first."""
    return _prepared(nn.ConvTranspose2d(in_channels, out_channels, 4, 2, 1), spectral=False)


def _prepared(layer: nn.Module, spectral: bool) -> nn.Module:
    nn.init.orthogonal_(layer.weight)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer, SPECTRAL_EPS) if spectral else layer


def batch_norm(channels: int, *, affine: bool = True) -> nn.BatchNorm2d:
    """Batch norm with the eps of all these networks, 1e-4."""
    return nn.BatchNorm2d(channels, eps=NORM_EPS, affine=affine)


def discriminator_norm(channels: int, norm: DiscriminatorNorm) -> nn.Module:
    """Batch norm where `norm` says so; spectral norm is a matter of the convolutions."""
    return batch_norm(channels) if norm == "batch" else nn.Identity()


def one_hot(labels: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """Labels (N,) as rows (N, num_classes) of the dtype of `like`."""
    return F.one_hot(labels, num_classes).to(like.dtype)


class ConditionalBatchNorm(nn.Module):
    """`BN(x) * (1 + gain(c)) + bias(c)`: batch norm whose scale and shift are linear in a condition.

    `x` (N, C, H, W) and the condition `c` (N, condition_dim) -> (N, C, H, W). Gain and bias have no bias of their own.
    Keys: `bn.*`, `gain.*`, `bias.*`.

    Source: Dumoulin et al., "A Learned Representation For Artistic Style", ICLR 2017; in this form Brock et al., "Large
    Scale GAN Training for High Fidelity Natural Image Synthesis" (BigGAN), ICLR 2019.

    Args:
        channels: C.
        condition_dim: length of the condition.
        spectral: spectral norm on the two linear layers.
    """

    def __init__(self, channels: int, condition_dim: int, *, spectral: bool) -> None:
        super().__init__()
        self.bn = batch_norm(channels, affine=False)
        self.gain = linear(condition_dim, channels, bias=False, spectral=spectral)
        self.bias = linear(condition_dim, channels, bias=False, spectral=spectral)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain = 1 + self.gain(condition)[:, :, None, None]
        return self.bn(x) * gain + self.bias(condition)[:, :, None, None]


class SelfAttention(nn.Module):
    """`x + sigma * conv1x1_attn(attention)`: every position looks at the 2x2-pooled map. sigma is learnt and starts at 0.

    `(N, C, H, W) -> (N, C, H, W)`, C a multiple of 8, H and W at least 2. With theta, phi (C / 8 channels) and g (C / 2)
    1x1 convolutions of x, phi and g max-pooled: attention = softmax(theta^T phi) g^T, not scaled. All without bias.

    Source: Zhang et al., "Self-Attention Generative Adversarial Networks", ICML 2019.

    Args:
        channels: C.
        spectral: spectral norm on the convolutions.
    """

    def __init__(self, channels: int, *, spectral: bool) -> None:
        super().__init__()
        if channels % 8:
            raise ValueError(
                f"SelfAttention: channels={channels} must be a multiple of 8. Choose base_channels so, or attention_after=0."
            )
        eighth, half = channels // 8, channels // 2
        self.conv1x1_theta = conv2d(channels, eighth, 1, bias=False, spectral=spectral)
        self.conv1x1_phi = conv2d(channels, eighth, 1, bias=False, spectral=spectral)
        self.conv1x1_g = conv2d(channels, half, 1, bias=False, spectral=spectral)
        self.conv1x1_attn = conv2d(half, channels, 1, bias=False, spectral=spectral)
        self.sigma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query = _positions(self.conv1x1_theta(x))  # (N, HW, C / 8)
        key = _positions(F.max_pool2d(self.conv1x1_phi(x), 2))  # (N, HW / 4, C / 8)
        value = _positions(F.max_pool2d(self.conv1x1_g(x), 2))  # (N, HW / 4, C / 2)
        weights = torch.softmax(query @ key.transpose(1, 2), dim=-1)  # (N, HW, HW / 4)
        attended = (weights @ value).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.sigma * self.conv1x1_attn(attended)


def _positions(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, HW, C); a view of a channels-last map."""
    return x.flatten(2).transpose(1, 2)


class DiscriminatorOutput(NamedTuple):
    """A discriminator's word on N images.

    Attributes:
        adversarial: (N,) logits, high for real.
        features: (N, F), the last feature map summed over its positions; what the heads are computed from.
        embedding: (N, E), 2C and D2DCE only. Not normalised: the losses do.
        proxy: (N, E), the vector of each sample's own class, 2C and D2DCE only. Not normalised.
        class_logits: (N, num_classes), AC only.
    """

    adversarial: Tensor
    features: Tensor
    embedding: Tensor | None
    proxy: Tensor | None
    class_logits: Tensor | None


class ConditionalGenerator(nn.Module):
    """Base of the generators: `g(z, labels) -> images` (N, image_channels, image_size, image_size) in [-1, 1].

    It has the linear layer to a 4x4 map (or 5x5 to 7x7, see `smallest_map`); a family implements `_generate(z, labels)`.

    Args:
        image_size: 4, 5, 6 or 7 times a power of two, from 16 to 448.
        latent_dim: length of z.
        num_classes: number of classes.
        base_channels: unit of the widths.
        image_channels: channels of the images.
        first_dim: length of the linear layer's input.
        spectral: spectral norm on the linear layer.
    """

    WIDTHS: ClassVar[Widths]

    def __init__(
        self,
        image_size: int,
        latent_dim: int,
        num_classes: int,
        base_channels: int,
        image_channels: int,
        *,
        first_dim: int,
        spectral: bool,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.image_channels = image_channels
        self.widths = [base_channels * w for w in widths_for(self, self.WIDTHS, image_size)]
        self.first_map = smallest_map(image_size)
        self.linear0 = linear(first_dim, self.first_map**2 * self.widths[0], spectral=spectral)

    def _first(self, x: Tensor) -> Tensor:
        return self.linear0(x).unflatten(1, (-1, self.first_map, self.first_map))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Images from latent vectors `z` (N, latent_dim) and class indices `labels` (N,) int64.

        Raises:
            ValueError: a wrong shape; on the CPU also a label that is no class.
        """
        name = type(self).__name__
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(
                f"{name}: z must have shape (N, latent_dim={self.latent_dim}), got {tuple(z.shape)}."
            )
        check_labels(name, labels, len(z), self.num_classes)
        return self._generate(z, labels)

    def _generate(self, z: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class ConditionalDiscriminator(nn.Module):
    """Base of the discriminators: `d(images, labels) -> DiscriminatorOutput`.

    A family implements `_features(images) -> (N, F)`. The heads on features h and label y, by `conditioning`:

    - "none": adversarial = linear1(h) only, as in all the others.
    - "2C" (ContraGAN), "D2DCE" (ReACGAN): embedding = linear2(h), proxy = embedding[y].
    - "AC" (ACGAN): class_logits = linear2(h), without bias.
    - "PD" (projection): adversarial = linear1(h) + <embedding[y], h>.

    Source: Kang and Park, "ContraGAN", NeurIPS 2020; Kang et al., "Rebooting ACGAN", NeurIPS 2021; Odena et al.,
    "Conditional Image Synthesis With Auxiliary Classifier GANs", ICML 2017; Miyato and Koyama, "cGANs with Projection
    Discriminator", ICLR 2018.

    Args:
        image_size, num_classes, image_channels: as in `ConditionalGenerator`.
        base_channels: unit of the widths; F is that of the last map.
        conditioning: how the class is judged: "none", "2C", "D2DCE", "AC" or "PD".
        embed_dim: E, length of embedding and proxy; used by 2C and D2DCE.
        norm: "spectral", also on the heads; "batch" or "none".
    """

    WIDTHS: ClassVar[Widths]

    def __init__(
        self,
        image_size: int,
        num_classes: int,
        base_channels: int,
        conditioning: Conditioning,
        embed_dim: int,
        image_channels: int,
        norm: DiscriminatorNorm,
    ) -> None:
        super().__init__()
        _one_of(self, "conditioning", conditioning, get_args(Conditioning))
        _one_of(self, "norm", norm, get_args(DiscriminatorNorm))
        spectral = norm == "spectral"
        self.image_size = image_size
        self.num_classes = num_classes
        self.image_channels = image_channels
        self.conditioning = conditioning
        self.widths = [base_channels * w for w in widths_for(self, self.WIDTHS, image_size)]
        self.feature_dim = feature_dim = self.widths[-1]
        self.linear1 = linear(feature_dim, 1, spectral=spectral)
        if conditioning in ("2C", "D2DCE"):
            self.linear2 = linear(feature_dim, embed_dim, spectral=spectral)
            self.embedding = embedding(num_classes, embed_dim, spectral=spectral)
        elif conditioning == "AC":
            self.linear2 = linear(feature_dim, num_classes, bias=False, spectral=spectral)
        elif conditioning == "PD":
            self.embedding = embedding(num_classes, feature_dim, spectral=spectral)

    def forward(self, images: Tensor, labels: Tensor) -> DiscriminatorOutput:
        """Judges `images` (N, image_channels, image_size, image_size) as members of the classes `labels` (N,) int64.

        Raises:
            ValueError: a wrong shape; on the CPU also a label that is no class.
        """
        name = type(self).__name__
        expected = (self.image_channels, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"{name}: images must have shape (N, {', '.join(map(str, expected))}), got {tuple(images.shape)}."
            )
        check_labels(name, labels, len(images), self.num_classes)
        h = self._features(images)
        adversarial = self.linear1(h).squeeze(1)
        embedded = proxy = class_logits = None
        if self.conditioning in ("2C", "D2DCE"):
            embedded, proxy = self.linear2(h), self.embedding(labels)
        elif self.conditioning == "AC":
            class_logits = self.linear2(h)
        elif self.conditioning == "PD":
            adversarial = adversarial + (self.embedding(labels) * h).sum(1)
        return DiscriminatorOutput(adversarial, h, embedded, proxy, class_logits)

    def _features(self, images: Tensor) -> Tensor:
        raise NotImplementedError


def widths_for(network: nn.Module, table: Widths, image_size: int) -> tuple[int, ...]:
    """The row of `table` for `image_size`, see `nominal_size`; raises `ValueError` if there is none."""
    nominal = nominal_size(image_size)
    if nominal not in table or nominal * smallest_map(image_size) != 4 * image_size:
        sizes = [base * size // 4 for size in table for base in (4, 5, 6, 7)]
        below = max((size for size in sizes if size < image_size), default=min(sizes))
        above = min((size for size in sizes if size > image_size), default=max(sizes))
        near = " or ".join(map(str, sorted({below, above})))
        raise ValueError(
            f"{type(network).__name__}: image_size={image_size} must be 4, 5, 6 or 7 times a power of two, from "
            f"{min(sizes)} to {max(sizes)}. Use {near}."
        )
    return table[nominal]


def nominal_size(image_size: int) -> int:
    """The power of two whose networks have the layers for images of this size: the largest that is not larger."""
    return 1 << max(image_size, 1).bit_length() - 1


def smallest_map(image_size: int) -> int:
    """Side of the generator's first map: 4 where the size is a power of two, as published, else 5, 6 or 7."""
    return 4 * image_size // nominal_size(image_size)


def check_labels(name: str, labels: Tensor, count: int, num_classes: int) -> None:
    """Raises `ValueError` unless `labels` are `count` class indices; their values are read on the CPU only.

    On a GPU reading them would wait for it; there the device's own assertion stops the run, where the labels index anything.
    """
    if labels.shape != (count,) or labels.dtype != torch.int64:
        raise ValueError(
            f"{name}: labels must be int64 of shape ({count},), got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if labels.device.type != "cpu" or count == 0 or torch.compiler.is_compiling():
        return
    for value in (int(labels.min()), int(labels.max())):
        if not 0 <= value < num_classes:
            raise ValueError(
                f"{name}: labels contain {value}, expected class indices from 0 to {num_classes - 1} "
                f"(num_classes={num_classes}). Correct the labels, or build the network with their number of classes."
            )


def _one_of(network: nn.Module, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{type(network).__name__}: {name}={value!r} must be one of {allowed}.")


# Of the residual networks. The rows of 32 to 256 are the published ones; that of 16 is ours, narrow where the map is large, as
# those of 64 and 128 are. Generator: before and after each block. Discriminator: after each block. Sizes in between take the row below them, and start from a larger map.
GENERATOR_WIDTHS = {
    16: (4, 2, 1),
    32: (4, 4, 4, 4),
    64: (16, 8, 4, 2, 1),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
}
DISCRIMINATOR_WIDTHS = {
    16: (1, 2, 4),
    32: (2, 2, 2, 2),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
}
# So many blocks at the front of the discriminator halve the map.
DOWNSAMPLING_BLOCKS = {16: 2, 32: 2, 64: 4, 128: 5, 256: 6}


class GeneratorBlock(nn.Module):
    """Doubles the map: cBN, ReLU, upsample, conv3, cBN, ReLU, conv3, plus the upsampled input through conv1.

    `x` (N, in, H, W) and the condition (N, condition_dim) -> (N, out, 2H, 2W). Upsampling repeats pixels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, condition_dim: int, *, spectral: bool
    ) -> None:
        super().__init__()
        self.bn1 = ConditionalBatchNorm(in_channels, condition_dim, spectral=spectral)
        self.bn2 = ConditionalBatchNorm(out_channels, condition_dim, spectral=spectral)
        self.conv2d0 = conv2d(in_channels, out_channels, 1, spectral=spectral)
        self.conv2d1 = conv2d(in_channels, out_channels, 3, spectral=spectral)
        self.conv2d2 = conv2d(out_channels, out_channels, 3, spectral=spectral)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.bn1(x, condition)), scale_factor=2)
        h = self.conv2d2(F.relu(self.bn2(self.conv2d1(h), condition)))
        # A 1x1 convolution of repeated pixels is the repeated convolution, at a quarter of the cost.
        return h + F.interpolate(self.conv2d0(x), scale_factor=2)


class FirstDiscriminatorBlock(nn.Module):
    """Halves the image: conv3, ReLU, conv3, average pool, plus the pooled image through conv1.

    `(N, in, H, W) -> (N, out, H / 2, W / 2)`. With norm="batch" there is one after the first convolution and one before
    that of the skip.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: DiscriminatorNorm) -> None:
        super().__init__()
        spectral = norm == "spectral"
        self.conv2d0 = conv2d(in_channels, out_channels, 1, spectral=spectral)
        self.conv2d1 = conv2d(in_channels, out_channels, 3, spectral=spectral)
        self.conv2d2 = conv2d(out_channels, out_channels, 3, spectral=spectral)
        self.bn0 = discriminator_norm(in_channels, norm)
        self.bn1 = discriminator_norm(out_channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2d2(F.relu(self.bn1(self.conv2d1(x))))
        return F.avg_pool2d(h, 2) + self.conv2d0(self.bn0(F.avg_pool2d(x, 2)))


class DiscriminatorBlock(nn.Module):
    """ReLU, conv3, ReLU, conv3 (average pool), plus a skip: the ReLU'd input (pooled, through conv1).

    `(N, in, H, W) -> (N, out, H / 2, W / 2)` if `downsample`, else (N, out, H, W); the skip has its convolution if it
    halves the map or changes the channels.

    The published ReLU works in place on the block's input, so the skip sees relu(x), not x. With norm="batch" a norm comes
    before each ReLU, and one before the convolution of the skip, which then sees x.
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm: DiscriminatorNorm, *, downsample: bool
    ) -> None:
        super().__init__()
        spectral = norm == "spectral"
        self.downsample = downsample
        self.relu_in_skip = norm != "batch"
        self.has_skip_conv = downsample or in_channels != out_channels
        if self.has_skip_conv:
            self.conv2d0 = conv2d(in_channels, out_channels, 1, spectral=spectral)
            self.bn0 = discriminator_norm(in_channels, norm)
        self.conv2d1 = conv2d(in_channels, out_channels, 3, spectral=spectral)
        self.conv2d2 = conv2d(out_channels, out_channels, 3, spectral=spectral)
        self.bn1 = discriminator_norm(in_channels, norm)
        self.bn2 = discriminator_norm(out_channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        h = self.conv2d2(F.relu(self.bn2(self.conv2d1(activated))))
        skip = activated if self.relu_in_skip else x
        if self.has_skip_conv:
            # Pooling before the 1x1 convolution is the same as behind it, at a quarter of the cost.
            skip = self.conv2d0(self._pool(self.bn0(skip)))
        return self._pool(h) + skip

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.downsample else x


class ResidualGenerator(ConditionalGenerator):
    """Linear layer to a 4x4 map (or 5x5 to 7x7, see `smallest_map`), `GeneratorBlock`s, batch norm, ReLU, conv3, tanh.

    The five sizes are those of `ConditionalGenerator`. State-dict keys: `linear0`, `blocks.{i}.0` (each block or attention layer is an
    entry of `blocks`), `bn4`, `conv2d5`.
    `condition_dim`: length of each block's condition; `attention_after`: as in `BigGANGenerator`; `spectral`: spectral norm on
    every layer.
    """

    WIDTHS = GENERATOR_WIDTHS

    def __init__(
        self, *sizes: int, first_dim: int, condition_dim: int, attention_after: int, spectral: bool
    ) -> None:
        super().__init__(*sizes, first_dim=first_dim, spectral=spectral)
        blocks = [
            GeneratorBlock(before, after, condition_dim, spectral=spectral)
            for before, after in itertools.pairwise(self.widths)
        ]
        self.blocks = _with_attention(self, blocks, self.widths[1:], attention_after, spectral)
        self.bn4 = batch_norm(self.widths[-1])
        self.conv2d5 = conv2d(self.widths[-1], self.image_channels, 3, spectral=spectral)

    def _generate(self, z: Tensor, labels: Tensor) -> Tensor:
        first, conditions = self._conditions(z, labels)
        remaining = iter(conditions)
        x = self._first(first)
        for (layer,) in self.blocks:
            x = layer(x) if isinstance(layer, SelfAttention) else layer(x, next(remaining))
        return self.conv2d5(F.relu(self.bn4(x))).tanh()

    def _conditions(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Iterable[Tensor]]:
        """The input of the linear layer, and the condition of each block."""
        raise NotImplementedError


def _with_attention(
    network: nn.Module,
    blocks: list[nn.Module],
    widths: list[int],
    attention_after: int,
    spectral: bool,
) -> nn.ModuleList:
    """The blocks, and behind number `attention_after` self-attention, each in a list of its own as published."""
    if not 0 <= attention_after <= len(blocks):
        raise ValueError(
            f"{type(network).__name__}: attention_after={attention_after} must be the number of a block, from 1 to "
            f"{len(blocks)}, or 0 for none."
        )
    layers = list(blocks)
    if attention_after:
        attention = SelfAttention(widths[attention_after - 1], spectral=spectral)
        layers.insert(attention_after, attention)
    return nn.ModuleList(nn.ModuleList([layer]) for layer in layers)


class BigGANGenerator(ResidualGenerator):
    """`g(z, labels) -> images` (N, image_channels, image_size, image_size) in [-1, 1].

    z is cut into one chunk for the first linear layer and one for each block. A block's condition is its chunk behind the
    label's shared embedding. Spectral norm on every layer but that embedding. State-dict keys are those of StudioGAN's
    checkpoints. Published configurations (image_size, latent_dim, base_channels, attention_after) and their parameters:

        CIFAR-10       32,  80, 96, 2:  9,416,196
        Tiny ImageNet  64, 100, 80, 3: 17,335,204
        ImageNet      128, 120, 96, 4: 70,433,988

    Source: Brock et al., "Large Scale GAN Training for High Fidelity Natural Image Synthesis", ICLR 2019; sizes of the
    layers as in Kang and Park, "ContraGAN", NeurIPS 2020.

    Args:
        latent_dim: length of z, a multiple of the number of chunks: 3 from 16 pixels on, 4 from 32, 5 from 64, 6 from 128,
            7 from 256.
        base_channels: unit of the widths; 96 and 80 as published.
        shared_dim: length of the label's embedding.
        attention_after: self-attention behind the block of this number, counted from 1; 0 for none.
        image_size, num_classes, image_channels: as in `ConditionalGenerator`; a size below 32 is ours.

    Examples:
        >>> import torch
        >>> g = BigGANGenerator(32, latent_dim=80, num_classes=10, base_channels=8)
        >>> g(torch.randn(2, 80), torch.tensor([3, 7])).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        image_size: int,
        latent_dim: int,
        num_classes: int,
        base_channels: int,
        shared_dim: int = 128,
        attention_after: int = 2,
        image_channels: int = 3,
    ) -> None:
        num_chunks = len(widths_for(self, GENERATOR_WIDTHS, image_size))
        if latent_dim % num_chunks:
            raise ValueError(
                f"BigGANGenerator: latent_dim={latent_dim} must be a multiple of {num_chunks}, the number of chunks at "
                f"image_size={image_size}."
            )
        chunk = latent_dim // num_chunks
        super().__init__(
            *(image_size, latent_dim, num_classes, base_channels, image_channels),
            first_dim=chunk,
            condition_dim=shared_dim + chunk,
            attention_after=attention_after,
            spectral=True,
        )
        self.chunk = chunk
        self.shared = embedding(num_classes, shared_dim, spectral=False)

    def _conditions(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Iterable[Tensor]]:
        first, *chunks = z.split(self.chunk, dim=1)
        shared = self.shared(labels)
        return first, [torch.cat([shared, chunk], dim=1) for chunk in chunks]


class SNGANGenerator(ResidualGenerator):
    """`g(z, labels) -> images` (N, image_channels, image_size, image_size) in [-1, 1].

    BigGAN's blocks and widths without its chunks, embedding and attention: the first layer takes the whole of z, the blocks'
    norms are conditioned on the one-hot label.

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018: the tables of its
    residual networks for CIFAR-10 (32 pixels) and ImageNet (128), which have base_channels=64 and latent_dim=128. 64 pixels
    are those of 128 with one of the two widest blocks less, 16 those of 32 with one block less. The label enters as in Miyato
    and Koyama, "cGANs with Projection Discriminator", ICLR 2018.

    Args:
        base_channels: unit of the widths, 64 as published.
        spectral_norm: spectral norm on every layer; the published generator has none.
        image_size, latent_dim, num_classes, image_channels: as in `ConditionalGenerator`.

    Examples:
        >>> import torch
        >>> g = SNGANGenerator(32, latent_dim=128, num_classes=10, base_channels=8)
        >>> g(torch.randn(2, 128), torch.tensor([3, 7])).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        image_size: int,
        latent_dim: int,
        num_classes: int,
        base_channels: int,
        image_channels: int = 3,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__(
            *(image_size, latent_dim, num_classes, base_channels, image_channels),
            first_dim=latent_dim,
            condition_dim=num_classes,
            attention_after=0,
            spectral=spectral_norm,
        )

    def _conditions(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Iterable[Tensor]]:
        return z, itertools.repeat(one_hot(labels, self.num_classes, z))


class SNGANDiscriminator(ConditionalDiscriminator):
    """`d(images, labels) -> DiscriminatorOutput`.

    A `FirstDiscriminatorBlock`, `DiscriminatorBlock`s, ReLU, the sum over all positions, and the heads. norm="batch" is that of
    ACGAN-Mod and ProjGAN, the weak baselines of the ContraGAN paper. State-dict keys: `blocks.{i}.0` (each block or attention
    layer is an entry of `blocks`), `linear1`, `linear2`, `embedding`.

    Source: as `SNGANGenerator`; its skips through ReLU'd inputs as in `DiscriminatorBlock`. The heads:
    `ConditionalDiscriminator`.

    Args:
        base_channels: unit of the widths, 64 as published.
        norm: "spectral" on every layer, "batch" in the blocks, or "none".
        attention_after: as in `BigGANDiscriminator`; the published one has none.
        image_size, num_classes, conditioning, embed_dim, image_channels: as in `ConditionalDiscriminator`.

    Examples:
        >>> import torch
        >>> d = SNGANDiscriminator(32, num_classes=10, base_channels=8, conditioning="AC")
        >>> d(torch.zeros(2, 3, 32, 32), torch.tensor([3, 7])).class_logits.shape
        torch.Size([2, 10])
    """

    WIDTHS = DISCRIMINATOR_WIDTHS

    def __init__(
        self,
        image_size: int,
        num_classes: int,
        base_channels: int,
        conditioning: Conditioning = "2C",
        embed_dim: int = 512,
        image_channels: int = 3,
        norm: DiscriminatorNorm = "spectral",
        attention_after: int = 0,
    ) -> None:
        super().__init__(
            image_size, num_classes, base_channels, conditioning, embed_dim, image_channels, norm
        )
        blocks: list[nn.Module] = [FirstDiscriminatorBlock(image_channels, self.widths[0], norm)]
        for index, (before, after) in enumerate(itertools.pairwise(self.widths), 1):
            halves = index < DOWNSAMPLING_BLOCKS[nominal_size(image_size)]
            blocks.append(DiscriminatorBlock(before, after, norm, downsample=halves))
        self.blocks = _with_attention(
            self, blocks, self.widths, attention_after, norm == "spectral"
        )

    def _features(self, images: Tensor) -> Tensor:
        x = images
        for (layer,) in self.blocks:
            x = layer(x)
        return F.relu(x).sum((2, 3))


class BigGANDiscriminator(SNGANDiscriminator):
    """`d(images, labels) -> DiscriminatorOutput`, with spectral norm on every layer.

    State-dict keys are those of StudioGAN's checkpoints. Published configurations (image_size, base_channels, embed_dim)
    and their parameters, with attention after block 1 and conditioning "2C":

        CIFAR-10       32, 96,  512:  2,517,186
        Tiny ImageNet  64, 80,  768: 31,678,130
        ImageNet      128, 96, 1536: 90,343,202

    Source: as `BigGANGenerator`; the heads: `ConditionalDiscriminator`.

    Args:
        base_channels: unit of the widths; 96 and 80 as published.
        attention_after: self-attention behind the block of this number, counted from 1; 0 for none.
        image_size, num_classes, conditioning, embed_dim, image_channels: as in `ConditionalDiscriminator`.

    Examples:
        >>> import torch
        >>> d = BigGANDiscriminator(32, num_classes=10, base_channels=8)
        >>> out = d(torch.zeros(2, 3, 32, 32), torch.tensor([3, 7]))
        >>> out.adversarial.shape, out.features.shape, out.embedding.shape, out.proxy.shape, out.class_logits
        (torch.Size([2]), torch.Size([2, 16]), torch.Size([2, 512]), torch.Size([2, 512]), None)
    """

    def __init__(
        self,
        image_size: int,
        num_classes: int,
        base_channels: int,
        attention_after: int = 1,
        conditioning: Conditioning = "2C",
        embed_dim: int = 512,
        image_channels: int = 3,
    ) -> None:
        super().__init__(
            *(image_size, num_classes, base_channels, conditioning, embed_dim, image_channels),
            attention_after=attention_after,
        )


# Of the small networks without skips: the generator's maps from the smallest on, the discriminator's reversed.
DCGAN_WIDTHS = {
    16: (4, 2, 1),
    32: (8, 4, 2, 1),
    64: (16, 8, 4, 2, 1),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 16, 8, 4, 2, 1),
}


class DCGANGenerator(ConditionalGenerator):
    """`g(z, labels) -> images` (N, image_channels, image_size, image_size) in [-1, 1].

    Linear layer to a 4x4 map (or 5x5 to 7x7, see `smallest_map`); 4x4 transposed convolutions of stride 2, each with a batch
    norm conditioned on the one-hot label and ReLU; conv3, tanh.

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018, Table 3. It is for 32
    pixels, base_channels=64 and latent_dim=128, and has no labels; the conditional norm is that of its residual network.
    The other sizes have as many stages as they need.

    Args:
        base_channels: channels of the last map, 64 as published.
        image_size, latent_dim, num_classes, image_channels: as in `ConditionalGenerator`.

    Examples:
        >>> import torch
        >>> g = DCGANGenerator(32, latent_dim=128, num_classes=10, base_channels=8)
        >>> g(torch.randn(2, 128), torch.tensor([3, 7])).shape
        torch.Size([2, 3, 32, 32])
    """

    WIDTHS = DCGAN_WIDTHS

    def __init__(
        self,
        image_size: int,
        latent_dim: int,
        num_classes: int,
        base_channels: int,
        image_channels: int = 3,
    ) -> None:
        super().__init__(
            *(image_size, latent_dim, num_classes, base_channels, image_channels),
            first_dim=latent_dim,
            spectral=False,
        )
        widths = self.widths
        self.convs = nn.ModuleList(map(upsample_conv2d, widths[:-1], widths[1:]))
        self.norms = nn.ModuleList(
            ConditionalBatchNorm(width, num_classes, spectral=False) for width in widths[1:]
        )
        self.last = conv2d(widths[-1], image_channels, 3, spectral=False)

    def _generate(self, z: Tensor, labels: Tensor) -> Tensor:
        condition = one_hot(labels, self.num_classes, z)
        x = self._first(z)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x), condition))
        return self.last(x).tanh()


class DCGANDiscriminator(ConditionalDiscriminator):
    """`d(images, labels) -> DiscriminatorOutput`.

    For each width a conv3, and but for the last a 4x4 convolution of stride 2, all with leaky ReLU 0.1; then the sum over
    all positions, and the heads.

    Source: as `DCGANGenerator`, but for the sum, which gives all families the same kind of features: Table 3 ends in a linear
    layer over all positions. The heads: `ConditionalDiscriminator`.

    Args:
        base_channels: channels of the first map, 64 as published.
        image_size, num_classes, conditioning, embed_dim, image_channels: as in `ConditionalDiscriminator`.
        norm: "spectral" on every layer, "batch" behind every convolution but the first, or "none".

    Examples:
        >>> import torch
        >>> d = DCGANDiscriminator(32, num_classes=10, base_channels=8, conditioning="PD")
        >>> d(torch.zeros(2, 3, 32, 32), torch.tensor([3, 7])).features.shape
        torch.Size([2, 64])
    """

    WIDTHS: ClassVar[Widths] = {size: widths[::-1] for size, widths in DCGAN_WIDTHS.items()}

    def __init__(
        self,
        image_size: int,
        num_classes: int,
        base_channels: int,
        conditioning: Conditioning = "2C",
        embed_dim: int = 512,
        image_channels: int = 3,
        norm: DiscriminatorNorm = "spectral",
    ) -> None:
        super().__init__(
            image_size, num_classes, base_channels, conditioning, embed_dim, image_channels, norm
        )
        self.layers = nn.Sequential()
        channels = image_channels
        for width in self.widths:
            if self.layers:
                self._append(channels, channels, norm, kernel=4, stride=2)
            self._append(channels, width, norm)
            channels = width

    def _append(
        self, before: int, after: int, norm: DiscriminatorNorm, kernel: int = 3, stride: int = 1
    ) -> None:
        behind = discriminator_norm(after, norm) if self.layers else nn.Identity()
        conv = conv2d(before, after, kernel, stride=stride, spectral=norm == "spectral")
        self.layers.extend([conv, behind, nn.LeakyReLU(0.1)])

    def _features(self, images: Tensor) -> Tensor:
        return self.layers(images).sum((2, 3))
