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
        width = x.shape[3]
        rows = x[:, :, ids // width, ids % width].mT.contiguous()  # (B, S, C)
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
        height, width = x.shape[2:]
        if x.stride(2) == width * x.stride(3):  # the positions are one dimension
            size, strides = (*x.shape[:2], height * width), (*x.stride()[:2], x.stride(3))
            x.as_strided(size, strides).index_add_(2, ids, grad.mT)
        else:
            element, channel = (torch.arange(size, device=x.device) for size in x.shape[:2])
            at = (element[:, None, None], channel[:, None], ids // width, ids % width)
            x.index_put_(at, grad.mT, accumulate=True)
