"""Anti-aliased resampling in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def blur_resample(x: Tensor, kernel: Tensor, halve: bool) -> Tensor:
    """Half the size: ``outer([1, 2, 1]) / 16``, mirrored; or twice the size: ``outer([1, 3, 3, 1]) / 16``, border repeated."""
    channels = x.shape[1]
    if halve:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, stride=2, groups=channels)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    # padding=3 drops the border that the replicated pixels produce, one pixel more than the filter's own 2.
    return F.conv_transpose2d(padded, kernel, stride=2, padding=3, groups=channels)
