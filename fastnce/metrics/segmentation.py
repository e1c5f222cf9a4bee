"""Segmentation scores: do translated street scenes show what their label maps ask for? With Cityscapes' 19 classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fastnce.data.folders import list_images
from fastnce.data.images import to_uint8
from fastnce.errors import UserError
from fastnce.metrics.tables import finite_or_none, format_number, rows_table
from fastnce.networks.weights import load_scripted

LabelKind = Literal["train-ids", "ids", "colours"]

IGNORED = 255

# By train id, 0 to 18: name, id, colour. The numbers and colours of the data set's documentation.
_CLASSES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
CLASSES = tuple(name for name, _, _ in _CLASSES)

_COLUMNS = {"accuracy": ("accuracy", ".3f"), "iou": ("IoU", ".3f")}

# Unlabelled and the like, dynamic, ground, parking, rail track, guard rail, bridge, tunnel, caravan, trailer.
_VOID_COLOURS = (
    (0, 0, 0),
    (111, 74, 0),
    (81, 0, 81),
    (250, 170, 160),
    (230, 150, 140),
    (180, 165, 180),
    (150, 100, 100),
    (150, 120, 90),
    (0, 0, 90),
    (0, 0, 110),
)
_COLOURS = np.array([colour for _, _, colour in _CLASSES] + list(_VOID_COLOURS), dtype=np.int32)
_ID_OF_COLOUR = np.array([*range(len(CLASSES)), *(IGNORED for _ in _VOID_COLOURS)], dtype=np.uint8)
_TRAIN_ID_OF_ID = np.full(256, IGNORED, dtype=np.uint8)
_TRAIN_ID_OF_ID[[number for _, number, _ in _CLASSES]] = np.arange(len(CLASSES))

# An image of which most pixels are further than this from every colour is a photograph, not a label map.
_FAR = 40

# What Cityscapes appends to the name of a scene, for each kind of label map and for the photograph.
_SUFFIX = {
    "train-ids": "_labelTrainIds",
    "ids": "_labelIds",
    "colours": "_color",
}
_ENDINGS = (
    *(f"_{grain}{suffix}" for grain in ("gtFine", "gtCoarse") for suffix in _SUFFIX.values()),
    "_gtFine_instanceIds",
    "_gtFine_instanceTrainIds",
    "_gtCoarse_instanceIds",
    "_leftImg8bit",
)


def train_ids(ids: Tensor) -> Tensor:
    """Cityscapes' own ids, integers of any shape, as train ids, int64: 0 to 18, and 255 for what is not evaluated.

    Examples:
        >>> train_ids(torch.tensor([7, 0, 33, 35])).tolist()
        [0, 255, 18, 255]
    """
    return torch.from_numpy(_TRAIN_ID_OF_ID)[ids.long()].long()


def label_key(path: Path) -> str:
    """The common name of an image and its label map: without Cityscapes' endings and the extension.

    Also without the `_A` and `_B` of the published preparation, where `1_A.jpg` and `1_B.jpg` belong together.

    Examples:
        >>> label_key(Path("ulm_000001_000019_gtFine_color.png")), label_key(Path("7_B.jpg"))
        ('ulm_000001_000019', '7')
    """
    stem = path.stem
    for ending in _ENDINGS:
        stem = stem.removesuffix(ending)
    return stem[:-2] if stem[:-2].isdigit() and stem.endswith(("_A", "_B")) else stem


def label_files(folder: Path | str, kind: LabelKind) -> dict[str, Path]:
    """The label maps in a folder and those below it, by `label_key`; UserError if there are none, or two of one scene.

    Of a folder with several kinds of maps for a scene, as Cityscapes' own, those of `kind` are taken.
    """
    paths = [path for path in list_images(folder) if path.suffix.lower() != ".npy"]
    of_kind = [path for path in paths if path.stem.endswith(_SUFFIX[kind])]
    files: dict[str, Path] = {}
    for path in of_kind or paths:
        other = files.setdefault(label_key(path), path)
        if other != path:
            raise UserError(
                f"{path} and {other} are label maps of one scene. Leave one of them, or name a folder of one kind of maps."
            )
    return files


def read_label_map(path: Path, kind: LabelKind) -> Tensor:
    """A label map as train ids, (H, W) int64: 0 to 18, and 255 for what is not evaluated.

    Files of "train-ids" and "ids" are 8-bit greyscale or palette images whose pixels are the numbers; those of "colours" RGB
    images. Each pixel of these counts as the nearest of the data set's colours, void ones included, so that they may be JPEGs.
    UserError if the file is no image, of another kind, or has other numbers.
    """
    try:
        with Image.open(path) as image:
            if kind == "colours":
                return torch.from_numpy(
                    _from_colours(path, np.asarray(image.convert("RGB")))
                ).long()
            if image.mode not in ("L", "P"):
                raise UserError(
                    f"{path}: is of mode {image.mode}, but label maps of {kind} have one 8-bit channel. "
                    "Use --label-kind colours for colours."
                )
            ids = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: is not a readable image ({error}).") from error
    if kind == "ids":
        return train_ids(torch.from_numpy(ids))
    wrong = ids[(ids >= len(CLASSES)) & (ids != IGNORED)]
    if wrong.size:
        raise UserError(
            f"{path}: {wrong[0]} is no train id; those are 0 to {len(CLASSES) - 1}, and {IGNORED} for the rest. "
            "Use --label-kind ids if the maps hold Cityscapes' own ids."
        )
    return torch.from_numpy(ids).long()


def _from_colours(path: Path, pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 to train ids (H, W) uint8."""
    packed = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    colours, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
    unpacked = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], 1)
    nearest, squared = np.empty(len(colours), dtype=np.int64), np.empty(len(colours))
    for start in range(0, len(colours), 4096):
        part = slice(start, start + 4096)
        distances = np.square(unpacked[part, None] - _COLOURS).sum(2)
        nearest[part], squared[part] = distances.argmin(1), distances.min(1)
    if counts[squared > _FAR**2].sum() > packed.size / 2:
        raise UserError(
            f"{path}: most of its pixels have none of Cityscapes' colours. Name a folder of label maps, or use "
            "--label-kind ids or train-ids."
        )
    return _ID_OF_COLOUR[nearest][inverse].reshape(packed.shape)


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of all pixels of a set of images together; NaN where no pixel decides."""

    pixel_accuracy: float
    """Share of the labelled pixels that got their class."""
    class_accuracy: float
    """Mean over the classes of the share of a class's pixels that got it (recall)."""
    mean_iou: float
    """Mean over the classes of intersection over union, TP / (TP + FP + FN)."""
    mean_precision: float
    """Mean over the classes of TP / (TP + FP)."""
    accuracies: tuple[float, ...]
    """Each class's share of its pixels that got it; NaN for a class that the labels do not have."""
    ious: tuple[float, ...]
    """Each class's intersection over union; NaN for a class that is neither in the labels nor predicted."""


def confusion_matrix(
    predicted: Tensor,
    labels: Tensor,
    num_classes: int | None = len(CLASSES),
    ignored: int = IGNORED,
) -> Tensor:
    """How many pixels of each class were taken for each class.

    Args:
        predicted: integers 0 to `num_classes` - 1, of any shape.
        labels: the same shape; also `ignored`, for pixels that are not counted.
        num_classes: K. None takes the K of the logits, known when an image has been read.
        ignored: the label of pixels that are not counted.

    Returns:
        (K, K) int64 on the CPU: rows are labels, columns predictions. Matrices of several images add up.

    Raises:
        ValueError: the shapes differ, or a value is out of range.

    Examples:
        >>> confusion_matrix(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 255]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    if predicted.shape != labels.shape:
        raise ValueError(
            f"confusion_matrix: predicted and labels must have one shape, got {tuple(predicted.shape)} and "
            f"{tuple(labels.shape)}. Scale one to the other."
        )
    counted = labels != ignored
    label, guess = (x[counted].long().cpu() for x in (labels, predicted))
    for name, values in (("labels", label), ("predicted", guess)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
            raise ValueError(
                f"confusion_matrix: {name}: expected 0 to {num_classes - 1}, got {int(values.min())} to "
                f"{int(values.max())}. Map the classes to these numbers."
            )
    pairs = torch.bincount(label * num_classes + guess, minlength=num_classes**2)
    return pairs.view(num_classes, num_classes)


def segmentation_scores(confusion: Tensor) -> SegmentationScores:
    """The scores of a confusion matrix; classes without a value are left out of the means.

    Args:
        confusion: (K, K), rows are labels, columns predictions.

    Examples:
        >>> scores = segmentation_scores(torch.tensor([[3, 1], [0, 4]]))
        >>> scores.pixel_accuracy, scores.class_accuracy, scores.ious
        (0.875, 0.875, (0.75, 0.8))
    """
    counts = confusion.double()
    hit, asked, given = counts.diagonal(), counts.sum(1), counts.sum(0)
    accuracies, ious, precisions = hit / asked, hit / (asked + given - hit), hit / given
    return SegmentationScores(
        pixel_accuracy=(hit.sum() / counts.sum()).item(),
        class_accuracy=accuracies.nanmean().item(),
        mean_iou=ious.nanmean().item(),
        mean_precision=precisions.nanmean().item(),
        accuracies=tuple(accuracies.tolist()),
        ious=tuple(ious.tolist()),
    )


class ScriptedSegmenter(nn.Module):
    """A segmentation network from a TorchScript file.

    The module takes (N, 3, H, W) uint8, resizes and normalises by itself if it has to, and returns logits (N, K, h, w) in
    the order of the classes, or their numbers, (N, h, w) integers. By default these are Cityscapes' train ids.

    Args:
        path: The file, as `torch.jit.save` wrote it. Use only files whose origin you trust.
        device: Where it runs.
        num_classes: K.

    Raises:
        UserError: If there is no such file, or it is no TorchScript module.
    """

    def __init__(
        self,
        path: Path | str,
        device: torch.device | str = "cpu",
        num_classes: int = len(CLASSES),
    ) -> None:
        super().__init__()
        self.module, self.name = load_scripted("segmenter", path, device)
        self.device, self.num_classes = torch.device(device), num_classes

    @torch.inference_mode()
    def forward(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """The classes of one image (3, H, W) in [-1, 1] at another size (h, w), on the CPU.

        Logits are scaled bilinearly before the largest is taken, ids to the nearest.

        Raises:
            UserError: the network returns something else.
        """
        output = self.module(to_uint8(image).expand(3, -1, -1)[None].to(self.device))
        if self.num_classes is None and output.ndim == 4:
            self.num_classes = output.shape[1]
        if output.ndim == 4 and output.shape[1] == self.num_classes:
            scaled = F.interpolate(output.float(), size, mode="bilinear", align_corners=False)
            return scaled[0].argmax(0).cpu()
        if output.ndim == 3 and not output.is_floating_point() and self.num_classes is not None:
            return F.interpolate(output[:, None].double(), size)[0, 0].long().cpu()
        raise UserError(
            f"segmenter {self.name}: expected logits (N, {self.num_classes or 'classes'}, h, w) or integer ids (N, h, w), got "
            f"{tuple(output.shape)} of {output.dtype}. Wrap the network so that it returns one of these."
        )


def evaluate_segmentation(
    images: Iterable[tuple[Path, Tensor]],
    labels: Mapping[str, Path],
    segmenter: ScriptedSegmenter,
    kind: LabelKind,
) -> dict[str, Any]:
    """Scores of the segmentation of images against the label maps that they should show, at the label maps' sizes.

    Args:
        images: Name and pixels (3, H, W) in [-1, 1].
        labels: The label maps' files of one kind, see `label_files`.

    Returns:
        {"segmenter", "label_kind", "count", "pixel_accuracy", "class_accuracy", "mean_iou", "mean_precision",
        "classes": [{"name", "accuracy", "iou"}, ...]}; None where no pixel decides.

    Raises:
        UserError: an image without a label map, or a file that is none.
    """
    confusion, count = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64), 0
    for path, image in images:
        key = label_key(path)
        if key not in labels:
            raise UserError(
                f"{path}: has no label map. Expected a file named {key} among those of --labels, such as "
                f"{next(iter(labels.values())).name}."
            )
        target = read_label_map(labels[key], kind)
        confusion += confusion_matrix(segmenter(image, tuple(target.shape)), target)
        count += 1
    scores = segmentation_scores(confusion)
    means = ("pixel_accuracy", "class_accuracy", "mean_iou", "mean_precision")
    return {
        "segmenter": segmenter.name,
        "label_kind": kind,
        "count": count,
        **{name: finite_or_none(getattr(scores, name)) for name in means},
        "classes": [
            {"name": name, "accuracy": finite_or_none(accuracy), "iou": finite_or_none(iou)}
            for name, accuracy, iou in zip(CLASSES, scores.accuracies, scores.ious, strict=True)
        ],
    }


def format_segmentation_table(result: Mapping[str, Any]) -> str:
    """`evaluate_segmentation`'s result as a Markdown table."""
    means = {"accuracy": result["class_accuracy"], "iou": result["mean_iou"]}
    accuracy, precision = (
        format_number(result[name], ".3f") for name in ("pixel_accuracy", "mean_precision")
    )
    note = (
        f"Pixel accuracy {accuracy}, mean precision {precision}; {result['count']} images, all pixels together, void left out. "
        f"Segmenter: {result['segmenter']}."
    )
    rows = [*result["classes"], {"name": "mean"} | means]
    return rows_table(rows, _COLUMNS, [note], first="class")
