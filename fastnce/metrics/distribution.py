"""How far two sets of images are apart: FID and KID, over any feature extractor."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastnce.data.folders import SIGNED_UNIT, list_images, load_image, to_uint8
from fastnce.errors import UserError

KID_SUBSETS = 100
KID_SUBSET_SIZE = 100


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


def distance(
    features: Tensor, reference: Tensor, *, extractor: str = "given features", seed: int = 0
) -> Distance:
    """FID and KID between two sets of features.

    FID as `frechet_distance`, KID as in Binkowski et al., 2018, through torchmetrics; in float64.
    The FID of few images is too large, and the more so the fewer they are: compare values from
    equal numbers of images only.

    Args:
        features: (N, F).
        reference: (M, F).
        extractor: Its name, for the record.
        seed: Seed of KID's subsets.

    Raises:
        ValueError: If a set has fewer than two images or the sizes of the features differ.
    """
    _check_comparable("distance", features, reference)
    counts = (len(features), len(reference))
    subset_size = min(KID_SUBSET_SIZE, *counts)
    if not (features.isfinite().all() and reference.isfinite().all()):
        return Distance(math.nan, math.nan, math.nan, counts, subset_size, extractor)

    from torchmetrics.image.kid import KernelInceptionDistance

    given = _Given(features.shape[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")
        kid = KernelInceptionDistance(given, subsets=KID_SUBSETS, subset_size=subset_size)
    kid.update(reference.double(), real=True)
    kid.update(features.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kid_mean, kid_std = kid.compute()
    return Distance(
        frechet_distance(features, reference),
        kid_mean.item(),
        kid_std.item(),
        counts,
        subset_size,
        extractor,
    )


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """FID: the Frechet distance between the Gaussians fitted to two sets of features.

        |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr (C1 C2)^(1/2)

    with the means and the unbiased covariances (Heusel et al., 2017). With centred features A, B,
    each divided by sqrt(N - 1), C1 = A^T A and C2 = B^T B, and the last trace is the sum of the
    singular values of A B^T. That needs no eigenvalues of C1 C2, which lose half of their digits
    where there are fewer images than features, and for few images of many features (the images of
    one class) it is a hundred times faster.

    Args:
        features: (N, F).
        reference: (M, F).

    Returns:
        The distance, at least 0; NaN if a feature is not finite.

    Raises:
        ValueError: If a set has fewer than two images or the sizes of the features differ.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0], [1.0, 5.0]])
        >>> round(frechet_distance(x, x + 2), 6)
        8.0
    """
    _check_comparable("frechet_distance", features, reference)
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


def _check_comparable(function: str, features: Tensor, reference: Tensor) -> None:
    if (
        features.ndim != 2
        or min(len(features), len(reference)) < 2
        or features.shape[1:] != reference.shape[1:]
    ):
        raise ValueError(
            f"{function}: expected features (N, F) and (M, F) of at least two images each, "
            f"got {tuple(features.shape)} and {tuple(reference.shape)}."
        )


def compare_images(
    images: Tensor, reference: Tensor, extractor: nn.Module, *, seed: int = 0
) -> Distance:
    """FID and KID between two sets of images (N, C, H, W) and (M, C, H, W) in [-1, 1].

    The extractor's `name` attribute, or else its class's name, is recorded in the result.
    """
    return distance(
        extract_features(images, extractor),
        extract_features(reference, extractor),
        extractor=extractor_name(extractor),
        seed=seed,
    )


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
    """What a result calls its extractor."""
    return str(getattr(extractor, "name", type(extractor).__name__))


def as_saved(images: Tensor) -> Tensor:
    """Images as they are after saving and loading, so that the numbers are those of the files.

    Args:
        images: Of any shape: float in [-1, 1], quantised as `save_image` does, or uint8 as read from files.

    Returns:
        float32 in [-1, 1] on the CPU; NaN where a value is not finite.
    """
    images = images.detach().cpu()
    levels = images if images.dtype == torch.uint8 else to_uint8(images.nan_to_num())
    return torch.from_numpy(SIGNED_UNIT)[levels.long()].masked_fill(~images.isfinite(), math.nan)


class _Given(nn.Module):
    """Takes features for images, so that torchmetrics does not extract the same ones again."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
