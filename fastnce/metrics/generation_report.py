"""The evaluation of conditional generators: their numbers beside the best and the worst to expect."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnce.metrics.distribution import (
    as_saved,
    extract_features,
    extractor_name,
    frechet_distance,
)
from fastnce.metrics.generation import (
    class_accuracy,
    inception_score,
    intra_class_fid,
    relabelled_accuracy,
)
from fastnce.metrics.neighbours import precision_recall_density_coverage
from fastnce.metrics.tables import finite_or_none, format_number, markdown_table

GENERATED = "generated"
HELD_OUT = "other real images"
UNTRAINED = "untrained generator"

# From labels (N,) int64 to images (N, C, H, W) in [-1, 1].
Sample = Callable[[Tensor], Tensor]

_COLUMNS = {
    "fid": ("FID", ".2f"),
    "intra_class_fid": ("intra-class FID", ".2f"),
    "inception_score": ("IS", ".2f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "density": ("density", ".3f"),
    "coverage": ("coverage", ".3f"),
    "class_accuracy": ("class accuracy", ".3f"),
    "relabelled_accuracy": ("relabelled", ".3f"),
}


def evaluate_generation(
    sample: Sample,
    real_images: Tensor,
    real_labels: Tensor,
    evaluator: nn.Module,
    *,
    held_out: tuple[Tensor, Tensor] | None = None,
    untrained: Sample | None = None,
    **settings: int,
) -> dict[str, Any]:
    """Evaluates one generator, beside other real images and an untrained generator if given.

    Args:
        sample: The generator; see `evaluate_generators`.
        real_images: (N, C, H, W), float in [-1, 1] or uint8, the reference.
        real_labels: (N,) int64.
        evaluator: What judges; see `evaluate_generators`.
        held_out: Other real images and their labels: the best that a generator can hope for.
        untrained: The generator before its training: the worst.
        settings: As `evaluate_generators`.

    Returns:
        As `evaluate_generators`, with the rows "other real images", "generated" and "untrained
        generator".
    """
    samples = {GENERATED: sample} | ({UNTRAINED: untrained} if untrained else {})
    return evaluate_generators(
        samples, real_images, real_labels, evaluator, held_out=held_out, **settings
    )


@torch.no_grad()
def evaluate_generators(
    samples: Mapping[str, Sample],
    real_images: Tensor,
    real_labels: Tensor,
    evaluator: nn.Module,
    *,
    held_out: tuple[Tensor, Tensor] | None = None,
    k: int = 5,
    splits: int = 1,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Fidelity, diversity and label binding of several conditional generators against one reference.

    Each generator is asked for the labels of the reference, so that every row has the same number
    of images of every class; FID depends on both. With `held_out` the reference is cut, class by
    class, to the number that both sets have. Images are quantised to 8 bits as files are, and only
    a batch of the generated ones is kept at a time.

    Args:
        samples: By name, functions from labels (B,) int64 on the CPU to images (B, C, H, W) in [-1, 1].
        real_images: (N, C, H, W), float in [-1, 1] or uint8, the reference.
        real_labels: (N,) int64, its classes.
        evaluator: A module from images to features (N, F). If it has a method
            `class_probabilities` from images to (N, K), there is an Inception score; if besides its
            `reads_labels` is true, so that its classes are those of the labels, class accuracies.
            Its `name` is recorded.
        held_out: Images and labels of a row of real images: the best to hope for.
        k: Neighbours of precision, recall, density and coverage.
        splits: Parts of the Inception score.
        batch_size: Images generated and judged at a time.

    Returns:
        {"extractor", "count", "k", "splits", "rows": [{"name", "fid", "intra_class_fid",
        "intra_class_fid_of": {class: value}, "inception_score", "inception_score_std", "precision",
        "recall", "density", "coverage", "class_accuracy", "relabelled_accuracy"}, ...]}. None where
        the evaluator does not give it, and for all but the accuracies if an image of the row is not
        finite; such an image counts as misread. Classes with one image are left out of the
        intra-class FID, and k is at most the number of images less one.

    Raises:
        ValueError: If shapes or counts do not fit: among others if there are fewer than two images.
    """
    _check_labelled("real", real_images, real_labels)
    if not real_images.isfinite().all():
        raise ValueError("evaluate_generators: real_images hold values that are not finite.")
    labels = real_labels.cpu()
    if held_out is not None:
        _check_labelled("held_out", *held_out)
        own, other = _equal_counts(labels, held_out[1].cpu())
        real_images, labels = real_images[own], labels[own]
        held_out_images = held_out[0][other]
    # Files come class by class; a generator with batch statistics needs batches of all classes.
    asked = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    k = max(1, min(k, len(labels) - 1))
    reference = _judge(evaluator, real_images.split(batch_size)).features
    batches = {HELD_OUT: (held_out_images.split(batch_size), labels)} if held_out else {}
    for name, sample in samples.items():
        images = _generate(name, sample, asked.split(batch_size), real_images.shape[1:])
        batches[name] = images, asked
    rows = [
        {"name": name} | _measure(_judge(evaluator, images), shown, reference, labels, k, splits)
        for name, (images, shown) in batches.items()
    ]
    return {
        "extractor": extractor_name(evaluator),
        "count": len(labels),
        "k": k,
        "splits": splits,
        "rows": rows,
    }


def format_generation_table(result: Mapping[str, Any]) -> str:
    """The rows of `evaluate_generators` as a Markdown table that also reads well as text."""
    columns = {
        key: column
        for key, column in _COLUMNS.items()
        if any(row[key] is not None for row in result["rows"])
    }
    lines = [("images", *(title for title, _ in columns.values()))]
    notes = [
        f"{result['count']} images in each row, the same of each class. Features: {result['extractor']}."
    ]
    if "relabelled_accuracy" in columns:
        notes.append(
            "Relabelled: class accuracy after the renaming of the classes that makes it highest."
        )
    for row in result["rows"]:
        cells = (format_number(row[key], form) for key, (_, form) in columns.items())
        lines.append((row["name"], *cells))
        if row["fid"] is None:
            notes.append(f"{row['name']}: its images hold values that are not finite.")
    return markdown_table(lines, notes)


class _Judged(NamedTuple):
    """What the evaluator says of the images of a row; NaN for those that are not finite."""

    features: Tensor
    """(N, F) float64 on the CPU."""
    probabilities: Tensor | None
    """(N, K) float64 on the CPU."""
    reads_labels: bool


def _judge(evaluator: nn.Module, batches: Iterable[Tensor]) -> _Judged:
    """Judges batches of images (B, C, H, W) as they are when saved."""
    function = getattr(evaluator, "class_probabilities", lambda images: None)
    features, probabilities = [], []
    for batch in batches:
        images = as_saved(batch)
        broken = ~images.isfinite().flatten(1).all(1, keepdim=True)
        images = images.nan_to_num()  # an extractor may not let NaN through
        features.append(extract_features(images, evaluator).masked_fill(broken, math.nan))
        given = function(images)
        if given is not None:
            probabilities.append(given.double().cpu().masked_fill(broken, math.nan))
    return _Judged(
        torch.cat(features),
        torch.cat(probabilities) if probabilities else None,
        getattr(evaluator, "reads_labels", False),
    )


def _measure(
    judged: _Judged,
    labels: Tensor,
    reference: Tensor,
    reference_labels: Tensor,
    k: int,
    splits: int,
) -> dict[str, Any]:
    features, probabilities = judged.features, judged.probabilities
    intra, intra_of = math.nan, {}
    # A class's distance needs two images; the rows have as many of each class as the reference.
    known = reference_labels.bincount() > 1
    if known.any():
        own, real = known[labels], known[reference_labels]
        intra, intra_of = intra_class_fid(
            features[own], labels[own], reference[real], reference_labels[real]
        )
    score, score_std = math.nan, math.nan
    accuracy = relabelled = math.nan
    if probabilities is not None:
        score, score_std = inception_score(probabilities, splits)
        if judged.reads_labels:
            accuracy = class_accuracy(probabilities, labels)
            relabelled = relabelled_accuracy(probabilities, labels)
    numbers = {
        "fid": frechet_distance(features, reference),
        "intra_class_fid": intra,
        "inception_score": score,
        "inception_score_std": score_std,
        **asdict(precision_recall_density_coverage(reference, features, k)),
        "class_accuracy": accuracy,
        "relabelled_accuracy": relabelled,
    }
    return {
        **{key: finite_or_none(value) for key, value in numbers.items()},
        "intra_class_fid_of": {str(key): finite_or_none(value) for key, value in intra_of.items()},
    }


def _generate(
    name: str, sample: Sample, batches: Iterable[Tensor], shape: torch.Size
) -> Iterator[Tensor]:
    for labels in batches:
        images = sample(labels)
        if images.shape != (len(labels), *shape):
            raise ValueError(
                f"evaluate_generators: {name}: expected images {(len(labels), *shape)} for "
                f"{len(labels)} labels, as the real ones are, got {tuple(images.shape)}."
            )
        yield images


def _check_labelled(name: str, images: Tensor, labels: Tensor) -> None:
    if images.ndim != 4 or len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"evaluate_generators: {name}: expected images (N, C, H, W) and labels (N,), at least "
            f"one, got {tuple(images.shape)} and {tuple(labels.shape)}."
        )


def _equal_counts(labels: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Which of two sets to take so that both have the same classes in the same order."""
    own, other = [], []
    for number in torch.cat([labels, others]).unique():
        pair = [(x == number).nonzero().flatten() for x in (labels, others)]
        count = min(map(len, pair))
        if count == 0:
            raise ValueError(
                f"evaluate_generators: class {int(number)} is missing from "
                f"{'real_labels' if len(pair[0]) == 0 else 'the labels of held_out'}. "
                "Give images of the same classes in both, or leave out held_out."
            )
        own.append(pair[0][:count])
        other.append(pair[1][:count])
    return torch.cat(own), torch.cat(other)
