"""Precision, recall, density and coverage: fidelity and diversity from nearest neighbours."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries of a block of distances: 128 MiB of float64.
_BLOCK_ENTRIES = 2**24


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


def precision_recall_density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> PrecisionRecall:
    """Fidelity (precision, density) and diversity (recall, coverage) of generated images.

    A neighbourhood is the closed ball around an image that reaches to its k-th nearest neighbour in
    its own set, not counting itself; a region is the union of a set's neighbourhoods. Precision and
    recall: Kynkaanniemi et al., 2019; density and coverage, less shaken by outliers: Naeem et al.,
    2020. Distances are Euclidean, in float64, and made in blocks: memory grows with N + M.
    Balls are closed: where features coincide, as those of a collapsed generator do, they are inside
    one another's balls of radius 0.

    Args:
        real: (N, F) features of real images.
        fake: (M, F) features of generated ones.
        k: Neighbours.

    Raises:
        ValueError: If the shapes do not fit, or a set has no more than k images.

    Example:
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
