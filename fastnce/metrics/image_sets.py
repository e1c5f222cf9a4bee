"""How good images are: distances of sets to a reference and their content, beside what tells what these are worth, and of pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnce.metrics.distribution import (
    distance,
    extractor_name,
    precision_recall_density_coverage,
    saved_features,
)
from fastnce.metrics.tables import (
    NEIGHBOURHOOD_COLUMNS,
    finite_or_none,
    measured,
    one_or_several,
    rows_table,
    write_result,
)

TRANSLATED = "translated"
BEST = "translated, best checkpoint"
WITHOUT_NCE = "translated, contrastive loss off"

# Of precision, recall, density and coverage.
NEIGHBOURS = 5

# A batch of the extractor: so many pixels, and no more images than that.
_BATCH_PIXELS, _BATCH_IMAGES = 2**21, 256

_COLUMNS = {
    "content_accuracy": ("content accuracy", ".3f"),
    "fid": ("FID", ".2f"),
    "fid_share": ("FID, share of untranslated", ".4f"),
    "kid": ("KID", ""),
    **NEIGHBOURHOOD_COLUMNS,
}

# Side of SSIM's Gaussian window (standard deviation 1.5); a smaller image has no SSIM.
_WINDOW = 11

_PAIR_COLUMNS = {"l1": ("L1", ".4f"), "psnr": ("PSNR", ".2f"), "ssim": ("SSIM", ".4f")}


def untranslated_name(domain: str) -> str:
    """The name of the row of the images as they were, "untranslated A"."""
    return f"untranslated {domain}"


def halves_name(domain: str) -> str:
    """The name of the row of other real images of the target domain, the least distance to hope for."""
    return f"{domain} against other images of {domain}"


@dataclass(frozen=True)
class Row:
    """One set of images to judge."""

    images: Iterable[Tensor]
    """(C, H, W) each, float in [-1, 1] or uint8; read once, a few at a time. Sizes may differ."""
    digits: Tensor | None = None
    """(N,) int64, the digits that the images should show, if they show digits."""
    reference: Iterable[Tensor] | None = None
    """Images to measure the distance from, if not the report's."""


def evaluate(
    rows: Mapping[str, Row | str],
    reference: Iterable[Tensor],
    extractor: nn.Module,
    *,
    reader: nn.Module | None = None,
    baseline: str | None = None,
    count: int | None = None,
) -> dict[str, Any]:
    """FID, KID, precision, recall, density, coverage and content accuracy of several sets of images.

    Images are judged as 8-bit files hold them, at their own size: whatever resizing there is, the extractor does.

    Args:
        rows: By name, the images; or a text that says why there are none.
        reference: (C, H, W) each, in [-1, 1] or uint8: images of the target domain.
        extractor: A module from (N, C, H, W) in [-1, 1] to features (N, F).
        reader: Reads the digits by its method `read_digits`, (N, C, H, W) in [-1, 1] to (N,) int64; without one there is no
            content accuracy.
        baseline: The row whose FID counts as 1 in `fid_share`.
        count: Use the first so many images of each set; by default all. FID depends on the number.

    Returns:
        {"extractor", "reference_count", "reference_size", "rows": [{"name", "count", "size", "content_accuracy", "fid",
        "fid_share", "kid", "kid_std", "precision", "recall", "density", "coverage"}, ...]}. A row without images has "name"
        and "note" only. A number is None if it cannot be had: all distances if an image holds NaN, precision and its
        relatives of five images or fewer. An image with NaN counts as misread.

    Raises:
        ValueError: If a set has fewer than two images.
    """
    common = _judge(reference, extractor, None, count)
    results: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        if isinstance(row, str):
            continue
        judged = _judge(row.images, extractor, None if row.digits is None else reader, count)
        own = common if row.reference is None else _judge(row.reference, extractor, None, count)
        accuracy = None
        if judged.read is not None and row.digits is not None:
            accuracy = (judged.read == row.digits[:count]).double().mean().item()
        results[name] = {
            "count": len(judged.features),
            "size": judged.size,
            "content_accuracy": accuracy,
            **_compare(judged.features, own.features),
        }
    unit = results.get(baseline or "", {}).get("fid")
    for result in results.values():
        result["fid_share"] = result["fid"] / unit if unit and result["fid"] is not None else None
    return {
        "extractor": extractor_name(extractor),
        "reference_count": len(common.features),
        "reference_size": common.size,
        "rows": [{"name": name} | results.get(name, {"note": row}) for name, row in rows.items()],
    }


def format_table(result: Mapping[str, Any]) -> str:
    """The rows of `evaluate` as a Markdown table that also reads well as text."""
    judged = [row for row in result["rows"] if "note" not in row]
    # KID's scale is the extractor's: around 0.1 for some, thousands for others.
    form = ".1f" if any((row["kid"] or 0) >= 10 for row in judged) else ".4f"
    rows, notes = [], []
    for row in result["rows"]:
        if "note" in row:
            notes.append(f"{row['name']}: {row['note']}.")
        elif row["fid"] is None:
            notes.append(f"{row['name']}: its images hold values that are not finite.")
        if row.get("kid") is not None:
            row = row | {"kid": f"{row['kid']:{form}} +- {row['kid_std']:{form}}"}
        rows.append(row)
    return rows_table(rows, measured(_COLUMNS, rows), [_foot(result, judged), *notes])


def write_report(result: Mapping[str, Any], folder: Path | str) -> list[Path]:
    """Writes `metrics.json` and `metrics.md` into a folder, atomically; returns their paths."""
    return write_result(result, format_table(result), folder)


class _Judged(NamedTuple):
    features: Tensor  # (N, F) float64 on the CPU, NaN for an image that is not finite
    read: (
        Tensor | None
    )  # (N,) int64 digits, -1 for an image that is not finite; None if nobody reads
    size: str  # width and height, "256x256", or "several sizes"


def _judge(
    images: Iterable[Tensor], extractor: nn.Module, reader: nn.Module | None, count: int | None
) -> _Judged:
    features, read, sizes = [], [], set()
    for batch in batches(islice(images, count)):
        sizes.add(f"{batch.shape[3]}x{batch.shape[2]}")
        levels, broken, own = saved_features(batch, extractor)
        features.append(own)
        if reader is not None:
            read.append(reader.read_digits(levels).masked_fill(broken, -1))
    return _Judged(
        torch.cat(features) if features else torch.empty(0, 0),
        torch.cat(read) if read else None,
        one_or_several(sizes),
    )


def batches(images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Images that follow each other and have one size, stacked."""
    batch: list[Tensor] = []
    for image in images:
        limit = min(_BATCH_IMAGES, max(1, _BATCH_PIXELS // image.shape[-2:].numel()))
        if batch and (len(batch) >= limit or image.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(image)
    if batch:
        yield torch.stack(batch)


def _compare(features: Tensor, reference: Tensor) -> dict[str, float | None]:
    far = distance(features, reference)
    numbers = {"fid": far.fid, "kid": far.kid, "kid_std": far.kid_std}
    numbers |= dict.fromkeys(NEIGHBOURHOOD_COLUMNS, math.nan)
    if min(len(features), len(reference)) > NEIGHBOURS:
        numbers |= asdict(precision_recall_density_coverage(reference, features, NEIGHBOURS))
    return {name: finite_or_none(value) for name, value in numbers.items()}


def _foot(result: Mapping[str, Any], judged: Iterable[Mapping[str, Any]]) -> str:
    """How many images of which size, and what judged them."""
    counts, sizes = ({row[key] for row in judged} for key in ("count", "size"))
    count, size = result["reference_count"], result["reference_size"]
    images = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    at = one_or_several(sizes)
    against = f"against {count}" + ("" if at == size else f" of {size}")
    return (
        f"{images} images of {at} in each row, {against}, as 8-bit files hold them. "
        f"Features: {result['extractor']}."
    )


@torch.inference_mode()
def pair_numbers(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """L1, PSNR and SSIM of images and what they should be, each the mean over the images.

    Values count from 0 to 1. L1 is the mean absolute difference, PSNR is 10 log10(1 / mean squared difference) in dB. SSIM is
    that of Wang et al., 2004, with Gaussian windows of 11x11 pixels around every pixel, mirrored at the border, through
    torchmetrics. (scikit-image leaves the 5 pixels at the border out.)

    Args:
        pairs: (C, H, W) in [-1, 1] each, the image and its truth.

    Returns:
        {"count", "size", "l1", "psnr", "ssim"}. A number is None if it cannot be had: PSNR where an image is its truth exactly,
        SSIM of images with a side below 11 pixels.

    Raises:
        ValueError: no pairs, or a pair of two shapes.

    Examples:
        >>> truth = torch.zeros(3, 16, 16)
        >>> numbers = pair_numbers([(truth + 0.2, truth)])
        >>> round(numbers["l1"], 3), round(numbers["psnr"], 3)
        (0.1, 20.0)
    """
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    values: dict[str, list[float]] = {name: [] for name in _PAIR_COLUMNS}
    sizes = set()
    for image, truth in pairs:
        if image.shape != truth.shape:
            raise ValueError(
                f"pair_numbers: a pair of {tuple(image.shape)} and {tuple(truth.shape)}."
            )
        one, other = ((x[None].double() + 1) / 2 for x in (image, truth))
        height, width = image.shape[1:]
        sizes.add(f"{width}x{height}")
        values["l1"].append((one - other).abs().mean().item())
        values["psnr"].append(peak_signal_noise_ratio(one, other, data_range=1.0).item())
        ssim = float("nan")
        if min(height, width) >= _WINDOW:
            ssim = structural_similarity_index_measure(one, other, data_range=1.0).item()
        values["ssim"].append(ssim)
    count = len(values["l1"])
    if not count:
        raise ValueError("pair_numbers: no pairs.")
    means = {name: finite_or_none(sum(numbers) / count) for name, numbers in values.items()}
    return {"count": count, "size": one_or_several(sizes)} | means


def format_pair_table(result: Mapping[str, Any]) -> str:
    """{"reference", "rows": [{"name"} and `pair_numbers`, ...]} as a Markdown table that also reads well as text."""
    first = result["rows"][0]
    foot = (
        f"{first['count']} images of {first['size']}, each against its own of {result['reference']}, as files hold them. L1 and SSIM of "
        "values from 0 to 1, PSNR in dB; means over the images."
    )
    return rows_table(result["rows"], _PAIR_COLUMNS, [foot])
