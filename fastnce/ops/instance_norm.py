"""Instance norm, with what follows it."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.backends import native
from fastnce.ops import _common
from fastnce.ops.maps import autocast_map, has_kernels, map_of, rows_of
from fastnce.registry import Op, Operator, declare


def instance_norm(
    x: Tensor, residual: Tensor | None = None, *, eps: float = 1e-5, slope: float = 1.0
) -> Tensor:
    r"""Instance norm without affine parameters, leaky ReLU, and the sum with another map, in one op.

    .. math:: y = \text{leaky\_relu}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}\right) + \text{residual}

    with the mean and the (biased) variance over the pixels of each image and channel. Plain PyTorch:
    ``leaky_relu(instance_norm(x, eps=eps), slope) + residual``.

    The compiled kernels keep ``x`` and its moments for the backward, and nothing else.

    Source: Ulyanov et al., "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016.

    Args:
        x: (B, C, H, W).
        residual: like ``x``.
        eps: added to the variance.
        slope: of the leaky ReLU: 0 is ReLU, 1 the identity.

    Returns:
        (B, C, H, W).

    Examples:
        >>> import torch
        >>> from fastnce.ops.instance_norm import instance_norm
        >>> instance_norm(torch.randn(2, 16, 8, 8), slope=0.0).amin() >= 0
        tensor(True)
    """
    kernels = has_kernels(x, x.shape[1:2]) and x.shape[2] * x.shape[3] > 1
    if kernels and (residual is None or residual.shape == x.shape):
        x = autocast_map(x)
        residual = None if residual is None else residual.to(x.dtype)
        return InstanceNormFunction.apply(x, residual, eps, slope)
    return plain(x, residual, eps, slope)


def plain(x: Tensor, residual: Tensor | None, eps: float, slope: float) -> Tensor:
    """``leaky_relu((x - mean) / sqrt(variance + eps), slope) + residual``, moments of each image and channel of ``x``."""
    y = F.instance_norm(x, eps=eps)
    if not torch.jit.is_tracing() and len(x) == 1 and x.device.type == "cpu":
        y = _ContiguousGradient.apply(y)
    if slope != 1:
        y = F.relu(y) if slope == 0 else F.leaky_relu(y, slope)
    return y if residual is None else residual + y


class _ContiguousGradient(torch.autograd.Function):
    """The identity. Its gradient is contiguous: of a channels-last one PyTorch 2.13 makes a wrong gradient on the CPU.

    There, ``F.instance_norm`` of a single image is a batch norm of its (1, B * C, H, W) view, whose backward mistakes the layout
    of the gradient that arrives. Patches taken by index from a map send such gradients.
    """

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous()


class InstanceNormFunction(torch.autograd.Function):
    """Autograd of ``instance_norm`` over the compiled kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, eps: float, slope: float) -> Tensor:
        other = None if residual is None else rows_of(residual)
        y, moments = native.instance_norm_forward(rows_of(x), other, eps, slope)
        ctx.eps, ctx.slope = eps, slope
        ctx.save_for_backward(x, moments)
        return map_of(y)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, moments = ctx.saved_tensors
        need_x, need_residual = ctx.needs_input_grad[:2]
        grad_residual = grad if need_residual else None
        if not need_x:
            return None, grad_residual, None, None
        if torch.is_grad_enabled():
            alone = partial(plain, residual=None, eps=ctx.eps, slope=ctx.slope)
            (grad_x,) = _common.plain_gradients(alone, (x,), (True,), grad)
        else:
            rows = native.instance_norm_backward(rows_of(grad), rows_of(x), moments, ctx.slope)
            grad_x = map_of(rows)
        return grad_x, grad_residual, None, None


def _map_and_moments(x: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    moments = x.new_empty((2, x.shape[0], x.shape[3]), dtype=torch.float32)
    return x.new_empty(x.shape), moments


def _map(x: Tensor, **_: object) -> Tensor:
    return x.new_empty(x.shape)


declare(
    Op("instance_norm", is_loss=False),
    # Maps (B, H, W, C), contiguous. moments (2, B, C), float32: 1 / sqrt(variance + eps), and -mean times it.
    Operator(
        "instance_norm_forward(Tensor x, Tensor? residual, float eps, float slope) -> (Tensor y, Tensor moments)",
        _map_and_moments,
    ),
    # The gradient of x; that of residual is grad.
    Operator(
        "instance_norm_backward(Tensor grad, Tensor x, Tensor moments, float slope) -> Tensor", _map
    ),
    instance_norm=plain,
)
