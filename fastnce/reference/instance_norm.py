"""Instance norm with what follows it, in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def instance_norm(x: Tensor, residual: Tensor | None, eps: float, slope: float) -> Tensor:
    """``leaky_relu((x - mean) / sqrt(variance + eps), slope) + residual``, moments of each image and channel of ``x``."""
    y = F.instance_norm(x, eps=eps)
    if slope != 1:
        y = F.relu(y) if slope == 0 else F.leaky_relu(y, slope)
    return y if residual is None else residual + y
