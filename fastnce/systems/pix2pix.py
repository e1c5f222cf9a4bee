"""pix2pix: image translation learned from pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.networks import PatchDiscriminator, UNetGenerator
from fastnce.networks.layers import init_normal
from fastnce.networks.unet_generator import TestStatistics
from fastnce.systems import options
from fastnce.systems.adversarial import GANMode, discriminator_losses, generator_loss
from fastnce.systems.system import Rows, autocast
from fastnce.systems.translation import (
    TranslationConfig,
    adam,
    descend,
    images_of_one_size,
    l1,
)
from fastnce.systems.translation_system import (
    TranslationSystem,
    reading_options,
    translated,
)

if TYPE_CHECKING:
    from fastnce.data import AlignedImages


@dataclass(frozen=True, kw_only=True)
class Pix2PixConfig(TranslationConfig):
    """The options of pix2pix's networks, losses and optimisers. The defaults are the published pix2pix."""

    system: ClassVar[str] = "pix2pix"

    num_downs: int = 8
    """Generator: how often it halves the image; 8 (unet_256) needs sides that are multiples of 256, 7 (unet_128) of 128."""
    dropout: bool = True
    """Generator: drop half of the values in the deeper levels, in training."""
    test_statistics: TestStatistics = "image"
    """Generator: after the training, normalise each image by its own statistics, or by the training's running averages."""
    disc_antialias: bool = False
    """Discriminator: blur before downsampling; with it off, strided convolutions."""
    disc_norm: Literal["batch", "instance", "none"] = "batch"
    """Discriminator: normalisation."""
    init_gain: float | None = 0.02
    """Standard deviation of the normal initialisation of all networks; None: PyTorch's own initialisation."""
    gan_mode: GANMode = "vanilla"
    """Adversarial objective."""
    lambda_gan: float = 1.0
    """Weight of the generator's adversarial loss."""
    lambda_l1: float = 100.0
    """Weight of the distance to the pair's image."""

    data: Path | None = None
    """Folder with train, each of its images A and B side by side, or with trainA and trainB and equal names in both; and test
    or testA and testB for the sample grids."""
    batch_size: int = 1
    """Pairs per step."""
    epochs: int = 100
    """Epochs at the full learning rate."""
    decay_epochs: int = 100
    """Further epochs in which the learning rate falls linearly towards 0."""
    load_size: int = 286
    """Images are scaled to this size before the crop."""
    flip: bool = True
    """Mirror each pair with probability 1/2."""
    augment_a: Literal["none"] = "none"
    """Only none: the images of a pair would no longer fit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 2, "num_downs")
        options.at_least(self, 0, "lambda_gan", "lambda_l1")
        options.above_zero(self, "init_gain")


def build_generator(config: Pix2PixConfig) -> UNetGenerator:
    """The generator that `config` describes, freshly made."""
    return UNetGenerator(
        config.in_channels,
        config.out_channels,
        config.base_channels,
        config.num_downs,
        config.dropout,
        config.test_statistics,
    )


class Pix2Pix(nn.Module):
    """The networks `generator` and `discriminator`, their Adam `optimizers`, and one training step.

    With G the generator and D the discriminator, which sees the input beside the output:

        D loss = (l(D(A, B), real) + l(D(A, G(A)), fake)) / 2
        G loss = lambda_gan l(D(A, G(A)), real) + lambda_l1 |G(A) - B|

    |x| is the mean of the absolute values. First the discriminator is updated, then the generator.

    Source: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017.

    Args:
        config: see `Pix2PixConfig`.
        image_size: (height, width) of the training images. If given, it is checked to be one that the generator can halve.

    Attributes:
        optimizers: "G" and "D".

    Raises:
        UserError: an image size that cannot be halved `num_downs` times.
    """

    def __init__(self, config: Pix2PixConfig, image_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.config = config
        self.generator = build_generator(config)
        if image_size is not None:
            _check_size(image_size[::-1], config.num_downs)
        self.discriminator = PatchDiscriminator(
            config.in_channels + config.out_channels,
            config.disc_channels,
            config.disc_layers,
            antialias=config.disc_antialias,
            norm=config.disc_norm,
        )
        for network in (self.generator, self.discriminator):
            if config.init_gain is not None:  # else they are as PyTorch made them
                init_normal(network, config.init_gain)
        self.optimizers = {
            "G": adam(config, self.generator),
            "D": adam(config, self.discriminator),
        }

    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One update of D, then one of G.

        Args:
            batch: "A" and "B", (N, C, H, W) images in [-1, 1], image i of A and of B a pair, on the device of the networks.

        Returns:
            Detached scalars, weights included: "G_GAN", "G_L1", "G", "D_real", "D_fake".

        Raises:
            UserError: A and B differ in height, width or number.
        """
        real_a, real_b = images_of_one_size(batch)
        with autocast(self):
            fake_b = self.generator(real_a)
        losses = self._update_discriminator(real_a, real_b, fake_b.detach())
        losses |= self._update_generator(real_a, real_b, fake_b)
        return {name: loss.detach() for name, loss in losses.items()}

    def _update_discriminator(self, a: Tensor, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        self.discriminator.requires_grad_(True)
        # Two passes: batch norm takes the statistics of real and of generated pairs apart.
        fake_logits, real_logits = self._judge(a, fake), self._judge(a, real)
        real_loss, fake_loss = discriminator_losses(real_logits, fake_logits, self.config.gan_mode)
        descend(0.5 * (real_loss + fake_loss), self.optimizers["D"])
        return {"D_real": real_loss, "D_fake": fake_loss}

    def _update_generator(self, a: Tensor, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        config = self.config
        self.discriminator.requires_grad_(False)
        losses = {
            "G_GAN": config.lambda_gan * generator_loss(self._judge(a, fake), config.gan_mode),
            "G_L1": config.lambda_l1 * l1(fake, real),
        }
        total = losses["G_GAN"] + losses["G_L1"]
        descend(total, self.optimizers["G"])
        return {"G": total, **losses}

    def _judge(self, a: Tensor, b: Tensor) -> Tensor:
        with autocast(self):
            return self.discriminator(torch.cat([a, b.to(a)], dim=1))


def _check_size(size: tuple[int, int], num_downs: int, what: str = "images") -> None:
    """Raises `UserError` unless (width, height) can be halved so often."""
    multiple = 2**num_downs
    if size[0] % multiple or size[1] % multiple:
        raise UserError(
            f"{what} of {size[0]}x{size[1]} cannot be halved num_downs={num_downs} times. Use a crop_size that is a multiple of "
            f'{multiple} with preprocess="resize_and_crop", or a smaller num_downs.'
        )


class Pix2PixSystem(TranslationSystem):
    """pix2pix in the training loop."""

    config_class = Pix2PixConfig
    model_class = Pix2Pix
    network = staticmethod(build_generator)
    variants = {"pix2pix": {}}
    panels = (("G_GAN", "D_real", "D_fake"), ("G_L1",), ("G",))
    best = "l1"
    published = {"G": "generator", "D": "discriminator"}
    paired = True

    def dataset(self, config: Pix2PixConfig) -> AlignedImages:
        dataset = _pairs(config, "train", load_size=config.load_size, flip=config.flip)
        if config.batch_size > 1:
            dataset.expect_one_size()
        return dataset

    def model(self, config: Pix2PixConfig, dataset: AlignedImages) -> nn.Module:
        for size, path in dataset.output_sizes()[0].items():
            _check_size(size, config.num_downs, str(path))
        return super().model(config, dataset)

    def sizes(self, config: Pix2PixConfig, model: Pix2Pix) -> dict[str, str | None]:
        return {}

    def preview(self, config: Pix2PixConfig, dataset: AlignedImages) -> Callable[[nn.Module], Rows]:
        from fastnce.data.domains import find_pairs

        split = "test"
        try:
            find_pairs(config.folders, split)
        except UserError:  # no such folder
            split = "train"
        shown = _pairs(config, split, load_size=config.crop_size, flip=False, serial=True)
        pairs = [shown[index] for index in range(min(config.sample_count, len(shown)))]
        images = [pair["A"] for pair in pairs]

        def rows(generator: nn.Module) -> Rows:
            truth = [pair["B"] for pair in pairs]
            return {"input": images, "output": translated(generator, images), "truth": truth}

        return rows


def _pairs(config: Pix2PixConfig, split: str, **how: object) -> AlignedImages:
    from fastnce.data import AlignedImages

    return AlignedImages(config.folders, split, **(reading_options(config) | how))
