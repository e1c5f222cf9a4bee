"""Differentiable augmentations of image batches: DiffAugment, and the one of consistency regularisation.

Every image of a batch gets its own draw. Gradient flows to the images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def diff_augment(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Colour, translation and cutout, the policy of DiffAugment (Zhao et al. 2020, https://arxiv.org/abs/2006.10738).

    Brightness moves by a uniform draw from [-0.5, 0.5], saturation is scaled by one from [0, 2] and contrast by one from
    [0.5, 1.5]; then the image moves by up to 1/8 of its size, with zeros behind it, and a square of half its size becomes zero.

    Args:
        images: (N, C, H, W).
        generator: what to draw from, on the images' device; by default torch's own.
    """
    images = _colour(images, generator)
    return _cutout(_translation(images, "constant", generator), generator)


def flip_and_translate(images: Tensor) -> Tensor:
    """Mirrors each image, (N, C, H, W), with probability 1/2 and moves it by up to 1/8 of its size, reflected at the borders.

    The augmentation of consistency regularisation (Zhang et al. 2020, https://arxiv.org/abs/1910.12027).
    """
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return _translation(torch.where(mirrored, images.flip(3), images), "reflect", None)


def _colour(images: Tensor, generator: torch.Generator | None) -> Tensor:
    images = images + _uniform(images, -0.5, 0.5, generator)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * _uniform(images, 0.0, 2.0, generator)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * _uniform(images, 0.5, 1.5, generator)


def _translation(images: Tensor, border: str, generator: torch.Generator | None) -> Tensor:
    """Moves each image by whole pixels, up to 1/8 of its height and width; `border` is a mode of `F.pad`."""
    height, width = images.shape[2:]
    reach_y, reach_x = int(height / 8 + 0.5), int(width / 8 + 0.5)
    padded = F.pad(images, (reach_x, reach_x, reach_y, reach_y), mode=border)
    rows = _window(images, height, reach_y, generator)[:, :, None]  # (N, H, 1)
    columns = _window(images, width, reach_x, generator)[:, None, :]  # (N, 1, W)
    number = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[number, rows, columns].permute(0, 3, 1, 2)


def _window(images: Tensor, side: int, reach: int, generator: torch.Generator | None) -> Tensor:
    """(N, side): positions of the image along one side of the padded image, after its move."""
    move = _integers(images, 0, 2 * reach, generator)
    return move + torch.arange(side, device=images.device)


def _cutout(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sets a square of half the height and width to zero; its centre is anywhere, so it may stick out."""
    height, width = images.shape[2:]
    rows = _outside(images, height, generator)[:, :, None]
    columns = _outside(images, width, generator)[:, None, :]
    return images * (rows | columns)[:, None]


def _outside(images: Tensor, side: int, generator: torch.Generator | None) -> Tensor:
    """(N, side) bool: positions that the square does not reach."""
    cut = side // 2
    start = _integers(images, 0, side - cut % 2, generator) - cut // 2
    position = torch.arange(side, device=images.device)
    return (position < start) | (position >= start + cut)


def _uniform(images: Tensor, low: float, high: float, generator: torch.Generator | None) -> Tensor:
    """(N, 1, 1, 1), one draw for each image."""
    shape, device = (len(images), 1, 1, 1), images.device
    draw = torch.rand(shape, dtype=images.dtype, device=device, generator=generator)
    return low + (high - low) * draw


def _integers(images: Tensor, low: int, high: int, generator: torch.Generator | None) -> Tensor:
    """(N, 1), one draw from low to high, both included, for each image."""
    shape, device = (len(images), 1), images.device
    return torch.randint(low, high + 1, shape, device=device, generator=generator)
