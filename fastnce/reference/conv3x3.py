"""3x3 convolution in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, reflect: bool) -> Tensor:
    """``x`` (B, C, H, W), padded by 1 with its mirror image or with zeros, convolved with ``weight`` (K, C, 3, 3)."""
    if reflect:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight, bias)
    return F.conv2d(x, weight, bias, padding=1)
