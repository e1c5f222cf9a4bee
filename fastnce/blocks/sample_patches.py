"""Patches at positions of maps: what is read and written are these positions alone, whatever the strides."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnce.blocks.tiles import Rows


def sample_patches_forward(
    features: list[Tensor], patch_ids: list[Tensor], normalize: bool
) -> tuple[list[Tensor], list[Tensor]]:
    patches, norms = [], []
    for x, ids in zip(features, patch_ids, strict=True):
        rows = _gathered(x, ids).contiguous()
        if normalize:
            unit = Rows(rows, True)
            rows = unit.units.to(x.dtype)
            norms.append(unit.inverse_norm())
        patches.append(rows)
    return patches, norms


def sample_patches_backward(
    grad_patches: list[Tensor],
    patches: list[Tensor],
    inverse_norms: list[Tensor],
    patch_ids: list[Tensor],
    feature_likes: list[Tensor],
    normalize: bool,
) -> list[Tensor]:
    maps = [torch.zeros_like(x) for x in feature_likes]
    sample_patches_add_(maps, grad_patches, patches, inverse_norms, patch_ids, normalize)
    return maps


def sample_patches_add_(
    maps: list[Tensor],
    grad_patches: list[Tensor],
    patches: list[Tensor],
    inverse_norms: list[Tensor],
    patch_ids: list[Tensor],
    normalize: bool,
) -> None:
    for i, (x, grad, ids) in enumerate(zip(maps, grad_patches, patch_ids, strict=True)):
        if normalize:
            norm = inverse_norms[i].unsqueeze(-1)
            units, wide = patches[i].to(norm.dtype), grad.to(norm.dtype)
            along = (units * wide).sum(dim=-1, keepdim=True)
            grad = ((wide - units * along) * norm).to(x.dtype)
        flat = _flat(x)
        if flat is None:
            element, channel = (torch.arange(size, device=x.device) for size in x.shape[:2])
            at = (element[:, None, None], channel[:, None], *_rows_and_columns(x, ids))
            x.index_put_(at, grad.mT, accumulate=True)
        elif x.stride(1) == 1:  # channels last
            flat.mT.index_add_(1, ids, grad)
        else:
            flat.index_add_(2, ids, grad.mT)


def _gathered(x: Tensor, ids: Tensor) -> Tensor:
    """(B, S, C), by the operator that is quickest for these strides."""
    flat = _flat(x)
    if flat is None:
        return x[:, :, *_rows_and_columns(x, ids)].mT
    if x.stride(1) == 1:  # channels last
        return flat.mT.index_select(1, ids)
    return flat.gather(2, ids.expand(*x.shape[:2], -1)).mT


def _flat(x: Tensor) -> Tensor | None:
    """The map as (B, C, H W), a view; None where the positions are not one dimension."""
    height, width = x.shape[2:]
    if x.stride(2) != width * x.stride(3):
        return None
    return x.as_strided((*x.shape[:2], height * width), (*x.stride()[:2], x.stride(3)))


def _rows_and_columns(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of ids below 0, rows outside the map, at which a device raises; a negative index would count from the end."""
    height, width = x.shape[2:]
    return (ids // width).masked_fill(ids < 0, height), ids % width
