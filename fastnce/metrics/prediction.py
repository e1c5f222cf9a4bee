"""How good predicted images are beside the real ones: sharpness, colour, texture, content.

A loss in the features of a network scores well in the features of any network of its kind, however wrong its images are.
So the judge of features has to be another network, and beside it stands one that learns nothing: patches of Laplacian levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.data.stream import counter_rng
from fastnce.metrics.distribution import (
    as_saved,
    extract_features,
    extractor_name,
    frechet_distance,
)
from fastnce.metrics.image_sets import batches
from fastnce.metrics.segmentation import confusion_matrix, segmentation_scores
from fastnce.metrics.tables import finite_or_none, measured, one_or_several, rows_table

PREDICTED = "predicted"
REAL = "real"
OTHERS = "other real images"
GREY = "a grey image"

# Of the sliced Wasserstein distance: side of a patch, patches of an image at a level, directions, and these at a time.
_SIDE, _PATCHES, _DIRECTIONS, _AT_ONCE = 5, 128, 256, 16
_LEVELS = ("swd_fine", "swd_coarse")
_PATCH_STREAM, _DIRECTION_STREAM = 70, 71
# A label for the pixels that no class of the segmenter's is asked of.
_NOT_COUNTED = -1
# The smallest image that has a patch at the coarse level.
_LEAST = 2 * _SIDE - 1

_SCORES = ("mean_iou", "pixel_accuracy", "class_accuracy")
_COLUMNS = {
    "laplacian_variance": ("Laplacian variance", ".4f"),
    "saturation": ("saturation", ".3f"),
    "l1": ("L1", ".4f"),
    "swd_fine": ("SWD fine", ".1f"),
    "swd_coarse": ("SWD coarse", ".1f"),
    "fid": ("FID", ".2f"),
    "mean_iou": ("mean IoU", ".3f"),
    "pixel_accuracy": ("pixel accuracy", ".3f"),
    "class_accuracy": ("class accuracy", ".3f"),
}

Pair = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


class Segmenter(Protocol):
    """What `fastnce.metrics.segmentation.ScriptedSegmenter` offers."""

    name: str
    num_classes: int | None
    """Known when an image has been read."""

    def __call__(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """The classes of one image (3, H, W) at another size (h, w), integers on the CPU."""


class SlicedWasserstein(NamedTuple):
    """Distances between the patches of two sets of images, in thousandths; 0 for equal sets."""

    fine: float
    """Of 5x5 patches of the finest Laplacian level: single pixels and edges."""
    coarse: float
    """Of those of the next one: details of twice the size."""


def laplacian_variance(images: Tensor) -> Tensor:
    """Sharpness: the variance of the Laplacian, the sum of a pixel's four neighbours less four times the pixel.

    Of the mean of the channels, with values from -1 to 1, over all pixels but those at the border (Pech-Pacheco et al., 2000).

    Args:
        images: (N, C, H, W) uint8, or float in [-1, 1].

    Returns:
        (N,) float64, one for each image.

    Raises:
        ValueError: images of another shape, or with a side below 3 pixels.

    Examples:
        >>> point = torch.zeros(1, 3, 5, 5)
        >>> point[:, :, 2, 2] = 1
        >>> round(laplacian_variance(point).item() * 9, 6)  # 9 pixels: one -4, four 1
        20.0
    """
    grey = _values("laplacian_variance", images, 3).mean(1)
    inner = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return (around - 4 * inner).flatten(1).var(1, correction=0)


def saturation(images: Tensor) -> Tensor:
    """Colourfulness: the mean saturation of HSV over the pixels, (max - min) / max of red, green and blue; of black 0.

    Args:
        images: (N, 3, H, W) uint8, or float in [-1, 1].

    Returns:
        (N,) float64 from 0 to 1, one for each image.

    Raises:
        ValueError: images of another shape.

    Examples:
        >>> red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)
        >>> saturation(red).item(), saturation(torch.zeros(1, 3, 1, 1)).item()
        (1.0, 0.0)
    """
    values = _values("saturation", images, 1, channels=3) + 1
    least, most = values.aminmax(dim=1)
    return ((most - least) / most.where(most > 0, 1)).flatten(1).mean(1)


def sliced_wasserstein(a: Tensor, b: Tensor, *, seed: int = 0) -> SlicedWasserstein:
    """How far the patches of two sets of images are apart; nothing in it is learnt.

    Patches of 5x5 pixels of all channels, values from -1 to 1, of the first two levels of a Laplacian pyramid (binomial filter
    of 5 taps), 128 of an image at each level. Of their projections to 256 directions the mean of the Wasserstein-1 distances.
    After Karras et al., 2018, without their normalisation of each channel, so that contrast and colour count.

    Args:
        a, b: (N, C, H, W) and (M, C, h, w), uint8 or float in [-1, 1].
        seed: of the patches' places, which are the same in the i-th images of both sets of one size, and of the directions.

    Returns:
        The distances, in thousandths.

    Raises:
        ValueError: images of another shape, with a side below 9 pixels, or without anything in common.

    Examples:
        >>> x = torch.rand(4, 3, 16, 16) * 2 - 1
        >>> sliced_wasserstein(x, x)
        SlicedWasserstein(fine=0.0, coarse=0.0)
    """
    one, other = (_Patches.of(x, seed) for x in (a, b))
    return one.distance(other)


class _Patches:
    """Patches of a set of images, which come a few at a time."""

    def __init__(self, seed: int) -> None:
        self.seed, self.count = seed, 0
        self.levels: tuple[list[Tensor], ...] = ([], [])  # (n, C * 25) float32 each

    @classmethod
    def of(cls, images: Tensor, seed: int) -> _Patches:
        patches = cls(seed)
        patches.add(images)
        return patches

    def add(self, images: Tensor) -> None:
        values = _values("sliced_wasserstein", images, _LEAST).float()
        for level, kept in zip(_laplacian_levels(values), self.levels, strict=True):
            windows = level.unfold(2, _SIDE, 1).unfold(3, _SIDE, 1)  # (N, C, h, w, 5, 5), a view
            height, width = windows.shape[2:4]
            for index, image in enumerate(windows, self.count):
                random = counter_rng(self.seed, _PATCH_STREAM, index)
                total = height * width
                places = random.choice(total, min(total, _PATCHES), replace=False)
                y, x = torch.from_numpy(places // width), torch.from_numpy(places % width)
                kept.append(image[:, y, x].transpose(0, 1).flatten(1))
        self.count += len(images)

    def distance(self, other: _Patches) -> SlicedWasserstein:
        sides = zip(self.levels, other.levels, strict=True)
        return SlicedWasserstein(
            *(1000 * _sliced(torch.cat(a), torch.cat(b), self.seed) for a, b in sides)
        )


def _sliced(a: Tensor, b: Tensor, seed: int) -> float:
    """The mean Wasserstein-1 distance of the projections of points (n, F) and (m, F)."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"sliced_wasserstein: images of {a.shape[1] // _SIDE**2} and of {b.shape[1] // _SIDE**2} channels. "
            "Give both the same number."
        )
    random = counter_rng(seed, _DIRECTION_STREAM, 0)
    directions = torch.from_numpy(random.standard_normal((a.shape[1], _DIRECTIONS)))
    directions = F.normalize(directions, dim=0).float()
    # Quantiles of both at the same places: of equally many points each point's own.
    count = max(len(a), len(b))
    places = [(np.arange(count) * 2 + 1) * len(x) // (2 * count) for x in (a, b)]
    total = 0.0
    for part in directions.T.split(_AT_ONCE):
        # Four times as fast as torch.sort, measured on one core with 32,000 points.
        one, two = (
            np.sort((part @ x.T).numpy())[:, place] for x, place in zip((a, b), places, strict=True)
        )
        total += np.abs(one - two).mean(1, dtype=np.float64).sum().item()
    return total / _DIRECTIONS


def _laplacian_levels(images: Tensor) -> Iterator[Tensor]:
    """The first two levels of the Laplacian pyramid of Burt and Adelson, 1983: what halving an image loses."""
    for _ in _LEVELS:
        halved = _binomial(images)[:, :, ::2, ::2]
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = 4 * halved
        yield images - _binomial(spread)
        images = halved


def _binomial(images: Tensor) -> Tensor:
    """Weighted by 1, 4, 6, 4, 1 in both directions, mirrored at the border."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    channels = images.shape[1]
    kernel = torch.outer(taps, taps).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=channels)


def _values(function: str, images: Tensor, side: int, channels: int | None = None) -> Tensor:
    """(N, C, H, W) float64 in [-1, 1]; ValueError unless they are so many images of at least that side."""
    shape = images.shape
    fits = images.ndim == 4 and len(images) and min(shape[2:]) >= side
    if not fits or channels not in (None, shape[1]):
        raise ValueError(
            f"{function}: images: expected (N, {channels or 'C'}, H, W) with at least one image and sides of {side} pixels or "
            f"more, got {tuple(shape)}."
        )
    return (as_saved(images) if images.dtype == torch.uint8 else images.cpu()).double()


@torch.inference_mode()
def evaluate_prediction(
    pairs: Iterable[Pair] | Mapping[str, Iterable[Pair]],
    *,
    others: Iterable[Tensor] = (),
    extractor: nn.Module | None = None,
    segmenter: Segmenter | None = None,
    seed: int = 0,
    baselines: bool = True,
) -> tuple[dict[str, Any], str]:
    """Predicted images beside the real ones: sharpness, saturation, L1, sliced Wasserstein distance, FID, segmentation.

    Rows are the predicted images, the real ones, other real ones, and as many grey images. Distances are those from the real
    images. The sliced Wasserstein distance and FID of other real images are the least to hope for. No network judges alone.

    Args:
        pairs: predicted and real image, (3, H, W) uint8 each, with a segmenter also the label map (H, W), integers; read once. Or
            several such by the names of their rows, of the same real images.
        others: (3, H, W) uint8, real images of the same kind, such as those of the training; best as many as there are pairs.
        extractor: A module from (N, 3, H, W) in [-1, 1] to features (N, F), of another kind than any that was trained with.
        segmenter: reads the classes of an image, in the order of the labels. Labels that it does not have are not counted.
        seed: see `sliced_wasserstein`.
        baselines: False leaves out all rows but those of the predicted images.

    Returns:
        {"count", "size", "extractor", "segmenter", "classes", "rows": [{"name", "count", "laplacian_variance", "saturation", "l1", "swd_fine",
        "swd_coarse", "fid", "mean_iou", "pixel_accuracy", "class_accuracy"}, ...]}, None where there is no such number, as
        FID of a single image; and the table. The means of the first three are over the images, L1 counts values from -1 to 1.

    Raises:
        ValueError: no pairs, a pair of two shapes, no uint8 images, or no label for a segmenter.
    """
    named = pairs if isinstance(pairs, Mapping) else {PREDICTED: pairs}
    real, grey = (_Judged(extractor, segmenter, seed) for _ in range(2))
    sizes: set[str] = set()
    rows: list[dict[str, Any]] = []
    for name, given in named.items():
        made = _Judged(extractor, segmenter, seed)
        for batch in batches(_stacked(given, made, real if baselines and not rows else None)):
            predicted, truth = batch.chunk(2, dim=1)
            sizes.add(f"{truth.shape[3]}x{truth.shape[2]}")
            made.add(predicted, truth)
            if not rows:
                real.add(truth)
            if not rows and baselines:
                grey.add(torch.full_like(truth, 127), truth)
        if not made.patches.count:
            raise ValueError("evaluate_prediction: no pairs. Give at least one.")
        rows.append({"name": name} | made.numbers(real))
    if baselines:
        rest = _Judged(extractor, None, seed)
        for batch in batches(islice(others, real.patches.count)):
            rest.add(batch)
        rows.append({"name": REAL} | real.numbers())
        rows += [{"name": OTHERS} | rest.numbers(real)] if rest.patches.count else []
        rows.append({"name": GREY} | grey.numbers(real))
    result = {
        "count": real.patches.count,
        "size": one_or_several(sizes),
        "extractor": None if extractor is None else extractor_name(extractor),
        "segmenter": None if segmenter is None else segmenter.name,
        "classes": None if segmenter is None else segmenter.num_classes,
        "rows": rows,
    }
    return result, format_prediction_table(result)


def format_prediction_table(result: Mapping[str, Any]) -> str:
    """The result of `evaluate_prediction` as a Markdown table that also reads well as text."""
    foot = [
        f"{result['count']} images of {result['size']}, as 8-bit files hold them; values count from -1 to 1. Laplacian variance and "
        f"saturation are best near those of the real images. SWD: sliced Wasserstein distance of {_SIDE}x{_SIDE} patches, in "
        "thousandths, which learns nothing."
    ]
    foot += [f"FID's features: {result['extractor']}."] if result["extractor"] else []
    if result["segmenter"]:
        foot += [f"Segmenter: {result['segmenter']}, {result['classes']} classes."]
    return rows_table(result["rows"], measured(_COLUMNS, result["rows"]), [" ".join(foot)])


class _Judged:
    """The numbers of a set of images, which come a few at a time."""

    def __init__(self, extractor: nn.Module | None, segmenter: Segmenter | None, seed: int) -> None:
        self.extractor, self.segmenter = extractor, segmenter
        self.means: dict[str, list[Tensor]] = {}
        self.patches = _Patches(seed)
        self.features: list[Tensor] = []
        self.confusion: Tensor | int = 0

    def add(self, images: Tensor, truth: Tensor | None = None) -> None:
        values = {
            "laplacian_variance": laplacian_variance(images),
            "saturation": saturation(images),
        }
        if truth is not None:
            difference = as_saved(images).double() - as_saved(truth).double()
            values["l1"] = difference.abs().flatten(1).mean(1)
        for name, of_images in values.items():
            self.means.setdefault(name, []).append(of_images)
        self.patches.add(images)
        if self.extractor is not None:
            self.features.append(extract_features(as_saved(images), self.extractor))

    def read(self, image: Tensor, label: Tensor) -> None:
        """Compares what the segmenter reads with a label map."""
        assert self.segmenter is not None
        label = label.cpu().long()
        read = self.segmenter(as_saved(image), (label.shape[0], label.shape[1]))
        classes = self.segmenter.num_classes
        assert classes is not None, "known now"
        label = label.where(label < classes, _NOT_COUNTED)
        self.confusion = self.confusion + confusion_matrix(read, label, classes, _NOT_COUNTED)

    def numbers(self, reference: _Judged | None = None) -> dict[str, Any]:
        """The row, with the distances from a reference."""
        row: dict[str, Any] = dict.fromkeys(_COLUMNS)
        row |= {name: torch.cat(values).mean().item() for name, values in self.means.items()}
        if reference is not None:
            row |= zip(_LEVELS, self.patches.distance(reference.patches), strict=True)
            if self.features and min(self.patches.count, reference.patches.count) > 1:
                own, real = torch.cat(self.features), torch.cat(reference.features)
                row["fid"] = frechet_distance(own, real)
        if isinstance(self.confusion, Tensor):
            scores = segmentation_scores(self.confusion)
            row |= {name: finite_or_none(getattr(scores, name)) for name in _SCORES}
        return {"count": self.patches.count} | row


def _stacked(pairs: Iterable[Pair], made: _Judged, real: _Judged | None) -> Iterator[Tensor]:
    """The two images of each pair in one, (6, H, W), after the segmenter has read them."""
    for predicted, truth, *label in pairs:
        shapes = {tuple(predicted.shape), tuple(truth.shape)}
        dtypes = {predicted.dtype, truth.dtype}
        if len(shapes) > 1 or predicted.shape[:-2] != (3,) or dtypes != {torch.uint8}:
            raise ValueError(
                f"evaluate_prediction: pairs: expected two uint8 images (3, H, W) of one size, got {predicted.dtype} "
                f"{tuple(predicted.shape)} and {truth.dtype} {tuple(truth.shape)}. Quantise and resize the predicted ones."
            )
        if made.segmenter is not None:
            if not label:
                raise ValueError(
                    "evaluate_prediction: segmenter: needs the label map of each pair. Give (predicted, real, label)."
                )
            made.read(predicted, label[0])
            if real is not None:
                real.read(truth, label[0])
        yield torch.cat([predicted, truth])
