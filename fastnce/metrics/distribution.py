"""How far two sets of images are apart, over any feature extractor: FID, KID, precision, recall, density and coverage."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastnce.data.folders import list_images
from fastnce.data.images import SIGNED_UNIT, load_image, to_uint8
from fastnce.errors import UserError

KID_SUBSETS = 100
KID_SUBSET_SIZE = 100

# Entries of a block of distances: 128 MiB of float64.
_BLOCK_ENTRIES = 2**24


@dataclass(frozen=True)
class Distance:
    """FID and KID between two sets of images; NaN if an image or a feature is not finite."""

    fid: float
    """Frechet distance of the Gaussians fitted to the features."""
    kid: float
    """Squared maximum mean discrepancy, polynomial kernel of degree 3, mean over random subsets."""
    kid_std: float
    """Its standard deviation over the subsets."""
    counts: tuple[int, int]
    """Images in each set."""
    kid_subset_size: int
    """Images in each of KID's subsets: 100, or all if there are fewer."""
    extractor: str
    """Name of the feature extractor; values of different extractors cannot be compared."""


@dataclass(frozen=True)
class PrecisionRecall:
    """Fidelity and diversity of generated images; all NaN if a feature is not finite."""

    precision: float
    """Share of the fake images inside the real ones' region."""
    recall: float
    """Share of the real images inside the fake ones' region."""
    density: float
    """In how many real neighbourhoods a fake image lies, over k: about 1 for the real distribution, not limited to 1."""
    coverage: float
    """Share of the real images that have a fake one in their neighbourhood."""


@torch.inference_mode()
def extract_features(images: Tensor, extractor: nn.Module, batch_size: int = 256) -> Tensor:
    """The extractor's features of all images.

    Args:
        images: (N, C, H, W) float32 in [-1, 1].
        extractor: A module from such images to features (N, F), in eval mode.
        batch_size: Images at a time.

    Returns:
        (N, F) float64 on the CPU.

    Raises:
        ValueError: If the extractor gives another shape.
    """
    features = torch.cat([extractor(part).double().cpu() for part in images.split(batch_size)])
    if features.ndim != 2 or len(features) != len(images):
        raise ValueError(
            f"extractor: expected features (N, F) for {len(images)} images, "
            f"got {tuple(features.shape)}. Pool and flatten them in the extractor."
        )
    return features


def saved_features(images: Tensor, extractor: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Images `as_saved` (0 where not finite: an extractor may not let NaN through), which are broken (N,), and their features.

    Features are (N, F) float64 on the CPU, NaN for a broken image.
    """
    levels = as_saved(images)
    broken = ~levels.isfinite().flatten(1).all(1)
    levels = levels.nan_to_num()
    features = extract_features(levels, extractor).masked_fill(broken[:, None], math.nan)
    return levels, broken, features


def as_saved(images: Tensor) -> Tensor:
    """Images as they are after saving and loading, so that the numbers are those of the files.

    Of any shape, float in [-1, 1], quantised as `save_image` does, or uint8; to float32 in [-1, 1] on the CPU, NaN where a value
    is not finite.
    """
    images = images.detach().cpu()
    levels = images if images.dtype == torch.uint8 else to_uint8(images.nan_to_num())
    return torch.from_numpy(SIGNED_UNIT)[levels.long()].masked_fill(~images.isfinite(), math.nan)


def distance(
    features: Tensor, reference: Tensor, *, extractor: str = "given features", seed: int = 0
) -> Distance:
    """FID and KID between two sets of features.

    FID as `frechet_distance`, KID as in Binkowski et al., 2018, through torchmetrics; in float64. The FID of few images is too
    large, and the more so the fewer they are: compare values from equal numbers of images only.

    Args:
        features, reference: (N, F) and (M, F).
        extractor: Its name, for the record.
        seed: Seed of KID's subsets.

    Raises:
        ValueError: If a set has fewer than two images or the sizes of the features differ.
    """
    check_comparable("distance", features, reference)
    counts = (len(features), len(reference))
    subset_size = min(KID_SUBSET_SIZE, *counts)
    if not (features.isfinite().all() and reference.isfinite().all()):
        return Distance(math.nan, math.nan, math.nan, counts, subset_size, extractor)

    from torchmetrics.image.kid import KernelInceptionDistance

    # Features in the place of images, so that torchmetrics does not extract the same ones again.
    given = nn.Identity()
    given.num_features = features.shape[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")
        kid = KernelInceptionDistance(given, subsets=KID_SUBSETS, subset_size=subset_size)
    kid.update(reference.double(), real=True)
    kid.update(features.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = (x.item() for x in kid.compute())
    fid = frechet_distance(features, reference)
    return Distance(fid, mean, std, counts, subset_size, extractor)


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """FID: the Frechet distance between the Gaussians fitted to two sets of features.

        |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr (C1 C2)^(1/2)

    with the means and the unbiased covariances (Heusel et al., 2017). With centred features A, B, each divided by sqrt(N - 1),
    C1 = A^T A and C2 = B^T B, and the last trace is the sum of the singular values of A B^T. That needs no eigenvalues of C1
    C2, which lose half of their digits where there are fewer images than features. For few images of many features (the images
    of one class) it is a hundred times faster.

    Args:
        features, reference: (N, F) and (M, F).

    Returns:
        The distance, at least 0; NaN if a feature is not finite.

    Raises:
        ValueError: If a set has fewer than two images or the sizes of the features differ.

    Examples:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0], [1.0, 5.0]])
        >>> round(frechet_distance(x, x + 2), 6)
        8.0
    """
    check_comparable("frechet_distance", features, reference)
    if not (features.isfinite().all() and reference.isfinite().all()):
        return math.nan
    (m1, a), (m2, b) = _moments(features.double()), _moments(reference.double())
    product = torch.linalg.svdvals(a @ b.T).sum()
    squared = (m1 - m2).square().sum() + a.square().sum() + b.square().sum() - 2 * product
    # Rounding can leave the distance of equal sets a hair below zero.
    return max(squared.item(), 0.0)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and a matrix of at most F rows whose Gram matrix is the unbiased covariance."""
    mean = features.mean(0)
    centred = (features - mean) / math.sqrt(len(features) - 1)
    return mean, torch.linalg.qr(centred, mode="r").R


def check_comparable(function: str, features: Tensor, reference: Tensor) -> None:
    """Raises ValueError unless they are features (N, F) and (M, F) of at least two images each."""
    if (
        features.ndim != 2
        or min(len(features), len(reference)) < 2
        or features.shape[1:] != reference.shape[1:]
    ):
        raise ValueError(
            f"{function}: expected features (N, F) and (M, F) of at least two images each, "
            f"got {tuple(features.shape)} and {tuple(reference.shape)}."
        )


def precision_recall_density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> PrecisionRecall:
    """Fidelity (precision, density) and diversity (recall, coverage) of generated images.

    A neighbourhood is the closed ball around an image that reaches to its k-th nearest neighbour in its own set, not counting
    itself; a region is the union of a set's neighbourhoods. Precision and recall: Kynkaanniemi et al., 2019; density and
    coverage, less shaken by outliers: Naeem et al., 2020. Distances are Euclidean, in float64, and made in blocks: memory grows
    with N + M. Where features coincide, as those of a collapsed generator do, they are inside one another's balls of radius 0.

    Args:
        real, fake: (N, F) and (M, F) features of real and of generated images.
        k: Neighbours.

    Raises:
        ValueError: If the shapes do not fit, or a set has no more than k images.

    Examples:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> precision_recall_density_coverage(x, x + 10, k=1)
        PrecisionRecall(precision=0.0, recall=0.0, density=0.0, coverage=0.0)
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(
            "precision_recall_density_coverage: expected features (N, F) and (M, F), "
            f"got {tuple(real.shape)} and {tuple(fake.shape)}."
        )
    if k < 1 or min(len(real), len(fake)) <= k:
        raise ValueError(
            f"precision_recall_density_coverage: k={k}: expected 1 or more, and more than k images "
            f"in each set, got {len(real)} real and {len(fake)} fake ones. Give more images or use "
            "a smaller k."
        )
    if not (real.isfinite().all() and fake.isfinite().all()):
        return PrecisionRecall(math.nan, math.nan, math.nan, math.nan)
    real, fake = real.double(), fake.double()
    # Squared distances lose digits in proportion to how far all points are from the origin.
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    real_radii, fake_radii = _squared_radii(real, k), _squared_radii(fake, k)
    in_real = torch.zeros(len(fake), dtype=torch.int64, device=real.device)  # balls around real
    in_fake, covered = [], []
    for start, part in _blocks(real, len(fake)):
        squared = _squared_distances(part, fake)  # (block, M)
        inside = squared <= real_radii[start : start + len(part), None]
        in_real += inside.sum(0)
        covered.append(inside.any(1))
        in_fake.append((squared <= fake_radii).any(1))
    return PrecisionRecall(
        precision=(in_real > 0).double().mean().item(),
        recall=torch.cat(in_fake).double().mean().item(),
        density=in_real.double().mean().item() / k,
        coverage=torch.cat(covered).double().mean().item(),
    )


def _squared_radii(points: Tensor, k: int) -> Tensor:
    """The squared distance of each point to its k-th nearest neighbour among the others. (N,)"""
    radii = []
    for start, part in _blocks(points, len(points)):
        squared = _squared_distances(part, points)
        squared.diagonal(start).fill_(math.inf)
        radii.append(squared.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, F) and (M, F) to (N, M), through a matrix product; exactly 0 where points coincide."""
    sizes = x.square().sum(1)[:, None] + y.square().sum(1)
    squared = sizes - 2 * x @ y.T
    # The most that rounding can leave of the distance between equal points.
    rounding = torch.finfo(squared.dtype).eps * x.shape[1] * sizes
    return squared.where(squared > rounding, 0)


def _blocks(points: Tensor, columns: int) -> list[tuple[int, Tensor]]:
    """Parts of the points, with the number of their first one, small enough for their distances."""
    rows = max(1, _BLOCK_ENTRIES // columns)
    return [(start, points[start : start + rows]) for start in range(0, len(points), rows)]


def compare_images(
    images: Tensor, reference: Tensor, extractor: nn.Module, *, seed: int = 0
) -> Distance:
    """FID and KID between two sets of images (N, C, H, W) and (M, C, H, W) in [-1, 1].

    The extractor's `name` attribute, or else its class's name, is recorded in the result.
    """
    one, other = (extract_features(x, extractor) for x in (images, reference))
    return distance(one, other, extractor=extractor_name(extractor), seed=seed)


def compare_folders(
    folder: Path | str, reference: Path | str, extractor: nn.Module, *, channels: int = 3
) -> Distance:
    """FID and KID between two folders of images, for any data and any extractor.

    Args:
        folder, reference: Images to judge and of the target domain, all of one size.
        extractor: A module from (N, C, H, W) float32 in [-1, 1] to features (N, F); it resizes by itself if it has to. Its
            `name` is recorded.
        channels: 3 for RGB, 1 for greyscale.

    Raises:
        UserError: If a folder is missing or empty, or its images differ in size.
    """
    images, others = (_load_folder(x, channels) for x in (folder, reference))
    return compare_images(images, others, extractor)


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


def extractor_name(extractor: nn.Module) -> str:
    """The name of an extractor in results: its `name`, or else its class's."""
    return str(getattr(extractor, "name", type(extractor).__name__))
