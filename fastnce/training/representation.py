"""Representation learning: SimCLR, MoCo v2 and SupCon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fastnce.data import LabelledImages, TwoViews
from fastnce.errors import UserError
from fastnce.metrics.knn import accuracy, knn_predict
from fastnce.metrics.representation import calibrate, encode
from fastnce.models import Representation
from fastnce.models.representation import build_encoder
from fastnce.training import runtime
from fastnce.training.config import RepresentationTrainConfig
from fastnce.training.schedule import WarmupCosine
from fastnce.training.system import Measure, Rows, System

# A sample grid shows this many classes, and looks for neighbours among this many training images.
_GRID_CLASSES = 10
_GRID_IMAGES = 2000


def images_of(
    config: RepresentationTrainConfig, split: str, data: Path | None = None
) -> LabelledImages:
    """The images of a split, as the encoder of `config` takes them; from its own folder or from `data`."""
    return LabelledImages(
        config.data if data is None else data,
        split,
        image_size=config.image_size,
        channels=config.image_channels,
        flip=False,
        seed=config.seed,
    )


def random_encoder(config: RepresentationTrainConfig, train: LabelledImages) -> nn.Module:
    """The encoder before training, with the statistics of the training images in its batch norms."""
    with runtime.rng_kept():
        torch.manual_seed(config.seed)
        encoder = build_encoder(config)
    return calibrate(encoder, train)


def _schedule(config: RepresentationTrainConfig, epoch_samples: int) -> WarmupCosine:
    """To the end of the epochs, or for `steps`, where they are given: the cosine ends there."""
    total = config.steps or config.epochs * epoch_samples // config.batch_size
    warmup = config.warmup_epochs * epoch_samples // config.batch_size
    if total == 0:
        raise UserError(
            f"batch_size={config.batch_size} is larger than all epochs together, {epoch_samples} samples each. "
            "Use a smaller batch_size or more epochs."
        )
    if warmup >= total:
        raise UserError(
            f"warmup_epochs={config.warmup_epochs} takes {warmup} steps, but the run has {total}. "
            "Use fewer warmup_epochs, or more epochs or steps."
        )
    return WarmupCosine(
        total_steps=total,
        samples_per_step=config.batch_size,
        epoch_samples=epoch_samples,
        warmup_steps=warmup,
    )


def _nearest_neighbours(
    config: RepresentationTrainConfig, dataset: TwoViews
) -> Callable[[nn.Module], Rows]:
    """A row for each class: a test image, then the training images whose features are nearest to its own."""
    train, test = dataset.dataset, images_of(config, "test")
    gallery = range(0, len(train), max(1, len(train) // _GRID_IMAGES))
    shown = range(min(test.num_classes, _GRID_CLASSES))
    queries = [int((test.labels == label).nonzero()[0]) for label in shown]

    def rows(encoder: nn.Module) -> Rows:
        known = F.normalize(encode(encoder, train, gallery))
        asked = F.normalize(encode(encoder, test, queries))
        count = min(config.sample_count, len(gallery))
        nearest = (asked @ known.T).topk(count).indices.tolist()
        return {
            test.class_names[label]: [test.image(query), *(train.image(gallery[i]) for i in near)]
            for label, query, near in zip(shown, queries, nearest, strict=True)
        }

    return rows


def _knn_accuracy(config: RepresentationTrainConfig, dataset: TwoViews) -> Measure:
    train, test = dataset.dataset, images_of(config, "test")

    def measure(model: nn.Module, encoder: nn.Module) -> dict[str, float]:
        predicted = knn_predict(encode(encoder, train), train.labels, encode(encoder, test))
        return {"knn/accuracy": accuracy(predicted, test.labels)}

    return measure


REPRESENTATION_SYSTEM = System(
    dataset=lambda config: TwoViews(images_of(config, "train"), config.views),
    schedule=_schedule,
    model=lambda config, dataset: Representation(config),
    network_name="encoder",
    network=build_encoder,
    preview=_nearest_neighbours,
    panels=(("loss",), ("positive_cosine",)),
    measure=_knn_accuracy,
)
