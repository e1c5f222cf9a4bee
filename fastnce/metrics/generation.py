"""How good generated images are, from the class probabilities and features of a judge."""

import math

import torch
from torch import Tensor

from fastnce.metrics.distribution import frechet_distance


def inception_score(probabilities: Tensor, splits: int = 1) -> tuple[float, float]:
    """Inception score: high when each image shows one class clearly, and all classes are shown.

        exp(mean_x KL(p(y|x) || p(y))),  p(y) = mean_x p(y|x)

    (Salimans et al., 2016). It lies between 1 and the number of classes, and never looks at real
    images.

    Args:
        probabilities: (N, K), the judge's class probabilities of each image.
        splits: Parts to compute it on. Image i goes to part i mod `splits`, so that images in the
            order of their classes make parts with all classes.

    Returns:
        Mean over the parts and the standard deviation, 0 for one part; NaN, NaN if a probability
        is not finite.

    Raises:
        ValueError: If there are fewer images than parts, or the rows are no probabilities.

    Example:
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

    A generator whose classes are all there under each other's labels has a low class accuracy and
    a high relabelled one; where labels say nothing about the image both are low. From labels by
    chance the best renaming still gets somewhat above 1 / K.

    Args:
        probabilities: (N, K). A row that is not finite counts as misread.
        labels: (N,) int64, the classes asked for.

    Raises:
        ValueError: As `class_accuracy`.
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

    It tells what FID cannot: whether the labels are bound to the images. As each class has few
    images, the values are higher than the FID of all; compare those of equal counts only.

    Args:
        features: (N, F), of the images to judge.
        labels: (N,) int64, the classes asked for.
        reference: (M, F), of the real images.
        reference_labels: (M,) int64.

    Returns:
        The mean over the classes, and the distance of each class; NaN where a feature is not finite.

    Raises:
        ValueError: If the shapes do not fit, or a class has fewer than two images in one of the sets.
    """
    for name, x, y in (
        ("labels", features, labels),
        ("reference_labels", reference, reference_labels),
    ):
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

    The ratio of the traces of the two covariances, which are half the mean squared distances
    between two images of a set. Of the images of one class it falls when that class collapses,
    which the ratio of all images hides.

    Args:
        features: (N, F), of generated images.
        reference: (M, F), of real ones.

    Returns:
        The ratio; NaN if a feature is not finite.

    Raises:
        ValueError: If the shapes do not fit, a set has fewer than two images, or all real images
            have the same features.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> spread_ratio(x / 2, x)
        0.25
    """
    if (
        features.ndim != 2
        or features.shape[1:] != reference.shape[1:]
        or min(len(features), len(reference)) < 2
    ):
        raise ValueError(
            "spread_ratio: expected features (N, F) and (M, F) of at least two images each, "
            f"got {tuple(features.shape)} and {tuple(reference.shape)}."
        )
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
