"""The evaluation of translated digits: do they still show the same digits, and do they look like the other domain?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastnce.data.folders import list_images, split_folder
from fastnce.data.images import load_image
from fastnce.data.stream import counter_rng
from fastnce.demo.judges import Evaluator, load_evaluator, recipe_for, to_batch
from fastnce.demo.sets import (
    composite,
    kind_of,
    load_digits,
    noisy_digit,
    random_crops,
    read_labels,
    scaled_photo,
)
from fastnce.errors import UserError
from fastnce.metrics.image_sets import (
    BEST,
    TRANSLATED,
    WITHOUT_NCE,
    Row,
    evaluate,
    halves_name,
    untranslated_name,
)

IDEAL = "ideal: the same digits composited"
IDEAL_PLAIN = "ideal: the same digits plain"

WITHOUT_NCE_NOTE = (
    "not measured; train with the same settings and --lambda-nce 0, then evaluate again with "
    "--without-nce and that run's folder"
)

_IDEAL_STREAM = 30


def is_digits_photos(data_root: Path | str | Mapping[str, Path]) -> bool:
    """Whether a folder is a set that `fastnce data digits-photos` wrote; folders by name are not."""
    return kind_of(data_root) == "digits-photos"


def digits_to_translate(data_root: Path | str, direction: str = "AtoB") -> Tensor:
    """The test images of the domain that is translated, in the order `evaluate_digits` expects.

    Args:
        data_root: Folder of the set.
        direction: "AtoB": the images of testA; "BtoA": those of testB.

    Returns:
        (N, 3, 32, 32) float32 in [-1, 1].

    Raises:
        UserError: If `data_root` is not a digits-photos set.
    """
    recipe_for(data_root)
    return _load_split(data_root, "test", direction[0], read_labels(data_root))[0]


def evaluate_digits(
    translated: Tensor,
    data_root: Path | str,
    *,
    best: Tensor | None = None,
    without_nce: Tensor | None = None,
    direction: str = "AtoB",
    baselines: bool = True,
    extractor: nn.Module | None = None,
    evaluator: Evaluator | None = None,
    cache: Path | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates a run on a digits-photos set, with the rows that give its numbers a meaning.

    Beside the translated test images stand those of a run without the contrastive loss, the untranslated ones, and the test
    images of the target domain against as many of its training images: the least FID to hope for. Last comes a perfect
    translation: the same digits composited with new crops of the photograph (or, from B to A, without one). The reference is
    the target domain's test images; the evaluator has seen no test digit. All rows use the same number of images, the smallest
    there is, because FID depends on it.

    Args:
        translated: (N, 3, 32, 32) in [-1, 1], `digits_to_translate(data_root, direction)` translated.
        data_root: Folder of the set.
        best: The same from the run's best checkpoint.
        without_nce: The same from a run with the contrastive loss off.
        direction: "AtoB" or "BtoA".
        baselines: Judge the other rows too; without them there is no `fid_share`.
        extractor: The source of the features; by default the evaluator.
        evaluator: Reads the digits; by default the set's own, trained once and cached.
        cache: Folder for that one; see `load_evaluator`.
        progress: Shows a bar if the evaluator has to be trained first.

    Returns:
        As `fastnce.metrics.evaluate`, with "data" (the set's recipe) and "reference" added.

    Raises:
        ValueError: If the shape of the translated images is another one.
        UserError: If `data_root` is not a digits-photos set.
    """
    recipe = recipe_for(data_root)
    labels = read_labels(data_root)
    source, target = direction[0], direction[-1]
    plain, digits = _load_split(data_root, "test", source, labels)
    real, real_digits = _load_split(data_root, "test", target, labels)
    more_real, _ = _load_split(data_root, "train", target, labels)
    given = {"translated": translated, "best": best, "without_nce": without_nce}
    for name, images in given.items():
        if images is not None and images.shape != plain.shape:
            raise ValueError(
                f"evaluate_digits: {name}: expected {tuple(plain.shape)}, the images of test{source}, "
                f"got {tuple(images.shape)}. Translate all of test{source} at its own size."
            )
    if evaluator is None:
        evaluator = load_evaluator(recipe, cache=cache, progress=progress)
    rows: dict[str, Row | str] = {TRANSLATED: Row(translated, digits)}
    if best is not None:
        rows[BEST] = Row(best, digits)
    if without_nce is not None:
        rows[WITHOUT_NCE] = Row(without_nce, digits)
    if baselines:
        rows.setdefault(WITHOUT_NCE, WITHOUT_NCE_NOTE)
        rows |= {
            untranslated_name(source): Row(plain, digits),
            halves_name(target): Row(real, real_digits, reference=more_real),
            IDEAL if target == "B" else IDEAL_PLAIN: Row(_ideal(labels, source, target), digits),
        }
    result = evaluate(
        rows,
        real,
        extractor or evaluator,
        reader=evaluator,
        baseline=untranslated_name(source),
        count=min(len(plain), len(real), len(more_real)),
    )
    return {"data": labels["recipe"], "reference": f"test{target}"} | result


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


def _ideal(labels: Mapping[str, Any], source: str, target: str) -> Tensor:
    """A perfect translation of a domain's test images: their digits, on new crops of the photographs or plain."""
    names = sorted(name for name in labels["images"] if name.startswith(f"test{source}/"))
    strokes = load_digits()[0][[labels["images"][name]["source"] for name in names]]
    rng = counter_rng(labels["recipe"]["seed"], _IDEAL_STREAM, 0)
    if target == "A":
        return to_batch(noisy_digit(strokes, rng))
    photos = labels["recipe"]["photo"]
    if isinstance(photos, str):
        crops = random_crops(scaled_photo(photos), len(strokes), rng)
    else:
        backgrounds = [scaled_photo(photo) for photo in photos]
        drawn = rng.integers(len(photos), size=len(strokes)).tolist()
        crops = np.concatenate([random_crops(backgrounds[photo], 1, rng) for photo in drawn])
    return to_batch(composite(strokes, crops))
