"""Instance norm, with what follows it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastnce.backends import native_maps
from fastnce.ops import _common, maps
from fastnce.reference.instance_norm import instance_norm as reference_instance_norm


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

    Example:
        >>> import torch
        >>> from fastnce.ops.instance_norm import instance_norm
        >>> instance_norm(torch.randn(2, 16, 8, 8), slope=0.0).amin() >= 0
        tensor(True)
    """
    kernels = maps.has_kernels(x, x.shape[1:2]) and x.shape[2] * x.shape[3] > 1
    if kernels and (residual is None or residual.shape == x.shape):
        x = maps.autocast_map(x)
        residual = None if residual is None else residual.to(x.dtype)
        return InstanceNormFunction.apply(x, residual, eps, slope)
    return reference_instance_norm(x, residual, eps, slope)


class InstanceNormFunction(torch.autograd.Function):
    """Autograd of :func:`instance_norm` over the compiled kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, eps: float, slope: float) -> Tensor:
        y, moments = native_maps.instance_norm_forward(x, residual, eps, slope)
        ctx.eps, ctx.slope = eps, slope
        ctx.save_for_backward(x, moments)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, moments = ctx.saved_tensors
        need_x, need_residual = ctx.needs_input_grad[:2]
        grad_residual = grad if need_residual else None
        if not need_x:
            return None, grad_residual, None, None
        if torch.is_grad_enabled():
            plain = partial(reference_instance_norm, residual=None, eps=ctx.eps, slope=ctx.slope)
            (grad_x,) = _common.plain_gradients(plain, (x,), (True,), grad)
        else:
            grad_x = native_maps.instance_norm_backward(grad, x, moments, ctx.slope)
        return grad_x, grad_residual, None, None
