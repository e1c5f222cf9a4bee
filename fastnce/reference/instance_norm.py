"""Instance norm with what follows it, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def instance_norm(x: Tensor, residual: Tensor | None, eps: float, slope: float) -> Tensor:
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
