"""Shared by the class-conditional GANs: layers, the bases of generators and discriminators, and the class heads."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    return spectral_norm(layer) if spectral else layer


def spectral_norm(layer: nn.Module) -> nn.Module:
    """Divides the layer's weight by its largest singular value, as estimated by one power iteration per training forward.

    The weight W is seen as a matrix (out, the rest). State-dict keys are `weight_orig` (W), `weight_u` and `weight_v`, as in
    published checkpoints. One iteration is made here: without it, a network in eval mode that was never trained would be
    divided by u^T W v of random u and v, a number near 0 of either sign.

    After a training forward `copy.deepcopy` refuses the layer (its `weight` is part of a graph): copy networks before.

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018.
    """
    layer = nn.utils.spectral_norm(layer, eps=SPECTRAL_EPS)
    with torch.no_grad():
        matrix = layer.weight_orig.flatten(1)
        layer.weight_v.copy_(F.normalize(matrix.t() @ layer.weight_u, dim=0, eps=SPECTRAL_EPS))
        layer.weight_u.copy_(F.normalize(matrix @ layer.weight_v, dim=0, eps=SPECTRAL_EPS))
    return layer


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
