"""Translation between two folders of images, or two images: CUT, FastCUT and SinCUT."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastnce.data import SingleImagePatches, UnpairedImages, list_images, split_folder
from fastnce.errors import UserError
from fastnce.models import CUT
from fastnce.models.cut import build_generator
from fastnce.training.config import CUTTrainConfig, UnpairedTrainConfig
from fastnce.training.schedule import LinearDecay
from fastnce.training.system import Rows, System
from fastnce.training.translation_evaluation import translation_measure


def unpaired_images(config: UnpairedTrainConfig) -> UnpairedImages:
    """The training images of two folders."""
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


def first_test_images(config: UnpairedTrainConfig, domain: str = "A") -> list[Tensor]:
    """The first test images of "A" or "B"; of the training images where there is no test folder."""
    split = "test"
    try:
        for folder in "AB":
            split_folder(config.data, split, folder)
    except UserError:
        split = "train"
    dataset = _folders(config, split, load_size=config.crop_size, flip=False, serial=True)
    return [dataset[i][domain] for i in range(min(config.sample_count, len(dataset)))]


def _folders(config: UnpairedTrainConfig, split: str, **options: object) -> UnpairedImages:
    return UnpairedImages(config.data, split, **(reading_options(config) | options))


def reading_options(config: UnpairedTrainConfig) -> dict[str, object]:
    """How a dataset of A and B reads its images, as far as training and test images agree."""
    return {
        "crop_size": config.crop_size,
        "preprocess": config.preprocess,
        "channels_a": config.in_channels,
        "channels_b": config.out_channels,
        "direction": config.direction,
        "serial": config.serial,
        "seed": config.seed,
        "bits": config.bits,
        "value_range": config.value_range,
        "broken_files": config.broken_files,
        "cache_bytes": int(config.cache_gb * 2**30),
    }


def linear_decay(config: UnpairedTrainConfig, epoch_samples: int) -> LinearDecay:
    """The full learning rate for `epochs`, then down to 0 in `decay_epochs`."""
    return LinearDecay.of(
        epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        steps=config.steps,
        samples_per_step=config.samples_per_step,
        epoch_samples=epoch_samples,
    )


def _single_images(config: CUTTrainConfig) -> SingleImagePatches:
    return SingleImagePatches(
        config.data,
        crop_size=config.crop_size,
        max_zoom_out=config.max_zoom_out,
        flip=config.flip,
        channels_a=config.in_channels,
        channels_b=config.out_channels,
        bits=config.bits,
        value_range=config.value_range,
        direction=config.direction,
        epoch_samples=config.epoch_samples,
        seed=config.seed,
        broken_files=config.broken_files,
    )


def _training_images(config: CUTTrainConfig) -> UnpairedImages | SingleImagePatches:
    choices = {"folders": unpaired_images, "single-image": _single_images}
    return choices[config.dataset](config)


def _cut(config: CUTTrainConfig, dataset: UnpairedImages | SingleImagePatches) -> CUT:
    _, height, width = dataset[0]["A"].shape
    return CUT(config, (height, width))


def _translations(config: UnpairedTrainConfig, dataset: Dataset) -> Callable[[nn.Module], Rows]:
    images = first_test_images(config)

    def rows(generator: nn.Module) -> Rows:
        return {"input": images, "output": translated(generator, images)}

    return rows


@torch.inference_mode()
def translated(generator: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
    """The translations of images (C, H, W), on the CPU."""
    device = next(generator.parameters()).device
    # One at a time: without a crop they may differ in size.
    return [generator(image[None].to(device))[0].float().cpu() for image in images]


CUT_SYSTEM = System(
    dataset=_training_images,
    schedule=linear_decay,
    model=_cut,
    network_name="generator",
    network=build_generator,
    preview=_translations,
    panels=(("G_GAN", "D_real", "D_fake", "D_r1"), ("NCE", "NCE_Y", "idt"), ("G",)),
    published={"G": "generator", "D": "discriminator", "F": "projector"},
    measure=translation_measure,
    best="fid",
)
