"""Anti-aliased resampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.backends import native
from fastnce.ops.maps import autocast_map, has_kernels, map_of, rows_of
from fastnce.registry import Op, Operator, declare


def blur_resample(x: Tensor, kernel: Tensor, *, halve: bool) -> Tensor:
    """Half or twice the height and width, anti-aliased.

    Halved: every second pixel of ``x`` blurred by ``outer([1, 2, 1]) / 16``, mirrored at the border. Doubled: between two pixels,
    a quarter and three quarters of the way, ``outer([1, 3, 3, 1]) / 16``, the border repeated.

    Source: Zhang, "Making Convolutional Networks Shift-Invariant Again", ICML 2019.

    Args:
        x: (B, C, H, W), H and W at least 2.
        kernel: that of ``blur_kernel``, which plain PyTorch convolves with.
        halve: half the size, else twice the size.

    Returns:
        (B, C, ceil(H / 2), ceil(W / 2)), or (B, C, 2 H, 2 W).

    Examples:
        >>> import torch
        >>> from fastnce.ops.blur_resample import blur_kernel, blur_resample
        >>> blur_resample(torch.randn(2, 16, 7, 8), blur_kernel(16, halve=True), halve=True).shape
        torch.Size([2, 16, 4, 4])
    """
    if has_kernels(x, x.shape[1:2]) and min(x.shape[2:]) >= 2:
        height, width = x.shape[2:]
        size = ((height + 1) // 2, (width + 1) // 2) if halve else (2 * height, 2 * width)
        return BlurResampleFunction.apply(autocast_map(x), halve, size, False)
    return plain(x, kernel, halve)


def blur_kernel(channels: int, *, halve: bool) -> Tensor:
    """The filter, once per channel: (channels, 1, 3, 3), or (channels, 1, 4, 4) for twice the size."""
    row = torch.tensor([1.0, 2.0, 1.0] if halve else [1.0, 3.0, 3.0, 1.0])
    return (torch.outer(row, row) / 16).repeat(channels, 1, 1, 1)


def plain(x: Tensor, kernel: Tensor, halve: bool) -> Tensor:
    """Half the size: ``outer([1, 2, 1]) / 16``, mirrored; or twice the size: ``outer([1, 3, 3, 1]) / 16``, border repeated."""
    channels = x.shape[1]
    if halve:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, stride=2, groups=channels)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    # padding=3 drops the border that the replicated pixels produce, one pixel more than the filter's own 2.
    return F.conv_transpose2d(padded, kernel, stride=2, padding=3, groups=channels)


class BlurResampleFunction(torch.autograd.Function):
    """A linear map, or its adjoint: the gradient of each is the other, so it has all derivatives."""

    @staticmethod
    def forward(ctx, x: Tensor, halve: bool, size: tuple[int, int], adjoint: bool) -> Tensor:
        ctx.halve, ctx.size, ctx.adjoint = halve, tuple(x.shape[2:]), adjoint
        return map_of(native.blur_resample(rows_of(x), halve, adjoint, *size))

    @staticmethod
    def backward(ctx, grad: Tensor):
        back = BlurResampleFunction.apply(grad, ctx.halve, ctx.size, not ctx.adjoint)
        return back, None, None, None


def _resampled(x: Tensor, height: int, width: int, **_: object) -> Tensor:
    return x.new_empty((x.shape[0], height, width, x.shape[3]))


declare(
    Op("blur_resample", is_loss=False),
    # (B, H, W, C), contiguous -> (B, height, width, C). The adjoint takes a gradient of the result's size to one of the map's.
    Operator(
        "blur_resample(Tensor x, bool halve, bool adjoint, int height, int width) -> Tensor",
        _resampled,
    ),
    blur_resample=plain,
)
