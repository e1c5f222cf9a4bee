"""Class-conditional generation: ContraGAN and its baselines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastnce.data import LabelledImages
from fastnce.data.folders import SIGNED_UNIT
from fastnce.errors import UserError
from fastnce.metrics import (
    authenticity_accuracy,
    evaluate_generators,
    generation_evaluator,
    largest_singular_values,
    spread_ratio,
)
from fastnce.models import ContraGAN
from fastnce.models.contragan_config import build_generator
from fastnce.training.config import ContraGANTrainConfig
from fastnce.training.schedule import Schedule
from fastnce.training.system import Measure, Rows, System

# Of a data set with more classes, a sample grid shows the first ones.
_GRID_CLASSES = 20
# Below this share of the real images' variance the samples are hardly more than one image.
_COLLAPSED = 0.05
# Of the numbers of an evaluation, those that are measured during the training.
_MEASURED = ("fid", "intra_class_fid", "inception_score", "recall", "coverage", "class_accuracy")


def labelled_images(
    config: ContraGANTrainConfig, split: str, root: Path | None = None
) -> LabelledImages:
    """The images of a split of `root`, by default `config.data`, as the networks of `config` take them.

    Raises:
        UserError: the folder is not what it should be, or has another number of classes than the networks.
    """
    dataset = LabelledImages(
        root or config.data,
        split,
        image_size=config.image_size,
        channels=config.image_channels,
        flip=config.flip and split == "train",
        seed=config.seed,
    )
    if dataset.num_classes != config.num_classes:
        raise UserError(
            f"num_classes={config.num_classes}, but data={root or config.data} has {dataset.num_classes} classes. "
            f"Use num_classes={dataset.num_classes}."
        )
    return dataset


def reference_images(dataset: LabelledImages, limit: int) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) uint8 and labels (N,) of a split: all, or `limit` spread evenly over them."""
    if len(dataset) <= limit:
        return dataset.all_images()
    chosen = torch.linspace(0, len(dataset) - 1, limit, dtype=torch.float64).long()
    images = [torch.from_numpy(dataset.pixels(i).transpose(2, 0, 1).copy()) for i in chosen]
    return torch.stack(images), dataset.labels[chosen]


@torch.inference_mode()
def sample_images(generator: nn.Module, z: Tensor, labels: Tensor, batch_size: int = 256) -> Tensor:
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


def sampler(generator: nn.Module, seed: int) -> Callable[[Tensor], Tensor]:
    """A function from labels to images of a generator in eval mode, with noise of its own from `seed` on."""
    random = torch.Generator().manual_seed(seed)

    def sample(labels: Tensor) -> Tensor:
        z = torch.randn(len(labels), generator.latent_dim, generator=random)
        return sample_images(generator, z, labels)

    return sample


def _measure(config: ContraGANTrainConfig, dataset: LabelledImages) -> Measure:
    """Quality of the samples against the test images, and what D does: accuracies, and its layers' singular values."""
    held_out = labelled_images(config, "test")
    images, labels = reference_images(held_out, config.measure_count)
    seen, seen_labels = reference_images(dataset, len(labels))
    try:
        evaluator = generation_evaluator(config.data, config.extractor)
    except UserError as error:
        if config.extractor is not None:
            raise
        print(f"Measuring without FID and its relatives. {error}", file=sys.stderr)
        evaluator = None

    def measure(model: ContraGAN, average: nn.Module) -> dict[str, float]:
        values: dict[str, float] = {}
        sample = sampler(average, config.seed)
        if evaluator is not None:
            row = evaluate_generators({"now": sample}, images, labels, evaluator)["rows"][0]
            values |= {name: row[name] for name in _MEASURED if row[name] is not None}
        generated, real = sample(labels), signed_unit(images)
        values["spread"] = spread_ratio(generated.flatten(1), real.flatten(1))
        if values["spread"] < _COLLAPSED:
            print(
                f"The samples have collapsed: their pixels have {100 * values['spread']:.1f} % of the real images' variance.",
                file=sys.stderr,
            )
        model.discriminator.eval()
        logits = [
            _logits(model, part, classes)
            for part, classes in (
                (signed_unit(seen), seen_labels),
                (real, labels),
                (generated, labels),
            )
        ]
        model.discriminator.train()
        cutoff = 0.5 if config.gan_mode == "lsgan" else 0.0
        trained, other = (authenticity_accuracy(x, logits[2], cutoff) for x in logits[:2])
        values["D accuracy/real, trained on"] = trained.real
        values["D accuracy/real, held out"] = other.real
        values["D accuracy/generated"] = other.fake
        norms = largest_singular_values(model.discriminator, raw=True)
        return values | {f"singular value/{name}": value for name, value in norms.items()}

    return measure


@torch.inference_mode()
def _logits(model: ContraGAN, images: Tensor, labels: Tensor, batch_size: int = 256) -> Tensor:
    device = next(model.parameters()).device
    parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    outputs = [model.discriminator(a.to(device), b.to(device)).adversarial.cpu() for a, b in parts]
    return torch.cat(outputs)


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
    measure=_measure,
    best="fid",
)
