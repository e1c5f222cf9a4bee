"""Losses of metric learning before InfoNCE, on the pairs of a batch: what contrastive losses are compared with.

Row i of `query` and of `positive_key`, (N, D) each, are two views of one image; the other rows of `positive_key` are the
negatives of query i. d is the Euclidean distance of L2-normalised rows. The N x N matrix is made: these are for comparison,
at the sizes of a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce import distributed


def triplet_loss(query: Tensor, positive_key: Tensor, margin: float = 0.2) -> Tensor:
    """Mean over all i and j != i of `max(0, d(q_i, k_i)^2 - d(q_i, k_j)^2 + margin)`.

    Source: Schroff et al., "FaceNet", CVPR 2015 (https://arxiv.org/abs/1503.03832), with all triplets instead of mined ones.

    Args:
        query: (N, D), N >= 2.
        positive_key: (N, D).
        margin: by how much the negative should be farther away.
    """
    squared = _squared_distances(query, positive_key)
    hinges = F.relu(squared.diagonal()[:, None] - squared + margin)
    return hinges[_negatives(hinges)].mean()


def pair_loss(query: Tensor, positive_key: Tensor, margin: float = 1.0) -> Tensor:
    """Mean of `d(q_i, k_i)^2` over i, plus the mean of `max(0, margin - d(q_i, k_j))^2` over i and j != i.

    Source: Hadsell et al., "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006. Its sum over pairs would
    give the N (N - 1) negatives all the weight; here positives and negatives count the same.

    Args:
        query: (N, D), N >= 2.
        positive_key: (N, D).
        margin: distance from which on a negative is far enough; distances are at most 2.
    """
    squared = _squared_distances(query, positive_key)
    # The root has no derivative at 0.
    distance = squared.clamp(min=1e-12).sqrt()
    hinges = F.relu(margin - distance)[_negatives(squared)]
    return squared.diagonal().mean() + hinges.square().mean()


def n_pair_loss(
    query: Tensor, positive_key: Tensor, weight: float = 0.002, backend: str | None = None
) -> Tensor:
    """Mean of `log(1 + sum over j != i of exp(q_i k_j - q_i k_i))`, plus `weight` times the rows' mean squared length.

    InfoNCE of plain dot products at temperature 1, whose rows are kept short instead of normalised.

    Source: Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016.

    Args:
        query: (N, D), N >= 2.
        positive_key: (N, D).
        weight: of the squared length.
        backend: backend of `fastnce.info_nce`.
    """
    length = (query.square().sum(1).mean() + positive_key.square().sum(1).mean()) / 2
    loss = distributed.info_nce(
        query, positive_key, temperature=1.0, normalize=False, check=False, backend=backend
    )
    return loss + weight * length


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Of the normalised rows: (N, D) and (N, D) to (N, N)."""
    return 2 - 2 * F.normalize(x) @ F.normalize(y).T


def _negatives(square: Tensor) -> Tensor:
    """(N, N) bool: all but the diagonal."""
    return ~torch.eye(len(square), dtype=torch.bool, device=square.device)
