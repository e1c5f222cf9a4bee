"""What the systems that generate images share: real images to compare samples with, their judge, and the measurement."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastnce.errors import UserError

if TYPE_CHECKING:
    from fastnce.data import LabelledImages
    from fastnce.metrics.class_conditional import Sample

# Images in a row of `generate`'s grid.
GRID_COLUMNS = 12
# Below this share of the real images' variance the samples are hardly more than one image.
_COLLAPSED = 0.05
# Of the numbers of an evaluation, those that are measured during the training.
_MEASURED = ("fid", "intra_class_fid", "inception_score", "recall", "coverage", "class_accuracy")
# The splits of a set, in which generated images have no business.
SPLITS = ("train", "test", "valid", "val")


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
    data: Path, limit: int, split: Callable[[str], LabelledImages]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """The real images that samples are judged by, at most `limit`, and as many training images to judge beside them.

    The test images, with training images of the same classes; without a test set the training images, and None. `split` opens the
    images of `data` by the name of their split.
    """
    from fastnce.data.labelled import has_split

    train = split("train")
    if not has_split(data, "test"):
        print(
            f"{data} has no test images: samples are compared with the training images.",
            file=sys.stderr,
        )
        images, labels = reference_images(train, limit)
        training = None
    else:
        images, labels = reference_images(split("test"), limit)
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
    config: Any,
    root: Path,
    extractor: Path | None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The judge of a run's samples: see `fastnce.demo.generation_evaluator`."""
    from fastnce.demo import generation_evaluator
    from fastnce.demo.judges import DIGITS, DigitClassifier

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


def sample_measure(
    config: Any, images: Tensor, labels: Tensor
) -> Callable[[Sample], tuple[dict[str, float], Tensor]]:
    """A measurement of samples against real images (N, C, H, W) uint8 and their labels: numbers by name, and the last samples.

    FID and its relatives, if there is a judge, and the samples' spread; that they have collapsed is said.
    """
    from fastnce.metrics import evaluate_generators, spread_ratio

    try:
        judge = judge_of(config, config.data, config.extractor)
    except UserError as error:
        if config.extractor is not None:
            raise
        print(f"Measuring without FID and its relatives. {error}", file=sys.stderr)
        judge = None

    def measure(sample: Sample) -> tuple[dict[str, float], Tensor]:
        values: dict[str, float] = {}
        if judge is not None:
            row = evaluate_generators({"now": sample}, images, labels, judge)["rows"][0]
            values |= {name: row[name] for name in _MEASURED if row[name] is not None}
        generated = sample(labels)
        values["spread"] = spread_ratio(generated.flatten(1), signed_unit(images).flatten(1))
        if values["spread"] < _COLLAPSED:
            print(
                f"The samples have collapsed: their pixels have {100 * values['spread']:.1f} % of the real images' variance.",
                file=sys.stderr,
            )
        return values, generated

    return measure


def evaluate_samples(
    config: Any,
    data: Path,
    network: nn.Module,
    build: Callable[[Any], nn.Module],
    sampler: Callable[[nn.Module, int], Sample],
    reference: Callable[[], tuple],
    extractor: Path | None,
    seed: int,
    device: torch.device,
) -> tuple[dict[str, Any], str]:
    """The quality of a trained generator's samples beside training images and an untrained generator's, and its table.

    Args:
        build: makes the untrained generator of the configuration.
        sampler: from a generator and the seed of the noise to its samples.
        reference: gives what `reference_and_training` does; called once the judge is there.
        extractor: the judge, by default that of the run, or a digits set's own classifier.
    """
    from fastnce.metrics import evaluate_generation, format_generation_table

    judge = judge_of(config, data, extractor or config.extractor, device)
    (images, labels), training = reference()
    torch.manual_seed(config.seed)
    untrained = build(config).to(device).eval()
    result = evaluate_generation(
        sampler(network, seed),
        images,
        labels,
        judge,
        held_out=training,
        untrained=sampler(untrained, seed),
    )
    return result, format_generation_table(result)


def signed_unit(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    from fastnce.data.images import SIGNED_UNIT

    return torch.from_numpy(SIGNED_UNIT)[images.long()]


def interpolate(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """`steps` points (steps, D) on the line from `start` to `end`, (D,) each, both included."""
    return torch.lerp(start, end, torch.linspace(0, 1, steps, device=start.device)[:, None])


def check_amounts(*, count: int, batch_size: int, interpolation: int) -> None:
    """Raises `UserError` unless so many images can be generated."""
    for name, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name}={value} is too small. Use {name} >= 1.")
    if interpolation < 0 or interpolation == 1:
        raise UserError(f"interpolation={interpolation} must be 0 for none, or at least 2 columns.")
