"""Translation between two folders of images: CUT and FastCUT."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastnce.data import UnpairedImages, list_images, split_folder
from fastnce.errors import UserError
from fastnce.models import CUT
from fastnce.models.cut import build_generator
from fastnce.training.config import CUTTrainConfig, UnpairedTrainConfig
from fastnce.training.schedule import LinearDecay
from fastnce.training.system import Rows, System
from fastnce.training.translation_evaluation import translation_measure


def _unpaired_images(config: UnpairedTrainConfig) -> UnpairedImages:
    epoch_samples = max(len(list_images(split_folder(config.data, "train", d))) for d in "AB")
    dataset = _folders(
        config,
        "train",
        load_size=config.load_size,
        flip=config.flip,
        augment_a=config.augment_a,
        jitter_samples=config.epochs * epoch_samples if config.decay_epochs else None,
    )
    if config.batch_size > 1:
        dataset.expect_one_size()
    return dataset


def _test_images(config: UnpairedTrainConfig) -> list[Tensor]:
    """The first test images of A; of the training images where there is no test folder."""
    split = "test"
    try:
        for domain in "AB":
            split_folder(config.data, split, domain)
    except UserError:
        split = "train"
    dataset = _folders(config, split, load_size=config.crop_size, flip=False, serial=True)
    return [dataset[i]["A"] for i in range(min(config.sample_count, len(dataset)))]


def _folders(config: UnpairedTrainConfig, split: str, **options: object) -> UnpairedImages:
    common = {
        "crop_size": config.crop_size,
        "preprocess": config.preprocess,
        "channels_a": config.channels,
        "channels_b": config.channels,
        "direction": config.direction,
        "serial": config.serial,
        "seed": config.seed,
    }
    return UnpairedImages(config.data, split, **(common | options))


def _linear_decay(config: UnpairedTrainConfig, epoch_samples: int) -> LinearDecay:
    return LinearDecay.of(
        epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        steps=config.steps,
        samples_per_step=config.samples_per_step,
        epoch_samples=epoch_samples,
    )


def _cut(config: CUTTrainConfig, dataset: UnpairedImages) -> CUT:
    _, height, width = dataset[0]["A"].shape
    return CUT(config, (height, width))


def _translations(
    config: UnpairedTrainConfig, dataset: UnpairedImages
) -> Callable[[nn.Module], Rows]:
    images = _test_images(config)

    @torch.inference_mode()
    def rows(generator: nn.Module) -> Rows:
        device = next(generator.parameters()).device
        # One at a time: without a crop they may differ in size.
        outputs = [generator(image[None].to(device))[0].float().cpu() for image in images]
        return {"input": images, "output": outputs}

    return rows


CUT_SYSTEM = System(
    dataset=_unpaired_images,
    schedule=_linear_decay,
    model=_cut,
    network_name="generator",
    network=build_generator,
    preview=_translations,
    panels=(("G_GAN", "D_real", "D_fake"), ("NCE", "NCE_Y"), ("G",)),
    measure=translation_measure,
    best="fid",
)
