"""The evaluation of a run: its numbers beside those that tell what they are worth."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnce.data.folders import list_images, load_image, split_folder
from fastnce.data.recipe import read_labels
from fastnce.data.samples import composite, load_background, load_digits
from fastnce.data.transforms import counter_rng
from fastnce.errors import UserError
from fastnce.metrics.distribution import (
    Distance,
    as_saved,
    compare_images,
    distance,
    extract_features,
    extractor_name,
)
from fastnce.metrics.evaluator import (
    Evaluator,
    load_evaluator,
    random_crops,
    recipe_for,
    to_batch,
)
from fastnce.metrics.tables import finite_or_none, format_number, markdown_table, write_result

TRANSLATED = "translated"
WITHOUT_NCE = "translated, contrastive loss off"
UNTRANSLATED = "untranslated A"
HALVES = "B against other images of B"
IDEAL = "ideal: the same digits composited"

WITHOUT_NCE_NOTE = (
    "not measured; train with the same settings and --lambda-nce 0, then evaluate again with "
    "--without-nce and that run's folder"
)

_IDEAL_STREAM = 30


@dataclass(frozen=True)
class Row:
    """One set of images to judge."""

    images: Tensor
    """(N, 3, 32, 32) float in [-1, 1]."""
    digits: Tensor
    """(N,) int64, the digits that the images should show."""
    reference: Tensor | None = None
    """Images to measure the distance from, if not the report's."""


def evaluate(
    rows: Mapping[str, Row | str],
    reference: Tensor,
    evaluator: Evaluator,
    *,
    baseline: str | None = None,
) -> dict[str, Any]:
    """Content accuracy, FID and KID of several sets of images against one reference.

    Every row uses the same number of images, the smallest there is, because FID depends on it.

    Args:
        rows: By name, the images; or a text that says why there are none.
        reference: (M, 3, 32, 32) in [-1, 1], images of the target domain.
        evaluator: What reads the digits and gives the features.
        baseline: The row whose FID counts as 1 in the column `fid_share`.

    Returns:
        {"extractor", "count", "rows": [{"name", "content_accuracy", "fid", "kid", "kid_std",
        "fid_share"}, ...]}. A row without images has "name" and "note" only. The distances are None
        if an image holds NaN; such an image counts as misread.
    """
    measured = {name: row for name, row in rows.items() if isinstance(row, Row)}
    count = min([len(reference), *(len(row.images) for row in measured.values())])
    common = extract_features(as_saved(reference[:count]), evaluator)
    results: dict[str, dict[str, Any]] = {}
    for name, row in measured.items():
        images, own = as_saved(row.images[:count]), common
        if row.reference is not None:
            own = extract_features(as_saved(row.reference[:count]), evaluator)
        far = distance(extract_features(images, evaluator), own, extractor=evaluator.name)
        correct = evaluator.read_digits(images) == row.digits[:count]
        correct &= images.isfinite().flatten(1).all(1)
        results[name] = {
            "content_accuracy": correct.double().mean().item(),
            "fid": finite_or_none(far.fid),
            "kid": finite_or_none(far.kid),
            "kid_std": finite_or_none(far.kid_std),
        }
    unit = results.get(baseline, {}).get("fid")
    for result in results.values():
        result["fid_share"] = result["fid"] / unit if unit and result["fid"] is not None else None
    return {
        "extractor": extractor_name(evaluator),
        "count": count,
        "rows": [{"name": name} | results.get(name, {"note": row}) for name, row in rows.items()],
    }


def digits_to_translate(data_root: Path | str) -> Tensor:
    """The images of testA, (N, 3, 32, 32) float32 in [-1, 1], in the order `evaluate_digits` expects.

    Raises:
        UserError: If `data_root` is not a digits-photos set.
    """
    recipe_for(data_root)
    return _load_split(data_root, "test", "A", read_labels(data_root))[0]


def evaluate_digits(
    translated: Tensor,
    data_root: Path | str,
    *,
    without_nce: Tensor | None = None,
    evaluator: Evaluator | None = None,
    cache: Path | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates a run on a digits-photos set, with the rows that give its numbers a meaning.

    Beside the translated test images stand: those of a run without the contrastive loss, the
    untranslated ones, the test images of B against as many training images of B (the least FID to
    hope for), and the same digits composited with new crops of the photograph (what a perfect
    translation would be). The reference is testB; the evaluator has seen neither testA's nor
    testB's digits.

    Args:
        translated: (N, 3, 32, 32) in [-1, 1], `digits_to_translate(data_root)` translated.
        data_root: Folder of the set.
        without_nce: The same from a run with the contrastive loss off.
        evaluator: What judges; by default the set's own, trained once and cached.
        cache: Folder for that one; see `load_evaluator`.
        progress: Shows a bar if the evaluator has to be trained first.

    Returns:
        As `evaluate`, with "data" (the set's recipe) and "reference" added.

    Raises:
        ValueError: If the shape of the translated images is another one.
        UserError: If `data_root` is not a digits-photos set.
    """
    recipe = recipe_for(data_root)
    labels = read_labels(data_root)
    a, digits_a = _load_split(data_root, "test", "A", labels)
    b, digits_b = _load_split(data_root, "test", "B", labels)
    more_b, _ = _load_split(data_root, "train", "B", labels)
    for name, images in (("translated", translated), ("without_nce", without_nce)):
        if images is not None and images.shape != a.shape:
            raise ValueError(
                f"evaluate_digits: {name}: expected {tuple(a.shape)}, the images of testA, "
                f"got {tuple(images.shape)}. Translate all of testA at its own size."
            )
    if evaluator is None:
        evaluator = load_evaluator(recipe, cache=cache, progress=progress)
    rows: dict[str, Row | str] = {
        TRANSLATED: Row(translated, digits_a),
        WITHOUT_NCE: WITHOUT_NCE_NOTE if without_nce is None else Row(without_nce, digits_a),
        UNTRANSLATED: Row(a, digits_a),
        HALVES: Row(b, digits_b, reference=more_b),
        IDEAL: Row(_ideal(labels), digits_a),
    }
    result = evaluate(rows, b, evaluator, baseline=UNTRANSLATED)
    return {"data": labels["recipe"], "reference": "testB"} | result


def compare_folders(
    folder: Path | str, reference: Path | str, extractor: nn.Module, *, channels: int = 3
) -> Distance:
    """FID and KID between two folders of images, for any data and any extractor.

    Args:
        folder: Images to judge, all of one size.
        reference: Images of the target domain, all of one size.
        extractor: A module from (N, C, H, W) float32 in [-1, 1] to features (N, F); it resizes by
            itself if it has to. Its `name` is recorded.
        channels: 3 for RGB, 1 for greyscale.

    Raises:
        UserError: If a folder is missing or empty, or its images differ in size.
    """
    return compare_images(
        _load_folder(folder, channels), _load_folder(reference, channels), extractor
    )


def format_table(result: Mapping[str, Any]) -> str:
    """The rows of `evaluate` as a Markdown table that also reads well as text."""
    lines = [("images", "content accuracy", "FID", "FID, share of untranslated", "KID")]
    notes = []
    # KID's scale is the extractor's: around 0.1 for some, thousands for others.
    kid_decimals = 1 if any((row.get("kid") or 0) >= 10 for row in result["rows"]) else 4
    for row in result["rows"]:
        if "note" in row:
            notes.append(f"{row['name']}: {row['note']}.")
            lines.append((row["name"], "-", "-", "-", "-"))
            continue
        if row["fid"] is None:
            notes.append(f"{row['name']}: its images hold values that are not finite.")
        kid = "-"
        if row["kid"] is not None:
            kid = f"{row['kid']:.{kid_decimals}f} +- {row['kid_std']:.{kid_decimals}f}"
        lines.append(
            (
                row["name"],
                f"{row['content_accuracy']:.3f}",
                format_number(row["fid"], ".2f"),
                format_number(row["fid_share"], ".4f"),
                kid,
            )
        )
    foot = f"{result['count']} images in each row. Features: {result['extractor']}."
    return markdown_table(lines, [foot, *notes])


def write_report(result: Mapping[str, Any], folder: Path | str) -> list[Path]:
    """Writes `metrics.json` and `metrics.md` into a folder, atomically; returns their paths."""
    return write_result(result, format_table(result), folder)


def _load_split(
    root: Path | str, split: str, domain: str, labels: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    folder = split_folder(root, split, domain)
    paths = list_images(folder)
    names = [f"{folder.name}/{path.relative_to(folder).as_posix()}" for path in paths]
    for name in names:
        if name not in labels["images"]:
            raise UserError(
                f"{root}: {name} is not in labels.json: files were added since the set was "
                "written. Remove them, or write the set again into another folder."
            )
    digits = torch.tensor([labels["images"][name]["digit"] for name in names])
    return torch.stack([load_image(path) for path in paths]), digits


def _load_folder(folder: Path | str, channels: int) -> Tensor:
    paths = list_images(folder)
    images = [load_image(path, channels) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            sizes = [f"{x.shape[2]}x{x.shape[1]}" for x in (image, images[0])]
            raise UserError(
                f"{path}: is {sizes[0]}, but {paths[0]} is {sizes[1]}, and the images compared "
                "need one size. Resize them first."
            )
    return torch.stack(images)


def _ideal(labels: Mapping[str, Any]) -> Tensor:
    """A perfect translation of testA: its digits, on new crops of the photograph."""
    names = sorted(name for name in labels["images"] if name.startswith("testA/"))
    strokes = load_digits()[0][[labels["images"][name]["source"] for name in names]]
    photo = load_background(labels["recipe"]["photo"])
    rng = counter_rng(labels["recipe"]["seed"], _IDEAL_STREAM, 0)
    return to_batch(composite(strokes, random_crops(photo, len(strokes), rng)))
