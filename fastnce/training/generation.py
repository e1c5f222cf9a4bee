"""Class-conditional generation: ContraGAN and its baselines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastnce.data import LabelledImages
from fastnce.data.images import SIGNED_UNIT
from fastnce.data.labelled import NO_CLASSES, has_split
from fastnce.demo import generation_evaluator
from fastnce.demo.judges import DIGITS, DigitClassifier
from fastnce.errors import UserError
from fastnce.metrics import (
    authenticity_accuracy,
    evaluate_generators,
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
    """The images of a split of `root`, by default `config.data`, as the networks of `config` take them; of the run's classes.

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
        classes=() if config.class_names == NO_CLASSES else config.class_names,
        needs_labels=config.conditioning != "none",
        class_balance=config.class_balance and split == "train",
        broken_files=config.broken_files,
    )
    if dataset.class_names != NO_CLASSES and dataset.num_classes != config.num_classes:
        raise UserError(
            f"num_classes={config.num_classes}, but data={root or config.data} has {dataset.num_classes} classes. "
            f"Use num_classes={dataset.num_classes}."
        )
    return dataset


def reference_images(dataset: LabelledImages, limit: int) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) uint8 and labels (N,) of a split: all, or `limit` spread evenly over them."""
    if len(dataset) <= limit:
        return dataset.all_images()
    return _images_at(
        dataset, torch.linspace(0, len(dataset) - 1, limit, dtype=torch.float64).long()
    )


def _images_at(dataset: LabelledImages, chosen: Tensor) -> tuple[Tensor, Tensor]:
    images = [
        torch.from_numpy(dataset.pixels(i).transpose(2, 0, 1).copy()) for i in chosen.tolist()
    ]
    return torch.stack(images), dataset.labels[chosen]


def reference_and_training(
    config: ContraGANTrainConfig, train: LabelledImages, root: Path | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """The real images that samples are judged by, and as many training images to judge beside them.

    The test images, with training images of the same classes; without a test set the training images, and None.

    Raises:
        UserError: as `labelled_images`, or there are fewer than two images.
    """
    data = root or config.data
    if not has_split(data, "test"):
        print(
            f"{data} has no test images: samples are compared with the training images.",
            file=sys.stderr,
        )
        images, labels = reference_images(train, config.measure_count)
        training = None
    else:
        held_out = labelled_images(config, "test", root)
        images, labels = reference_images(held_out, config.measure_count)
        training = reference_images(train, len(labels))
        if set(training[1].tolist()) != set(labels.tolist()):  # test images of some classes only
            chosen = torch.cat(
                [
                    (train.labels == k).nonzero()[:count, 0]
                    for k, count in enumerate(labels.bincount())
                ]
            )
            training = _images_at(train, chosen)
    if len(labels) < 2:
        raise UserError(
            f"data={data}: one test image is too few to compare samples with. Add some."
        )
    return (images, labels), training


def judge_of(
    config: ContraGANTrainConfig,
    root: Path,
    extractor: Path | None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """What judges the samples of a run: see `fastnce.demo.generation_evaluator`.

    Raises:
        UserError: there is none, or a digits set's own reads other images than the run makes.
    """
    judge = generation_evaluator(root, extractor, device=device)
    if isinstance(judge, DigitClassifier):
        side, made = judge.image_size, (config.image_size, config.image_channels)
        if made != (side, 1):
            raise UserError(
                f"{root}: the built-in judge reads {side}x{side} grey digits, and the run makes images with image_size="
                f"{made[0]} and image_channels={made[1]}. Give --extractor FILE."
            )
        # Its classes are the ten digits, in this order.
        judge.reads_labels = config.class_names in ((), DIGITS)
    return judge


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
    (images, labels), training = reference_and_training(config, dataset)
    seen = {"real, trained on": training or (images, labels)}
    if training is not None:
        seen["real, held out"] = (images, labels)
    try:
        evaluator = judge_of(config, config.data, config.extractor)
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
        fake = _logits(model, generated, labels)
        cutoff = 0.5 if config.gan_mode == "lsgan" else 0.0
        for name, (part, classes) in seen.items():
            logits = _logits(model, signed_unit(part), classes)
            accuracies = authenticity_accuracy(logits, fake, cutoff)
            values[f"D accuracy/{name}"] = accuracies.real
        values["D accuracy/generated"] = accuracies.fake
        model.discriminator.train()
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
    next_command="fastnce generate --run {run} --out DIR",
    panels=(
        ("D_real", "D_fake", "G_GAN"),
        ("D_class", "G_class"),
        ("D_cr", "D_bcr", "D_zcr", "G_zcr", "D_r1"),
    ),
    measure=_measure,
    best="fid",
)
