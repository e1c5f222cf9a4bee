"""Representation learning: SimCLR, MoCo v2 and SupCon."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastnce.data import LabelledImages, TwoViews
from fastnce.data.class_folders import NO_CLASSES
from fastnce.data.labelled import has_split
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
    """The images of a split, as the encoder of `config` takes them; from its own folder or from `data`.

    Of its own folder the classes of the run; labels of another one are compared with each other only, whatever they are.
    """
    own = data is None and config.class_names != NO_CLASSES
    return LabelledImages(
        config.data if data is None else data,
        split,
        image_size=config.image_size,
        channels=config.image_channels,
        flip=False,
        seed=config.seed,
        classes=config.class_names if own else (),
        needs_labels=config.method == "supcon",
        class_balance=config.class_balance and split == "train",
        broken_files=config.broken_files,
    )


def _views(config: RepresentationTrainConfig) -> TwoViews:
    drop = config.last_batch != "keep"
    images = images_of(config, "train")
    return TwoViews(images, config.views, batch_size=config.batch_size if drop else 1)


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
    """A row for each class: a test image, then the training images whose features are nearest to its own.

    Without classes, rows of images spread over the test set; without test images, of training images, each its own nearest.
    """
    train = dataset.dataset
    test = images_of(config, "test") if has_split(config.data, "test") else train
    gallery = range(0, len(train), max(1, len(train) // _GRID_IMAGES))
    if test.num_classes > 1:
        # A class may have no test image.
        labels, first = np.unique(test.labels.numpy(), return_index=True)
        shown = zip(labels[:_GRID_CLASSES].tolist(), first.tolist(), strict=False)
        queries = {test.class_names[label]: index for label, index in shown}
    else:
        step = max(1, len(test) // _GRID_CLASSES)
        queries = {str(index): index for index in range(0, len(test), step)[:_GRID_CLASSES]}

    def rows(encoder: nn.Module) -> Rows:
        known = F.normalize(encode(encoder, train, gallery))
        asked = F.normalize(encode(encoder, test, list(queries.values())))
        count = min(config.sample_count, len(gallery))
        nearest = (asked @ known.T).topk(count).indices.tolist()
        return {
            name: [test.image(query), *(train.image(gallery[i]) for i in near)]
            for (name, query), near in zip(queries.items(), nearest, strict=True)
        }

    return rows


def _knn_accuracy(config: RepresentationTrainConfig, dataset: TwoViews) -> Measure | None:
    train = dataset.dataset
    missing = "test images" if not has_split(config.data, "test") else "classes"
    if missing == "test images" or train.num_classes < 2:
        print(
            f"{config.data} has no {missing}: trained without measuring k-NN accuracy.",
            file=sys.stderr,
        )
        return None
    test = images_of(config, "test")

    def measure(model: nn.Module, encoder: nn.Module) -> dict[str, float]:
        predicted = knn_predict(encode(encoder, train), train.labels, encode(encoder, test))
        return {"knn/accuracy": accuracy(predicted, test.labels)}

    return measure


REPRESENTATION_SYSTEM = System(
    dataset=_views,
    schedule=_schedule,
    model=lambda config, dataset: Representation(config),
    network_name="encoder",
    network=build_encoder,
    preview=_nearest_neighbours,
    panels=(("loss",), ("positive_cosine",)),
    measure=_knn_accuracy,
)
