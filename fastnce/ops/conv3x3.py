"""3x3 convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.backends import native
from fastnce.ops import _common
from fastnce.ops.maps import autocast_map, has_kernels, map_of, rows_of
from fastnce.registry import Op, Operator, declare


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, reflect: bool = False
) -> Tensor:
    """3x3 convolution with stride 1 and padding 1: zeros, or the mirror image if ``reflect``.

    Plain PyTorch: ``conv2d(pad(x, (1, 1, 1, 1), mode="reflect"), weight, bias)``, or ``conv2d(x, weight, bias, padding=1)``.

    The compiled kernels use Winograd's minimal filtering F(4x4, 3x3): 36 multiply-adds where the definition has 144, the same
    function. Sums are in float32, so float32 results differ from exact ones by about 1e-6 of their size (a direct float32
    convolution: 3e-7), and bfloat16 ones by no more than the rounding of the result.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.

    Args:
        x: (B, C, H, W), any floating dtype; under autocast it is cast first, as for ``conv2d``.
        weight: (K, C, 3, 3).
        bias: (K,).
        reflect: H and W must then be at least 2.

    Returns:
        (B, K, H, W).

    Examples:
        >>> import torch
        >>> from fastnce.ops.conv3x3 import conv3x3
        >>> conv3x3(torch.randn(2, 16, 8, 8), torch.randn(32, 16, 3, 3), reflect=True).shape
        torch.Size([2, 32, 8, 8])
    """
    fits = weight.dtype in (torch.float32, torch.bfloat16) and has_kernels(x, weight.shape[:2])
    if fits and min(x.shape[2:]) >= 2 and _pays(x, weight):
        return Conv3x3Function.apply(autocast_map(x), weight, bias, reflect)
    return plain(x, weight, bias, reflect)


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Whether there are enough positions for what the weights cost: transformed, they are four times as many.

    Of 256 to 1024 channels, forward and backward, on one core with AVX-512: below the line the kernels took 1.1 to 4.3 times as
    long as PyTorch, above it 0.5 to 0.8 times.
    """
    positions = x.numel() // max(x.shape[1], 1)
    return positions >= min(weight.shape[0] * weight.shape[1] / 256, 1024)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, reflect: bool) -> Tensor:
    """``x`` (B, C, H, W), padded by 1 with its mirror image or with zeros, convolved with ``weight`` (K, C, 3, 3)."""
    if reflect:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight, bias)
    return F.conv2d(x, weight, bias, padding=1)


class Conv3x3Function(torch.autograd.Function):
    """Autograd of ``conv3x3`` over the compiled kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, reflect: bool) -> Tensor:
        ctx.reflect = reflect
        ctx.save_for_backward(x, weight, bias)
        shift = None if bias is None else bias.float().contiguous()
        rows = native.conv3x3_forward(rows_of(x), weight.float().contiguous(), shift, reflect)
        return map_of(rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return *_plain_gradients(x, weight, bias, ctx.reflect, needs, grad), None
        grad_x = grad_weight = grad_bias = None
        if needs[0]:
            grad_x = map_of(
                native.conv3x3_input_gradient(
                    rows_of(grad), weight.float().contiguous(), ctx.reflect
                )
            )
        if needs[1]:
            grad_weight = native.conv3x3_weight_gradient(rows_of(grad), rows_of(x), ctx.reflect)
            grad_weight = grad_weight.to(weight.dtype)
        if needs[2]:
            grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None


def _plain_gradients(x, weight, bias, reflect, needs, grad) -> list[Tensor | None]:
    def in_dtype_of_x(x, weight, bias):
        shift = None if bias is None else bias.to(x.dtype)
        return plain(x, weight.to(x.dtype), shift, reflect)

    return _common.plain_gradients(in_dtype_of_x, (x, weight, bias), needs, grad)


def _maps(x: Tensor, weight: Tensor, **_: object) -> Tensor:
    return x.new_empty((*x.shape[:3], weight.shape[0]))


def _input_gradient(grad: Tensor, weight: Tensor, **_: object) -> Tensor:
    return grad.new_empty((*grad.shape[:3], weight.shape[1]))


def _weight_gradient(grad: Tensor, x: Tensor, **_: object) -> Tensor:
    return x.new_empty((grad.shape[3], x.shape[3], 3, 3), dtype=torch.float32)


declare(
    Op("conv3x3", is_loss=False),
    # x (B, H, W, C), grad (B, H, W, K), contiguous; weight (K, C, 3, 3), bias (K,), float32, contiguous.
    Operator(
        "conv3x3_forward(Tensor x, Tensor weight, Tensor? bias, bool reflect) -> Tensor", _maps
    ),
    Operator(
        "conv3x3_input_gradient(Tensor grad, Tensor weight, bool reflect) -> Tensor",
        _input_gradient,
    ),
    # (K, C, 3, 3) in float32.
    Operator(
        "conv3x3_weight_gradient(Tensor grad, Tensor x, bool reflect) -> Tensor", _weight_gradient
    ),
    conv3x3=plain,
)
