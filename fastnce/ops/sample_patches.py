"""Patch sampling."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastnce import backends, reference
from fastnce.ops import _checks, _common


def sample_patches(
    features: Tensor | Sequence[Tensor],
    num_patches: int = 256,
    *,
    patch_ids: Tensor | Sequence[Tensor] | None = None,
    normalize: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    r"""Feature vectors at random positions of a feature map, the same positions for all images of the batch.

    .. math:: \text{patches}_{b s} = \text{features}_{b,\, :,\, id_s}

    Plain PyTorch: ``features.permute(0, 2, 3, 1).flatten(1, 2)[:, patch_ids]``.

    Args:
        features: (B, C, H, W), any strides; float64, float32, bfloat16 or float16. Or a list of maps, which gives lists.
        num_patches: S; ``min(num_patches, H * W)`` distinct positions are drawn without replacement.
        patch_ids: (S,) int64 positions ``h * W + w`` to take instead of drawing them; one per map if ``features`` is a list.
            A repeated position is allowed.
        normalize: divide each patch by its L2 norm; an all-zero patch stays zero.
        generator: the source of the draw, on the device of ``features``; None for the default one.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        ``(patches, patch_ids)``: (B, S, C) in the dtype of ``features``, whose gradient flows to ``features``; (S,) int64.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or numbers that do not fit together.
        IndexError: a patch id outside the map (on an accelerator this is reported by the device instead).
        RuntimeError: the requested backend cannot run this.

    Example:
        >>> import torch, fastnce
        >>> keys, patch_ids = fastnce.sample_patches(torch.randn(2, 64, 32, 32), num_patches=16)
        >>> queries, _ = fastnce.sample_patches(torch.randn(2, 64, 32, 32), patch_ids=patch_ids)
        >>> queries.shape
        torch.Size([2, 16, 64])
    """
    op = "sample_patches"
    single = isinstance(features, Tensor)
    maps = [features] if single else _expect_maps(op, features)
    for layer, feature in enumerate(maps):
        name = "features" if single else f"features[{layer}]"
        _checks.expect_float_tensor(op, name, feature, (4,), "(B, C, H, W)")
    if patch_ids is None:
        _checks.expect_int_at_least(op, "num_patches", num_patches, 1)
        ids = [
            reference.draw_patch_ids(
                feature.shape[2] * feature.shape[3],
                num_patches,
                device=feature.device,
                generator=generator,
            )
            for feature in maps
        ]
    else:
        ids = _expect_patch_ids(op, maps, patch_ids, single)

    patches = _gather(op, maps, ids, bool(normalize), backend)
    return (patches[0], ids[0]) if single else (patches, ids)


def _expect_maps(op: str, features: object) -> list[Tensor]:
    if not isinstance(features, (list, tuple)) or not features:
        raise TypeError(
            f"{op}: features must be a tensor (B, C, H, W) or a non-empty list of them, got "
            f"{'an empty list' if isinstance(features, (list, tuple)) else type(features).__name__}."
        )
    return list(features)


def _expect_patch_ids(op: str, maps: list[Tensor], patch_ids: object, single: bool) -> list[Tensor]:
    if not (
        isinstance(patch_ids, Tensor)
        if single
        else isinstance(patch_ids, (list, tuple)) and len(patch_ids) == len(maps)
    ):
        expected = "a tensor (S,)" if single else f"a list of {len(maps)} tensors, one per map"
        got = type(patch_ids).__name__
        got += f" of length {len(patch_ids)}" if isinstance(patch_ids, (list, tuple)) else ""
        raise ValueError(f"{op}: patch_ids must be {expected}, like features; got {got}.")
    ids = [patch_ids] if single else list(patch_ids)
    for layer, (feature, values) in enumerate(zip(maps, ids, strict=True)):
        name = "patch_ids" if single else f"patch_ids[{layer}]"
        _checks.expect_tensor(op, name, values, "(S,)")
        if values.dtype != torch.int64:
            raise TypeError(f"{op}: {name} must be int64, got {values.dtype}. Use {name}.long().")
        if values.dim() != 1 or 0 in values.shape:
            raise ValueError(
                f"{op}: {name} must have the shape (S,), S at least 1, got {_checks.shape_of(values)}."
            )
        if values.device != feature.device:
            raise ValueError(
                f"{op}: {name} is on {values.device} but its map is on {feature.device}. "
                f"Move it with {name}.to({str(feature.device)!r})."
            )
        if values.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(x) for x in values.aminmax())
            height, width = feature.shape[2:]
            if low < 0 or high >= height * width:
                raise IndexError(
                    f"{op}: {name} must lie in [0, {height * width}) for a map of {height} x {width} positions, "
                    f"got {low if low < 0 else high}."
                )
    return ids


def _gather(
    op: str, maps: list[Tensor], ids: list[Tensor], normalize: bool, backend: str | None
) -> list[Tensor]:
    # One call for all maps of a dtype: under autocast the pixels are float32 and the features of convolutions bfloat16.
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for layer, feature in enumerate(maps):
        groups.setdefault((feature.device, feature.dtype), []).append(layer)
    patches: list[Tensor] = [None] * len(maps)
    for layers in groups.values():
        group = [maps[layer] for layer in layers], [ids[layer] for layer in layers]
        for layer, found in zip(layers, _gather_alike(op, *group, normalize, backend), strict=True):
            patches[layer] = found
    return patches


def _gather_alike(
    op: str, maps: list[Tensor], ids: list[Tensor], normalize: bool, backend: str | None
) -> list[Tensor]:
    kernels = backends.select(op, maps[0], backend)
    with _common.no_autocast(maps[0]):
        if kernels is reference:
            pairs = zip(maps, ids, strict=True)
            return [reference.sample_patches(feature, id_, normalize) for feature, id_ in pairs]
        _checks.expect_no_functorch(op)
        return list(SamplePatchesFunction.apply(kernels, normalize, *maps, *ids))


class SamplePatchesFunction(torch.autograd.Function):
    """Autograd of :func:`sample_patches`, all maps in one call of the kernels of any fused backend."""

    @staticmethod
    def forward(
        ctx, kernels: ModuleType, normalize: bool, *maps_and_ids: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(maps_and_ids) // 2
        maps, ids = list(maps_and_ids[:count]), list(maps_and_ids[count:])
        patches, inverse_norms = kernels.sample_patches_forward(maps, ids, normalize)
        ctx.kernels, ctx.normalize = kernels, normalize
        # Only the maps' layouts are kept: the maps may be freed, or changed in place, before the backward.
        ctx.layouts = [(x.shape, _memory_format(x)) for x in maps]
        ctx.save_for_backward(*ids, *(patches if normalize else ()), *inverse_norms)
        return tuple(patches)

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, *grad_patches: Tensor):
        saved, count = list(ctx.saved_tensors), len(ctx.layouts)
        ids, patches, inverse_norms = saved[:count], saved[count : 2 * count], saved[2 * count :]
        maps = [
            torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
            for grad, (shape, memory_format) in zip(grad_patches, ctx.layouts, strict=True)
        ]
        grads = ctx.kernels.sample_patches_backward(
            list(grad_patches), patches, inverse_norms, ids, maps, ctx.normalize
        )
        return None, None, *grads, *(None,) * count


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
