"""How good the images of conditional generators are, by a judge's class probabilities and features."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from fastnce.metrics.distribution import (
    check_comparable,
    extractor_name,
    frechet_distance,
    precision_recall_density_coverage,
    saved_features,
)
from fastnce.metrics.tables import NEIGHBOURHOOD_COLUMNS, finite_or_none, measured, rows_table

GENERATED = "generated"
HELD_OUT = "other real images"
UNTRAINED = "untrained generator"

# From labels (N,) int64 to images (N, C, H, W) in [-1, 1].
Sample = Callable[[Tensor], Tensor]

_COLUMNS = {
    "fid": ("FID", ".2f"),
    "intra_class_fid": ("intra-class FID", ".2f"),
    "inception_score": ("IS", ".2f"),
    **NEIGHBOURHOOD_COLUMNS,
    "class_accuracy": ("class accuracy", ".3f"),
    "relabelled_accuracy": ("relabelled", ".3f"),
}


def inception_score(probabilities: Tensor, splits: int = 1) -> tuple[float, float]:
    """Inception score: high when each image shows one class clearly, and all classes are shown.

        exp(mean_x KL(p(y|x) || p(y))),  p(y) = mean_x p(y|x)

    (Salimans et al., 2016). It lies between 1 and the number of classes, and never looks at real images.

    Args:
        probabilities: (N, K), the judge's class probabilities of each image.
        splits: Parts to compute it on. Image i goes to part i mod `splits`, so that images in the order of their classes make
            parts with all classes.

    Returns:
        Mean over the parts and the standard deviation, 0 for one part; NaN, NaN if a probability is not finite.

    Raises:
        ValueError: If there are fewer images than parts, or the rows are no probabilities.

    Examples:
        >>> inception_score(torch.eye(4))  # four images, each surely of another class
        (4.0, 0.0)
    """
    _check_probabilities("inception_score", probabilities)
    if not 1 <= splits <= len(probabilities):
        raise ValueError(
            f"inception_score: splits={splits}: expected 1 to {len(probabilities)}, the number of "
            "images. Use fewer splits."
        )
    if not probabilities.isfinite().all():
        return math.nan, math.nan
    scores = []
    for part in (probabilities.double()[start::splits] for start in range(splits)):
        # KL summed over classes is entropy of the mean less mean of the entropies.
        divergence = torch.special.entr(part.mean(0)).sum() - torch.special.entr(part).sum(1).mean()
        scores.append(divergence.exp())
    score = torch.stack(scores)
    return score.mean().item(), score.std(correction=0).item()


def class_accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """The share of images that the judge reads as the class that was asked for.

    Args:
        probabilities: (N, K). A row that is not finite counts as misread.
        labels: (N,) int64, the classes asked for.

    Raises:
        ValueError: If the shapes do not fit, there is no image, or a label is not below K.
    """
    return (_read("class_accuracy", probabilities, labels) == labels.cpu()).double().mean().item()


def relabelled_accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """`class_accuracy` after the one-to-one renaming of the classes that makes it highest.

    A generator whose classes are all there under each other's labels has a low class accuracy and a high relabelled one; where
    labels say nothing about the image both are low. From labels by chance the best renaming still gets somewhat above 1 / K.
    Arguments and errors are those of `class_accuracy`.
    """
    from scipy.optimize import linear_sum_assignment

    read, classes = _read("relabelled_accuracy", probabilities, labels), probabilities.shape[1]
    known = read >= 0
    pairs = torch.bincount(labels.cpu()[known] * classes + read[known], minlength=classes**2)
    counts = pairs.view(classes, classes)  # asked for, read
    asked, shown = linear_sum_assignment(counts.numpy(), maximize=True)
    return counts[asked, shown].sum().item() / len(labels)


def intra_class_fid(
    features: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor
) -> tuple[float, dict[int, float]]:
    """FID of each class's images to the real images of that class, and their mean.

    It tells what FID cannot: whether the labels are bound to the images. As each class has few images, the values are higher
    than the FID of all; compare those of equal counts only.

    Args:
        features, labels: (N, F) and (N,) int64, of the images to judge and the classes asked for.
        reference, reference_labels: (M, F) and (M,) int64, of the real images.

    Returns:
        The mean over the classes, and the distance of each class; NaN where a feature is not finite.

    Raises:
        ValueError: If the shapes do not fit, or a class has fewer than two images in one of the sets.
    """
    given = {"labels": (features, labels), "reference_labels": (reference, reference_labels)}
    for name, (x, y) in given.items():
        if y.shape != x.shape[:1]:
            raise ValueError(
                f"intra_class_fid: {name}: expected ({len(x)},), one for each of the features, "
                f"got {tuple(y.shape)}."
            )
    distances = {}
    for number in torch.cat([labels.cpu(), reference_labels.cpu()]).unique().tolist():
        own, real = features[labels == number], reference[reference_labels == number]
        if min(len(own), len(real)) < 2:
            raise ValueError(
                f"intra_class_fid: class {number} has {len(own)} images to judge and {len(real)} "
                "real ones, and the distance needs two of each. Sample every class, or leave out "
                "this one."
            )
        distances[number] = frechet_distance(own, real)
    return sum(distances.values()) / len(distances), distances


def spread_ratio(features: Tensor, reference: Tensor) -> float:
    """How varied generated images are against real ones: 0 when all are the same, 1 when as varied.

    The ratio of the traces of the two covariances, which are half the mean squared distances between two images of a set; NaN if
    a feature is not finite. Of the images of one class it falls when that class collapses, which the ratio of all images hides.

    Args:
        features, reference: (N, F) of generated images and (M, F) of real ones.

    Raises:
        ValueError: If the shapes do not fit, a set has fewer than two images, or all real images have the same features.

    Examples:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> spread_ratio(x / 2, x)
        0.25
    """
    check_comparable("spread_ratio", features, reference)
    own, real = (x.double().var(0).sum().item() for x in (features, reference))
    if not (math.isfinite(own) and math.isfinite(real)):
        return math.nan
    if real == 0:
        raise ValueError(
            "spread_ratio: reference: all images have the same features, and nothing can be "
            "compared with that. Give other images or another extractor."
        )
    return own / real


def _check_probabilities(function: str, probabilities: Tensor) -> None:
    fix = "Give (N, K) class probabilities, for instance logits.softmax(1)."
    if probabilities.ndim != 2 or 0 in probabilities.shape:
        raise ValueError(
            f"{function}: probabilities: expected (N, K) of at least one image, "
            f"got {tuple(probabilities.shape)}. {fix}"
        )
    sums = probabilities.double().sum(1)
    wrong = probabilities.isfinite().all(1) & (
        (probabilities < 0).any(1) | ((sums - 1).abs() > 1e-3)
    )
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{function}: probabilities: expected rows of values from 0 that sum to 1, got one "
            f"(row {row}) with minimum {probabilities[row].min():.3g} and sum {sums[row]:.3g}. {fix}"
        )


def _read(function: str, probabilities: Tensor, labels: Tensor) -> Tensor:
    """The most likely class of each image, -1 where a probability is not finite."""
    _check_probabilities(function, probabilities)
    count, classes = probabilities.shape
    if labels.shape != (count,):
        raise ValueError(
            f"{function}: labels: expected ({count},), one for each image, "
            f"got {tuple(labels.shape)}."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{function}: labels: expected classes from 0 to {classes - 1}, those of the "
            f"probabilities, got {labels.min()} to {labels.max()}. Use a judge of these classes."
        )
    known = probabilities.isfinite().all(1)
    return probabilities.argmax(1).where(known, -1).cpu()


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
        sample: The generator.
        untrained: The generator before its training: the worst.
        real_images, real_labels, evaluator, held_out, settings: As of `evaluate_generators`.

    Returns:
        As `evaluate_generators`, with the rows "other real images", "generated" and "untrained generator".
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

    Each generator is asked for the labels of the reference, so that every row has the same number of images of every class; FID
    depends on both. With `held_out` the reference is cut, class by class, to the number that both sets have. Images are
    quantised to 8 bits as files are, and only a batch of the generated ones is kept at a time.

    Args:
        samples: By name, functions from labels (B,) int64 on the CPU to images (B, C, H, W) in [-1, 1].
        real_images: (N, C, H, W), float in [-1, 1] or uint8, the reference.
        real_labels: (N,) int64, its classes.
        evaluator: A module from images to features (N, F). If it has a method `class_probabilities` from images to (N, K), there
            is an Inception score; if besides its `reads_labels` is true, so that its classes are those of the labels, class
            accuracies. Its `name` is recorded.
        held_out: Images and labels of a row of real images: the best to hope for.
        k: Neighbours of precision, recall, density and coverage.
        splits: Parts of the Inception score.
        batch_size: Images generated and judged at a time.

    Returns:
        {"extractor", "count", "k", "splits", "rows": [{"name", "fid", "intra_class_fid",
        "intra_class_fid_of": {class: value}, "inception_score", "inception_score_std", "precision",
        "recall", "density", "coverage", "class_accuracy", "relabelled_accuracy"}, ...]}. None where the evaluator does not give
        it, and for all but the accuracies if an image of the row is not finite; such an image counts as misread. Classes with
        one image are left out of the intra-class FID, and k is at most the number of images less one.

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
    reference, _ = _judge(evaluator, real_images.split(batch_size))
    how = {"k": k, "splits": splits}
    reads = getattr(evaluator, "reads_labels", False)
    batches = {HELD_OUT: (held_out_images.split(batch_size), labels)} if held_out else {}
    for name, sample in samples.items():
        images = _generate(name, sample, asked.split(batch_size), real_images.shape[1:])
        batches[name] = images, asked
    rows = [
        {"name": name}
        | _measure(*_judge(evaluator, images), shown, reference, labels, **how, reads_labels=reads)
        for name, (images, shown) in batches.items()
    ]
    return {
        "extractor": extractor_name(evaluator),
        "count": len(labels),
        **how,
        "rows": rows,
    }


def format_generation_table(result: Mapping[str, Any]) -> str:
    """The rows of `evaluate_generators` as a Markdown table that also reads well as text."""
    rows = result["rows"]
    classes = any(row["intra_class_fid"] is not None for row in rows)
    same = ", the same of each class" if classes else ""
    notes = [f"{result['count']} images in each row{same}. Features: {result['extractor']}."]
    if any(row["relabelled_accuracy"] is not None for row in rows):
        notes.append(
            "Relabelled: class accuracy after the renaming of the classes that makes it highest."
        )
    for row in rows:
        if row["fid"] is None:
            notes.append(f"{row['name']}: its images hold values that are not finite.")
    return rows_table(rows, measured(_COLUMNS, rows), notes)


def _judge(evaluator: nn.Module, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Features (N, F) and probabilities (N, K) of images (B, C, H, W) as they are when saved; NaN where those are not finite."""
    function = getattr(evaluator, "class_probabilities", lambda images: None)
    features, probabilities = [], []
    for batch in batches:
        images, broken, own = saved_features(batch, evaluator)
        features.append(own)
        given = function(images)
        if given is not None:
            probabilities.append(given.double().cpu().masked_fill(broken[:, None], math.nan))
    return torch.cat(features), torch.cat(probabilities) if probabilities else None


def _measure(
    features: Tensor,
    probabilities: Tensor | None,
    labels: Tensor,
    reference: Tensor,
    reference_labels: Tensor,
    *,
    k: int,
    splits: int,
    reads_labels: bool,
) -> dict[str, Any]:
    intra, intra_of = math.nan, {}
    # A class's distance needs two images; the rows have as many of each class as the reference.
    known = reference_labels.bincount() > 1
    several = len(known) > 1  # a single class has the FID of all, and nothing to tell apart
    if several and known.any():
        own, real = known[labels], known[reference_labels]
        intra, intra_of = intra_class_fid(
            features[own], labels[own], reference[real], reference_labels[real]
        )
    score = score_std = accuracy = relabelled = math.nan
    if probabilities is not None:
        score, score_std = inception_score(probabilities, splits)
        if several and reads_labels:
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
