"""Patch sampling in plain PyTorch."""

import torch
from torch import Tensor

from fastnce.reference.normalize import accumulation_dtype, normalize_rows


def draw_patch_ids(
    num_positions: int,
    num_patches: int,
    *,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """The first ``num_patches`` of a random permutation of the positions: (min(num_patches, num_positions),) int64."""
    return torch.randperm(num_positions, device=device, generator=generator)[:num_patches]


def sample_patches(features: Tensor, patch_ids: Tensor, normalize: bool) -> Tensor:
    """``patches[b, s, :] = features[b, :, id_s]``, L2-normalised over the channels if asked.

    Args:
        features: (B, C, H, W).
        patch_ids: (S,) int64, row-major positions ``h * W + w``.
        normalize: divide each patch by its L2 norm.

    Returns:
        (B, S, C), in the dtype of the features.
    """
    patches = features.permute(0, 2, 3, 1).flatten(1, 2)[:, patch_ids]  # (B, S, C)
    if normalize:
        dtype = accumulation_dtype(patches.dtype)
        patches = normalize_rows(patches.to(dtype)).to(features.dtype)
    return patches
