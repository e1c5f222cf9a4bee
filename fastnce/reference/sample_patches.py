"""Patch sampling in plain PyTorch."""

from array import array

import torch
from torch import Tensor

from fastnce.reference.normalize import accumulation_dtype, normalize_rows

# From here on drawing again what came twice is quicker than a whole permutation.
_CHEAP_SHARE = 16


def draw_patch_ids(
    num_positions: int,
    num_patches: int,
    *,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """Distinct positions with the distribution of a random permutation's head: (min(num_patches, num_positions),) int64."""
    few = device.type == "cpu" and not torch.compiler.is_compiling()
    if few and num_patches * _CHEAP_SHARE <= num_positions:
        return _draw_distinct(num_positions, num_patches, generator)
    return torch.randperm(num_positions, device=device, generator=generator)[:num_patches]


def _draw_distinct(num_positions: int, count: int, generator: torch.Generator | None) -> Tensor:
    """The first ``count`` distinct numbers of a sequence of independent uniform ones."""
    found: dict[int, None] = {}
    while len(found) < count:
        # A few more than needed, for at most one in _CHEAP_SHARE is expected to repeat another.
        draws = torch.randint(
            num_positions, (count + count // 8,), generator=generator, device="cpu"
        )
        found.update(dict.fromkeys(draws.tolist()))
    # torch.tensor of a list takes six times as long; the copy makes the memory PyTorch's own.
    return torch.frombuffer(array("q", list(found)[:count]), dtype=torch.int64).clone()


def sample_patches(features: Tensor, patch_ids: Tensor, normalize: bool) -> Tensor:
    """``patches[b, s, :] = features[b, :, id_s]``, L2-normalised over the channels if asked.

    Args:
        features: (B, C, H, W).
        patch_ids: (S,) int64, row-major positions ``h * W + w``.
        normalize: divide each patch by its L2 norm.

    Returns:
        (B, S, C), in the dtype of the features.
    """
    # The gradient of features.permute(0, 2, 3, 1).flatten(1, 2)[:, patch_ids] has the strides of channels_last, for which the
    # backward of instance norm is wrong by its own size at B = 1 on a CPU (torch 2.13). This one's is contiguous.
    patches = features.flatten(2)[:, :, patch_ids].mT.contiguous()  # (B, S, C)
    if normalize:
        dtype = accumulation_dtype(patches.dtype)
        patches = normalize_rows(patches.to(dtype)).to(features.dtype)
    return patches
