"""Representation learning: SimCLR, MoCo v2 and SupCon."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastnce.data import LabelledImages, TwoViews, list_images
from fastnce.data.broken import readable
from fastnce.data.files import atomic_path
from fastnce.data.images import read_image, to_array, to_tensor
from fastnce.data.labelled import NO_CLASSES, has_split, to_square
from fastnce.errors import UserError
from fastnce.metrics.probes import accuracy, calibrate, encode, knn_predict
from fastnce.models import Representation
from fastnce.models.representation import build_encoder
from fastnce.training import runtime
from fastnce.training.config import RepresentationTrainConfig, TrainConfig
from fastnce.training.schedule import WarmupCosine
from fastnce.training.shared import import_safetensors
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


@torch.inference_mode()
def write_features(
    encoder: nn.Module,
    config: TrainConfig,
    input: Path,
    out: Path,
    *,
    normalize: bool = False,
    batch_size: int = 64,
    broken_files: Literal["error", "skip"] | None = None,
) -> tuple[int, int]:
    """Writes an encoder's features of a folder of images, with their names.

    An image is cut to its central square and scaled to the size of the training. The file has the arrays "features" (N, F)
    float32 and "names" (N,), the files' names below `input`, sorted; a .safetensors file has "names" in its metadata, as JSON.

    Args:
        encoder: as `load_generator` gives it.
        config: the configuration of its run.
        input: folder of images, also in folders below it; or one image.
        out: file to write, .npz or .safetensors.
        normalize: scale the features of an image to length 1.
        batch_size: images at a time.
        broken_files: "skip" leaves a file out that cannot be read and names it in the log; None: as in the training.

    Returns:
        N and F.

    Raises:
        UserError: a run of another system, no images, a broken one, another kind of file, or it cannot be written.
    """
    if not isinstance(config, RepresentationTrainConfig):
        raise UserError(
            f"a run of {config.system} has no encoder of whole images. Name a run of simclr, moco or supcon."
        )
    if Path(out).suffix not in (".npz", ".safetensors"):
        raise UserError(f"out={out}: expected a file that ends in .npz or .safetensors.")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is too small. Use batch_size >= 1.")
    input = Path(input)
    folder, paths = (input.parent, [input]) if input.is_file() else (input, list_images(input))
    device = next(encoder.parameters()).device
    skip = (broken_files or config.broken_files) == "skip"

    def read(path: Path) -> Tensor:
        image = to_square(read_image(path, config.image_channels), config.image_size)
        return to_tensor(to_array(image))

    names, parts, batch = [], [], []
    shown = tqdm(paths, desc="features", unit="image", disable=None)
    for path, image in readable(shown, read, skip=skip):
        names.append(path.relative_to(folder).as_posix())
        batch.append(image)
        if len(batch) == batch_size:
            parts.append(encoder(torch.stack(batch).to(device)).float().cpu())
            batch = []
    if batch:
        parts.append(encoder(torch.stack(batch).to(device)).float().cpu())
    features = F.normalize(torch.cat(parts)) if normalize else torch.cat(parts)
    if Path(out).suffix == ".npz":
        with atomic_path(out) as temporary:
            np.savez(temporary, features=features.numpy(), names=np.array(names))
    else:
        data = import_safetensors().torch.save(
            {"features": features}, metadata={"names": json.dumps(names)}
        )
        with atomic_path(out) as temporary:
            temporary.write_bytes(data)
    return features.shape[0], features.shape[1]


REPRESENTATION_SYSTEM = System(
    dataset=_views,
    schedule=_schedule,
    model=lambda config, dataset: Representation(config),
    network_name="encoder",
    network=build_encoder,
    preview=_nearest_neighbours,
    next_command="fastnce features --run {run} --input DIR --out features.npz",
    panels=(("loss",), ("positive_cosine",)),
    measure=_knn_accuracy,
)
