"""Mosaics of textures, and the parts of photographs that they are cut from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastnce.demo.sets import random_crop
from fastnce.errors import UserError


class Part(NamedTuple):
    """Bands of a photograph."""

    image: np.ndarray
    """The whole of it, (H, W, 3) uint8."""
    bands: tuple[tuple[slice, slice], ...]
    """Rows and columns of each."""

    def crop(self, size: int, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int]]:
        """A random square of `size` pixels from one of the bands, and its upper left corner (y, x) in the photograph."""
        rows, columns = self.bands[rng.integers(len(self.bands))]
        crop, (y, x) = random_crop(self.image[rows, columns], size, rng)
        return crop, (y + rows.start, x + columns.start)


class Parts(NamedTuple):
    """Three parts of a photograph that share no pixel."""

    train: Part
    judge: Part
    """For the networks that judge, alone."""
    test: Part


def divide(what: str, image: np.ndarray, size: int) -> Parts:
    """Divides (H, W, 3) into bands across its longer side (of a square, the height): of training, testing, training, judges, training.

    Where crops of `size` do not fit into five, there are three: of training, of a fifth or `size` for the judges, and of a quarter
    or `size` for testing. UserError, which names `what` it is, unless crops fit into these.
    """
    height, width = image.shape[:2]
    length = max(height, width)
    test, judge = max(size, length // 4), max(size, length // 5)
    if min(height, width) < size or length - test - judge < size:
        raise UserError(
            f"size={size}: does not fit {what} ({width}x{height}), which is divided into parts for training, for the judges and for "
            f"testing. Use a size of at most {min(height, width, length // 3)}."
        )
    cuts, roles = [0, length - test - judge, length - test, length], "train judge test"
    if length >= 5 * size:
        cuts = [length * number // 5 for number in range(6)]
        roles = "train test train judge train"
    bands: dict[str, list[tuple[slice, slice]]] = {"train": [], "judge": [], "test": []}
    for role, start, end in zip(roles.split(), cuts, cuts[1:], strict=False):
        along, across = slice(start, end), slice(0, min(height, width))
        bands[role].append((across, along) if width > height else (along, across))
    return Parts(*(Part(image, tuple(bands[role])) for role in Parts._fields))


def mosaic(
    textures: Sequence[Part], size: int, cells: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """A square of random Voronoi cells, each with a crop of a random texture.

    Args:
        textures: what the crops come from.
        size: side in pixels.
        cells: how many.
        rng: draws the cells' points, their textures and the crops.

    Returns:
        The image (size, size, 3) uint8; the cell of each pixel (size, size) uint8; of each cell "texture" and "corner" (y, x) in its photograph.
    """
    points = rng.random((cells, 2)) * size
    centres = np.arange(size) + 0.5
    squared = (centres[:, None, None] - points[:, 0]) ** 2
    squared = squared + (centres[None, :, None] - points[:, 1]) ** 2
    cell = squared.argmin(2).astype(np.uint8)
    image = np.empty((size, size, 3), np.uint8)
    told = []
    for number, texture in enumerate(rng.integers(len(textures), size=cells).tolist()):
        crop, corner = textures[texture].crop(size, rng)
        here = cell == number
        image[here] = crop[here]
        told.append({"texture": texture, "corner": corner})
    return image, cell, told
