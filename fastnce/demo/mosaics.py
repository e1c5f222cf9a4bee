"""Mosaics of textures, and the parts of photographs that they are cut from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastnce.demo.sets import random_crop
from fastnce.errors import UserError


class Parts(NamedTuple):
    """Three parts of a photograph, each (H, W, 3) uint8, that share no pixel."""

    train: np.ndarray
    judge: np.ndarray
    """For the networks that judge, alone."""
    test: np.ndarray


def three_parts(what: str, image: np.ndarray, size: int) -> Parts:
    """Cuts (H, W, 3) across its longer side (of a square, the height): the end for testing, what is before it for the judges.

    The parts for testing and for the judges are a quarter and a fifth, or `size` if that is more. UserError, which names `what`
    it is, unless crops of `size` fit into all three.
    """
    height, width = image.shape[:2]
    length = max(height, width)
    test, judge = max(size, length // 4), max(size, length // 5)
    if min(height, width) < size or length - test - judge < size:
        raise UserError(
            f"size={size}: does not fit {what} ({width}x{height}), which is divided into parts for training, for the judges and for "
            f"testing. Use a size of at most {min(height, width, length // 3)}."
        )
    train, middle, end = np.split(
        image, [length - test - judge, length - test], int(width > height)
    )
    return Parts(train, middle, end)


def mosaic(
    textures: Sequence[np.ndarray], size: int, cells: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """A square of random Voronoi cells, each with a crop of a random texture.

    Args:
        textures: (H, W, 3) uint8 each.
        size: side in pixels.
        cells: how many.
        rng: draws the cells' points, their textures and the crops.

    Returns:
        The image (size, size, 3) uint8; the cell of each pixel (size, size) uint8; of each cell "texture" and "corner" (y, x).
    """
    points = rng.random((cells, 2)) * size
    centres = np.arange(size) + 0.5
    squared = (centres[:, None, None] - points[:, 0]) ** 2
    squared = squared + (centres[None, :, None] - points[:, 1]) ** 2
    cell = squared.argmin(2).astype(np.uint8)
    image = np.empty((size, size, 3), np.uint8)
    told = []
    for number, texture in enumerate(rng.integers(len(textures), size=cells).tolist()):
        crop, corner = random_crop(textures[texture], size, rng)
        here = cell == number
        image[here] = crop[here]
        told.append({"texture": texture, "corner": corner})
    return image, cell, told
