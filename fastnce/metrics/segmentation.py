"""Segmentation scores: do translated street scenes show what their label maps ask for? With Cityscapes' classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.data.images import to_uint8
from fastnce.errors import UserError
from fastnce.metrics.extractors import load_scripted
from fastnce.metrics.label_maps import CLASSES, IGNORED, LabelKind, label_key, read_label_map
from fastnce.metrics.tables import finite_or_none, format_number, markdown_table


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
    predicted: Tensor, labels: Tensor, num_classes: int = len(CLASSES), ignored: int = IGNORED
) -> Tensor:
    """How many pixels of each class were taken for each class.

    Args:
        predicted: integers 0 to `num_classes` - 1, of any shape.
        labels: the same shape; also `ignored`, for pixels that are not counted.
        num_classes: K.
        ignored: the label of pixels that are not counted.

    Returns:
        (K, K) int64 on the CPU: rows are labels, columns predictions. Matrices of several images add up.

    Raises:
        ValueError: the shapes differ, or a value is out of range.

    Example:
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

    Example:
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

    The module takes (N, 3, H, W) uint8, resizes and normalises by itself if it has to, and returns logits (N, 19, h, w) in
    the order of Cityscapes' train ids, or these ids themselves, (N, h, w) integers.

    Args:
        path: The file, as `torch.jit.save` wrote it. Use only files whose origin you trust.
        device: Where it runs.

    Raises:
        UserError: If there is no such file, or it is no TorchScript module.
    """

    def __init__(self, path: Path | str, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.module, self.name = load_scripted("segmenter", path, device)
        self.device = torch.device(device)

    @torch.inference_mode()
    def forward(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """The train ids of one image (3, H, W) in [-1, 1] at another size (h, w), on the CPU.

        Logits are scaled bilinearly before the largest is taken, ids to the nearest.

        Raises:
            UserError: the network returns something else.
        """
        output = self.module(to_uint8(image).expand(3, -1, -1)[None].to(self.device))
        if output.ndim == 4 and output.shape[1] == len(CLASSES):
            scaled = F.interpolate(output.float(), size, mode="bilinear", align_corners=False)
            return scaled[0].argmax(0).cpu()
        if output.ndim == 3 and not output.is_floating_point():
            return F.interpolate(output[:, None].double(), size)[0, 0].long().cpu()
        raise UserError(
            f"segmenter {self.name}: expected logits (N, {len(CLASSES)}, h, w) or integer ids (N, h, w), got "
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
        labels: The label maps' files, see `fastnce.metrics.label_maps.label_files`.
        segmenter: What reads the images.
        kind: What the label maps hold.

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
    lines = [("class", "accuracy", "IoU")]
    lines += [
        (row["name"], format_number(row["accuracy"], ".3f"), format_number(row["iou"], ".3f"))
        for row in result["classes"]
    ]
    lines.append(
        (
            "mean",
            format_number(result["class_accuracy"], ".3f"),
            format_number(result["mean_iou"], ".3f"),
        )
    )
    notes = [
        f"Pixel accuracy {format_number(result['pixel_accuracy'], '.3f')}, mean precision "
        f"{format_number(result['mean_precision'], '.3f')}; {result['count']} images, all pixels together, void left out. "
        f"Segmenter: {result['segmenter']}."
    ]
    return markdown_table(lines, notes)
