"""Patch sampling: all maps in one launch, straight from any strides, and back without atomics.

The positions of a map are usually distinct, so each has one writer. Where one repeats, its first patch adds the gradients of all of
them, in order. Positions outside a map are not looked at by the host: their patches are NaN, and their gradients go nowhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch
from .rows import inverse_root, largest_magnitude, power_of_two

_PATCHES = 16
_CHANNELS = 64
_IDS = 128
# Maps of one launch; every one adds code to the kernel.
_MAPS = 8


def sample_patches_forward(
    features: list[Tensor], patch_ids: list[Tensor], normalize: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Patches (B, S, C) of each map (B, C, H, W), and their inverse norms (B, S), [] unless ``normalize``."""
    patches = [
        x.new_empty((x.shape[0], len(ids), x.shape[1]))
        for x, ids in zip(features, patch_ids, strict=True)
    ]
    norms = [x.new_empty(x.shape[:2], dtype=torch.float32) for x in patches] if normalize else []
    for some in _groups(len(features)):
        _launch(
            _gather_kernel,
            features[some],
            patch_ids[some],
            1,
            patches=tuple(patches[some]),
            norms=tuple(norms[some]) if normalize else None,
        )
    return patches, norms


def sample_patches_backward(
    grad_patches: list[Tensor],
    patches: list[Tensor],
    inverse_norms: list[Tensor],
    patch_ids: list[Tensor],
    feature_likes: list[Tensor],
    normalize: bool,
) -> list[Tensor]:
    """The gradient of each map, laid out like ``feature_likes``; ``patches`` may be [] unless ``normalize``."""
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
    """Adds what ``sample_patches_backward`` returns to ``maps``, which must not overlap in memory, in place."""
    for some in _groups(len(maps)):
        grads = grad_patches[some]
        if normalize:
            grads = _through_normalisation(grads, patches[some], inverse_norms[some])
        _launch(
            _scatter_kernel,
            maps[some],
            patch_ids[some],
            max(cdiv(x.shape[1], _CHANNELS) for x in maps[some]),
            grads=tuple(grads),
            grad_strides=tuple(x.stride() for x in grads),
        )


def _groups(count: int) -> list[slice]:
    return [slice(first, first + _MAPS) for first in range(0, count, _MAPS)]


def _launch(
    kernel: Callable, maps: list[Tensor], ids: list[Tensor], width: int, **arguments
) -> None:
    """One program for each block of patches of each image of each map, in ``width`` blocks of channels."""
    blocks = [x.shape[0] * cdiv(len(id_), _PATCHES) for x, id_ in zip(maps, ids, strict=True)]
    ends = [sum(blocks[: index + 1]) for index in range(len(blocks))]
    launch(
        kernel,
        (ends[-1], width),
        maps=tuple(maps),
        ids=tuple(ids),
        strides=tuple(x.stride() for x in maps),
        id_strides=tuple(x.stride(0) for x in ids),
        widths=tuple(x.shape[3] for x in maps),
        positions=tuple(x.shape[2] * x.shape[3] for x in maps),
        channels=tuple(x.shape[1] for x in maps),
        counts=tuple(len(x) for x in ids),
        ends=tuple(ends),
        MAPS=len(maps),
        PATCHES=_PATCHES,
        CHANNELS=_CHANNELS,
        **arguments,
        **({"IDS": _IDS} if kernel is _scatter_kernel else {}),
    )


def _through_normalisation(
    grads: list[Tensor], patches: list[Tensor], norms: list[Tensor]
) -> list[Tensor]:
    out = [torch.empty_like(x, memory_format=torch.contiguous_format).float() for x in patches]
    rows = [x.shape[0] * x.shape[1] for x in patches]
    blocks = [cdiv(count, _PATCHES) for count in rows]
    ends = [sum(blocks[: index + 1]) for index in range(len(blocks))]
    launch(
        _normalisation_kernel,
        (ends[-1],),
        grads=tuple(grads),
        patches=tuple(patches),
        norms=tuple(norms),
        out=tuple(out),
        strides=tuple(x.stride() for x in grads),
        sizes=tuple(x.shape[1] for x in patches),
        channels=tuple(x.shape[2] for x in patches),
        rows=tuple(rows),
        ends=tuple(ends),
        MAPS=len(grads),
        PATCHES=_PATCHES,
        CHANNELS=_CHANNELS,
    )
    return out


@triton.jit
def _places(ids, id_stride, strides, width, positions, s, count, image):
    """Offsets of patches ``s`` of an image in a map (B, C, H, W), and their positions; -1 of one outside."""
    position = tl.load(ids + s.to(tl.int64) * id_stride, mask=s < count, other=-1)
    position = tl.where(position < positions, tl.maximum(position, -1), -1)
    places = image * strides[0] + position // width * strides[2] + position % width * strides[3]
    return places[:, None], position


@triton.jit
def _chunk(map_, places, strides, channels, inside, begin, CHANNELS: tl.constexpr):
    """Some channels of the patches at ``places``, and which they are; NaN of patches outside the map, 0 beyond the last channel."""
    c = (begin + tl.arange(0, CHANNELS)).to(tl.int64)[None, :]
    mask = inside[:, None] & (c < channels)
    x = tl.load(map_ + places + c * strides[1], mask=mask, other=0.0)
    return tl.where(inside[:, None], x, float("nan")), c


@triton.jit
def _gather_kernel(
    maps,
    ids,
    strides,
    id_strides,
    widths,
    positions,
    channels,
    counts,
    ends,
    patches,
    norms,
    MAPS: tl.constexpr,
    PATCHES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    program = tl.program_id(0)
    first = 0
    for i in tl.static_range(MAPS):
        if (program >= first) & (program < ends[i]):
            block = program - first
            count = counts[i]
            blocks = tl.cdiv(count, PATCHES)
            image = tl.cast(block // blocks, tl.int64)
            s = block % blocks * PATCHES + tl.arange(0, PATCHES)
            there = s < count
            places, position = _places(
                ids[i], id_strides[i], strides[i], widths[i], positions[i], s, count, image
            )
            inside = position >= 0
            out = patches[i] + ((image * count + s) * channels[i])[:, None]
            power = tl.full((PATCHES,), 1.0, tl.float32)
            length = tl.full((PATCHES,), 1.0, tl.float32)
            if norms is not None:
                power = power_of_two(
                    largest_magnitude(
                        maps[i] + places, strides[i][1], inside, channels[i], PATCHES, CHANNELS
                    )
                )
                squares = tl.zeros((PATCHES,), tl.float64)
                for begin in range(0, channels[i], CHANNELS):
                    x, _ = _chunk(maps[i], places, strides[i], channels[i], inside, begin, CHANNELS)
                    wide = (x.to(tl.float32) * power[:, None]).to(tl.float64)
                    squares += tl.sum(wide * wide, 1)
                length = inverse_root(squares)
                tl.store(norms[i] + image * count + s, length * power, mask=there)
            for begin in range(0, channels[i], CHANNELS):
                x, c = _chunk(maps[i], places, strides[i], channels[i], inside, begin, CHANNELS)
                if norms is not None:
                    x = (x.to(tl.float32) * power[:, None] * length[:, None]).to(x.dtype)
                tl.store(out + c, x, mask=there[:, None] & (c < channels[i]))
        first = ends[i]


@triton.jit
def _next(ids, id_stride, mine, after, count, IDS: tl.constexpr):
    """For each position the first patch behind ``after`` that has it too; ``count`` if none has."""
    found = tl.zeros(mine.shape, tl.int32) + count
    for begin in range(0, count, IDS):
        t = begin + tl.arange(0, IDS)
        theirs = tl.load(ids + t.to(tl.int64) * id_stride, mask=t < count, other=-1)
        same = (mine[:, None] == theirs[None, :]) & (t[None, :] > after[:, None])
        found = tl.minimum(found, tl.min(tl.where(same, t[None, :], count), 1))
    return found


@triton.jit
def _scatter_kernel(
    maps,
    ids,
    strides,
    id_strides,
    widths,
    positions,
    channels,
    counts,
    ends,
    grads,
    grad_strides,
    MAPS: tl.constexpr,
    PATCHES: tl.constexpr,
    CHANNELS: tl.constexpr,
    IDS: tl.constexpr,
):
    program = tl.program_id(0)
    first = 0
    for i in tl.static_range(MAPS):
        mine = (program >= first) & (program < ends[i])
        if mine & (tl.program_id(1) * CHANNELS < channels[i]):
            block = program - first
            count = counts[i]
            blocks = tl.cdiv(count, PATCHES)
            image = tl.cast(block // blocks, tl.int64)
            s = block % blocks * PATCHES + tl.arange(0, PATCHES)
            places, position = _places(
                ids[i], id_strides[i], strides[i], widths[i], positions[i], s, count, image
            )
            is_first = _next(ids[i], id_strides[i], position, s * 0 - 1, count, IDS) == s
            is_first = is_first & (position >= 0)
            c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)[None, :]
            total = tl.zeros((PATCHES, CHANNELS), tl.float32)
            grad = grads[i] + (image * grad_strides[i][0] + c * grad_strides[i][2])
            now = tl.where(is_first, s, count)
            while tl.min(now, 0) < count:
                mask = (now < count)[:, None] & (c < channels[i])
                at = now.to(tl.int64)[:, None] * grad_strides[i][1]
                total += tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
                now = _next(ids[i], id_strides[i], position, now, count, IDS)
            mask = is_first[:, None] & (c < channels[i])
            at = maps[i] + places + c * strides[i][1]
            total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            tl.store(at, total.to(maps[i].dtype.element_ty), mask=mask)
        first = ends[i]


@triton.jit
def _normalisation_kernel(
    grads,
    patches,
    norms,
    out,
    strides,
    sizes,
    channels,
    rows,
    ends,
    MAPS: tl.constexpr,
    PATCHES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    program = tl.program_id(0)
    first = 0
    for i in tl.static_range(MAPS):
        if (program >= first) & (program < ends[i]):
            row = tl.cast(program - first, tl.int64) * PATCHES + tl.arange(0, PATCHES)
            there = row < rows[i]
            image, s = row // sizes[i], row % sizes[i]
            grad = grads[i] + (image * strides[i][0] + s * strides[i][1])[:, None]
            at = (row * channels[i])[:, None]
            along = tl.zeros((PATCHES,), tl.float32)
            for begin in range(0, channels[i], CHANNELS):
                c = (begin + tl.arange(0, CHANNELS)).to(tl.int64)[None, :]
                mask = there[:, None] & (c < channels[i])
                g = tl.load(grad + c * strides[i][2], mask=mask, other=0.0).to(tl.float32)
                unit = tl.load(patches[i] + at + c, mask=mask, other=0.0).to(tl.float32)
                along += tl.sum(g * unit, 1)
            inverse = tl.load(norms[i] + row, mask=there, other=0.0)
            for begin in range(0, channels[i], CHANNELS):
                c = (begin + tl.arange(0, CHANNELS)).to(tl.int64)[None, :]
                mask = there[:, None] & (c < channels[i])
                g = tl.load(grad + c * strides[i][2], mask=mask, other=0.0).to(tl.float32)
                unit = tl.load(patches[i] + at + c, mask=mask, other=0.0).to(tl.float32)
                g = (g - unit * along[:, None]) * inverse[:, None]
                tl.store(out[i] + at + c, g, mask=mask)
        first = ends[i]
