"""Images of one number of channels as images of another: what an encoder needs to see what its own generator made."""

from __future__ import annotations

from torch import Tensor

# Luma of ITU-R BT.601. It keeps the range [-1, 1], because the weights add up to 1.
_RED, _GREEN, _BLUE = 0.299, 0.587, 0.114


def can_convert(source: int, target: int) -> bool:
    """Whether `convert_channels` turns images of `source` channels into images of `target` channels."""
    return source == target or {source, target} == {1, 3}


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """RGB as grey, grey as RGB, or the images themselves; differentiable.

    Grey is the luma 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), RGB the same grey three times.

    Args:
        images: (N, C, H, W), C = 1 or 3, or already `channels`.
        channels: 1 or 3.

    Returns:
        (N, channels, H, W).

    Raises:
        ValueError: any other pair of numbers.

    Example:
        >>> import torch
        >>> convert_channels(torch.zeros(2, 3, 8, 8), 1).shape
        torch.Size([2, 1, 8, 8])
    """
    given = images.shape[1]
    if given == channels:
        return images
    if not can_convert(given, channels):
        raise ValueError(
            f"convert_channels: images have {given} channels, expected {channels}; only 1 and 3 turn into each other. "
            "Use the same number of channels for both."
        )
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    red, green, blue = images.split(1, dim=1)
    return _RED * red + _GREEN * green + _BLUE * blue
