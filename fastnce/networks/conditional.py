"""What every class-conditional generator and discriminator takes and gives, and the discriminators' class heads."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastnce.networks.class_layers import DiscriminatorNorm, embedding, linear

Conditioning = Literal["none", "2C", "D2DCE", "AC", "PD"]


class DiscriminatorOutput(NamedTuple):
    """What a discriminator says about N images.

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

    A family implements `_generate(z, labels)`.

    Attributes:
        image_size, latent_dim, num_classes, image_channels: as given.
    """

    def __init__(
        self, image_size: int, latent_dim: int, num_classes: int, image_channels: int
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.image_channels = image_channels

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
        image_size, num_classes, image_channels: of the images.
        conditioning: how the class is judged.
        feature_dim: F.
        embed_dim: E, length of embedding and proxy; used by 2C and D2DCE.
        norm: "spectral", also on the heads; "batch" or "none".

    Attributes:
        image_size, num_classes, image_channels, conditioning, feature_dim: as given.
    """

    def __init__(
        self,
        image_size: int,
        num_classes: int,
        image_channels: int,
        conditioning: Conditioning,
        *,
        feature_dim: int,
        embed_dim: int,
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
        self.feature_dim = feature_dim
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


def widths_for(
    network: nn.Module, table: dict[int, tuple[int, ...]], image_size: int
) -> tuple[int, ...]:
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
