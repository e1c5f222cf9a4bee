"""What the training loop needs to know about each system; a new system is a new row of `SYSTEMS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastnce.data import UnpairedImages, list_images, split_folder
from fastnce.errors import UserError
from fastnce.models import CUT
from fastnce.models.cut import build_generator
from fastnce.training.config import CUTTrainConfig, TrainConfig


@dataclass(frozen=True)
class System:
    """One system.

    Attributes:
        dataset: the training stream: sample i, for any i >= 0, is a pure function of the configuration and i, and
            `len` is the number of samples in an epoch.
        model: from the configuration and one sample, a module with `generator`, `optimizers` (by name) and
            `training_step(batch) -> {name: scalar}`.
        generator: the generator alone, for trained weights.
        preview_inputs: fixed inputs for the sample grids.
        preview: from a generator and those inputs, the rows of the grid by their label.
    """

    dataset: Callable[[TrainConfig], Dataset]
    model: Callable[[TrainConfig, Mapping[str, Tensor]], nn.Module]
    generator: Callable[[TrainConfig], nn.Module]
    preview_inputs: Callable[[TrainConfig], list[Tensor]]
    preview: Callable[[nn.Module, Sequence[Tensor]], dict[str, list[Tensor]]]


def _unpaired_images(config: CUTTrainConfig) -> UnpairedImages:
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


def _test_images(config: CUTTrainConfig) -> list[Tensor]:
    """The first test images of A; of the training images where there is no test folder."""
    split = "test"
    try:
        for domain in "AB":
            split_folder(config.data, split, domain)
    except UserError:
        split = "train"
    dataset = _folders(config, split, load_size=config.crop_size, flip=False, serial=True)
    return [dataset[i]["A"] for i in range(min(config.sample_count, len(dataset)))]


def _folders(config: CUTTrainConfig, split: str, **options: object) -> UnpairedImages:
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


def _cut(config: CUTTrainConfig, sample: Mapping[str, Tensor]) -> CUT:
    _, height, width = sample["A"].shape
    return CUT(config, (height, width))


@torch.inference_mode()
def _translation(generator: nn.Module, images: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    device = next(generator.parameters()).device
    # One at a time: without a crop they may differ in size.
    outputs = [generator(image[None].to(device))[0].float().cpu() for image in images]
    return {"input": list(images), "output": outputs}


SYSTEMS: dict[str, System] = {
    "cut": System(_unpaired_images, _cut, build_generator, _test_images, _translation),
}
