"""Translation learned from pairs of images: pix2pix."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fastnce.data import AlignedImages
from fastnce.data.aligned import find_pairs
from fastnce.errors import UserError
from fastnce.models import Pix2Pix
from fastnce.models.pix2pix import build_generator
from fastnce.training.config import Pix2PixTrainConfig
from fastnce.training.system import Rows, System
from fastnce.training.translation import (
    expect_sizes_fit,
    linear_decay,
    reading_options,
    translated,
)
from fastnce.training.translation_evaluation import translation_measure


def _pairs(config: Pix2PixTrainConfig) -> AlignedImages:
    dataset = _folder(config, "train", load_size=config.load_size, flip=config.flip)
    if config.batch_size > 1:
        dataset.expect_one_size()
    return dataset


def _folder(config: Pix2PixTrainConfig, split: str, **options: object) -> AlignedImages:
    return AlignedImages(config.folders, split, **(reading_options(config) | options))


def _model(config: Pix2PixTrainConfig, dataset: AlignedImages) -> Pix2Pix:
    _, height, width = dataset[0]["A"].shape
    model = Pix2Pix(config, (height, width))
    multiple = model.generator.size_multiple
    for (width, height), path in dataset.output_sizes()[0].items():
        if width % multiple or height % multiple:
            raise UserError(
                f"{path}: gives {width}x{height}, but num_downs={config.num_downs} needs multiples of {multiple}. "
                'Use preprocess="resize_and_crop", or a smaller num_downs.'
            )
    both = config.in_channels + config.out_channels
    networks = {
        "generator": (model.generator, config.in_channels),
        "discriminator": (model.discriminator, both),
    }
    expect_sizes_fit(config, dataset, networks)
    return model


def _preview(config: Pix2PixTrainConfig, dataset: AlignedImages) -> Callable[[nn.Module], Rows]:
    split = "test"
    try:
        find_pairs(config.folders, split)
    except UserError:  # no such folder
        split = "train"
    shown = _test_pairs(config, split)
    pairs = [shown[index] for index in range(min(config.sample_count, len(shown)))]
    images = [pair["A"] for pair in pairs]

    def rows(generator: nn.Module) -> Rows:
        truth = [pair["B"] for pair in pairs]
        return {"input": images, "output": translated(generator, images), "truth": truth}

    return rows


def _test_pairs(config: Pix2PixTrainConfig, split: str) -> AlignedImages:
    return _folder(config, split, load_size=config.crop_size, flip=False, serial=True)


PIX2PIX_SYSTEM = System(
    dataset=_pairs,
    schedule=linear_decay,
    model=_model,
    network_name="generator",
    network=build_generator,
    preview=_preview,
    next_command="fastnce translate --run {run} --input DIR --out DIR",
    panels=(("G_GAN", "D_real", "D_fake"), ("G_L1",), ("G",)),
    measure=translation_measure,
    best="l1",
    published={"G": "generator", "D": "discriminator"},
)
