"""Class-conditional generation: ContraGAN and its baselines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastnce.data import LabelledImages
from fastnce.data.folders import SIGNED_UNIT
from fastnce.errors import UserError
from fastnce.models import ContraGAN
from fastnce.models.contragan import build_generator
from fastnce.training.config import ContraGANTrainConfig
from fastnce.training.schedule import Schedule
from fastnce.training.system import Measure, Rows, System

# Of a data set with more classes, a sample grid shows the first ones.
_GRID_CLASSES = 20


def labelled_images(config: ContraGANTrainConfig, split: str) -> LabelledImages:
    """The images of a split, as the networks of `config` take them.

    Raises:
        UserError: the folder is not what it should be, or has another number of classes than the networks.
    """
    dataset = LabelledImages(
        config.data,
        split,
        image_size=config.image_size,
        channels=config.image_channels,
        flip=config.flip and split == "train",
        seed=config.seed,
    )
    if dataset.num_classes != config.num_classes:
        raise UserError(
            f"num_classes={config.num_classes}, but data={config.data} has {dataset.num_classes} classes. "
            f"Use num_classes={dataset.num_classes}."
        )
    return dataset


@torch.inference_mode()
def sample_images(
    generator: nn.Module, z: Tensor, labels: Tensor, batch_size: int = 256
) -> Tensor:
    """Images of a generator in eval mode, on the CPU.

    Args:
        generator: as `load_generator` gives it.
        z: (N, latent_dim).
        labels: (N,) int64.
        batch_size: images at a time; the result does not depend on it.

    Returns:
        (N, C, H, W) float32 in [-1, 1].
    """
    device = next(generator.parameters()).device
    parts = zip(z.split(batch_size), labels.split(batch_size), strict=True)
    images = [generator(a.to(device), b.to(device)).float().cpu() for a, b in parts]
    return torch.cat(images).contiguous()


def signed_unit(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return torch.from_numpy(SIGNED_UNIT)[images.long()]


def _schedule(config: ContraGANTrainConfig, epoch_samples: int) -> Schedule:
    return Schedule(
        total_steps=config.steps,
        samples_per_step=config.samples_per_step,
        epoch_samples=epoch_samples,
    )


def _preview(config: ContraGANTrainConfig, dataset: LabelledImages) -> Callable[[nn.Module], Rows]:
    """A row for each class, with the same noise in all of them."""
    shown = min(config.num_classes, _GRID_CLASSES)
    random = torch.Generator().manual_seed(config.seed)
    z = torch.randn(config.sample_count, config.latent_dim, generator=random)
    labels = torch.arange(shown).repeat_interleave(config.sample_count)

    def rows(generator: nn.Module) -> Rows:
        images = sample_images(generator, z.repeat(shown, 1), labels)
        grouped = images.view(shown, config.sample_count, *images.shape[1:])
        return {name: list(row) for name, row in zip(dataset.class_names, grouped, strict=False)}

    return rows


CONTRAGAN_SYSTEM = System(
    dataset=lambda config: labelled_images(config, "train"),
    schedule=_schedule,
    model=lambda config, dataset: ContraGAN(config),
    network_name="generator",
    network=build_generator,
    preview=_preview,
    panels=(
        ("D_real", "D_fake", "G_GAN"),
        ("D_class", "G_class"),
        ("D_cr", "D_bcr", "D_zcr", "G_zcr", "D_r1"),
    ),
)
