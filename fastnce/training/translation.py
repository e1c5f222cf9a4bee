"""Translation between two folders of images, or two images: CUT, FastCUT and SinCUT."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastnce.data import (
    AlignedImages,
    SingleImagePatches,
    UnpairedImages,
    list_images,
    split_folder,
)
from fastnce.errors import UserError
from fastnce.models import CUT
from fastnce.models.cut_networks import build_generator, feature_shapes
from fastnce.models.patch_contrast import check_num_patches
from fastnce.models.translation_config import UnpairedConfig
from fastnce.training import runtime
from fastnce.training.config import CUTTrainConfig, UnpairedTrainConfig
from fastnce.training.schedule import LinearDecay
from fastnce.training.system import Rows, System
from fastnce.training.translation_evaluation import translation_measure


def unpaired_images(config: UnpairedTrainConfig) -> UnpairedImages:
    """The training images of two folders."""
    epoch_samples = max(len(list_images(split_folder(config.folders, "train", d))) for d in "AB")
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
            split_folder(config.folders, split, folder)
    except UserError:
        split = "train"
    dataset = _folders(config, split, load_size=config.crop_size, flip=False, serial=True)
    return [dataset[i][domain] for i in range(min(config.sample_count, len(dataset)))]


def _folders(config: UnpairedTrainConfig, split: str, **options: object) -> UnpairedImages:
    return UnpairedImages(config.folders, split, **(reading_options(config) | options))


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


def expect_sizes_fit(
    config: UnpairedTrainConfig,
    dataset: UnpairedImages | AlignedImages | SingleImagePatches,
    networks: Mapping[str, tuple[nn.Module, int]],
    *,
    one_size: str | None = None,
    compared: str = "",
) -> None:
    """Checks the sizes of all training images before the first step, without computing anything.

    Args:
        config: of the run.
        dataset: its training images.
        networks: by their names those that see the images, with the channels of their input.
        one_size: why all images of A and B must have one size; None: they need not.
        compared: "A" or "AB": of whose maps `num_patches` patches are compared.

    Raises:
        UserError: an image that a network cannot take, or two of different sizes where there must be one; names the files.
    """
    a, b = dataset.output_sizes()
    found = b | a
    if one_size is not None and len(found) > 1:
        (first, one), (second, other) = list(found.items())[:2]
        raise UserError(
            f"{other}: gives {second[0]}x{second[1]}, but {one} {first[0]}x{first[1]}, and {one_size}. Use "
            'preprocess="resize_and_crop", or another that makes them one size. fastcut, cyclegan and dclgan take several.'
        )
    patches = {size: path for name in compared for size, path in {"A": a, "B": b}[name].items()}
    if patches:
        width, height = min(patches, key=math.prod)
        try:
            check_num_patches(config, feature_shapes(config, (height, width)))
        except UserError as error:
            raise UserError(
                f"{patches[width, height]}: gives {width}x{height}, and {error}"
            ) from error
    with runtime.rng_kept():
        shapes = {
            name: (copy.deepcopy(network).to("meta"), channels)
            for name, (network, channels) in networks.items()
        }
        # What is too small is so by a side or by its number of pixels.
        for width, height in {min(found, key=min), min(found, key=math.prod)}:
            for name, (network, channels) in shapes.items():
                if _takes(network, config.batch_size, channels, height, width):
                    continue
                fitting = (
                    s
                    for s in range(4, 516, 4)
                    if _takes(network, config.batch_size, channels, s, s)
                )
                least = next((f", which needs {side}x{side} or more" for side in fitting), "")
                raise UserError(
                    f"{found[width, height]}: gives {width}x{height}, too small for the {name}{least}. Use a larger crop_size or load_size, larger images, or a "
                    f"smaller {name}."
                )


def _takes(network: nn.Module, *shape: int) -> bool:
    """Whether a network can be trained on images of a shape (N, C, H, W)."""
    try:
        network(torch.empty(shape, device="meta"))
    except (RuntimeError, ValueError):  # such as a padding that is wider than the map
        return False
    return True


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
        config.folders,
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
    model = CUT(config, (height, width))
    one_size = fixed_size(config)
    if config.gan_mode == "wgangp":
        one_size = "gan_mode=wgangp mixes real and translated images"
    if model.translates_b:
        one_size = "nce_idt and lambda_identity translate images of A and B in one batch"
    networks = {
        "generator": (model.generator, config.in_channels),
        "discriminator": (model.discriminator, config.out_channels),
    }
    expect_sizes_fit(
        config, dataset, networks, one_size=one_size, compared="A" if model.nce_names else ""
    )
    return model


def fixed_size(config: UnpairedConfig) -> str | None:
    """Why the networks are made for images of one size, if they are."""
    return (
        "discriminator=stylegan2 is made for one size"
        if config.discriminator == "stylegan2"
        else None
    )


def _translations(config: UnpairedTrainConfig, dataset: Dataset) -> Callable[[nn.Module], Rows]:
    images = first_test_images(config)

    def rows(generator: nn.Module) -> Rows:
        return {"input": images, "output": translated(generator, images)}

    return rows


@torch.inference_mode()
def translated(generator: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
    """The translations of images (C, H, W), on the CPU. A line on standard error says if they have collapsed."""
    device = next(generator.parameters()).device
    # One at a time: without a crop they may differ in size.
    outputs = [generator(image[None].to(device))[0].float().cpu() for image in images]
    reason = collapse(images, outputs)
    if reason is not None:
        print(f"The translations have collapsed: {reason}.", file=sys.stderr)
    return outputs


# The least that translations should have of their inputs' variety, from image to image, and of their contrast, in each image.
_LEAST_VARIETY, _LEAST_CONTRAST = 0.02, 1e-4


def collapse(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str | None:
    """How a generator has collapsed, in words; None if it has not, or that cannot be told from one image or from equal ones.

    Variety is the share of the variance from image to image in that of all pixels, of the images as 16x16 squares of grey.
    Contrast is the variance of the pixels of an image.

    Args:
        inputs: (C, H, W) each, in [-1, 1]; sizes may differ.
        outputs: their translations.
    """
    variety_in, contrast_in = _variety_and_contrast(inputs)
    variety_out, contrast_out = _variety_and_contrast(outputs)
    if contrast_out < _LEAST_CONTRAST * contrast_in:
        return "each of them is nearly one colour"
    if variety_out < _LEAST_VARIETY * variety_in:
        share = 100 * variety_out / variety_in
        return f"those of different images are nearly the same, with {share:.1f} % of the variety of their inputs"
    return None


def _variety_and_contrast(images: Sequence[Tensor]) -> tuple[float, float]:
    grey = [image.double().mean(0, keepdim=True) for image in images]
    squares = torch.stack([F.adaptive_avg_pool2d(image, 16) for image in grey])  # (N, 1, 16, 16)
    between = squares.var(0, correction=0).mean()
    total = squares.var(correction=0).clamp_min(1e-12)
    contrast = torch.stack([image.double().var((1, 2), correction=0).mean() for image in images])
    return float(between / total), float(contrast.mean())


CUT_SYSTEM = System(
    dataset=_training_images,
    schedule=linear_decay,
    model=_cut,
    network_name="generator",
    network=build_generator,
    preview=_translations,
    next_command="fastnce translate --run {run} --input DIR --out DIR",
    panels=(("G_GAN", "D_real", "D_fake", "D_r1"), ("NCE", "NCE_Y", "idt"), ("G",)),
    published={"G": "generator", "D": "discriminator", "F": "projector"},
    measure=translation_measure,
    best="fid",
)
