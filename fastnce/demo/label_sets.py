"""The built-in sets of label maps and photographs: mosaics of textures, and posterised photographs."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from fastnce.data.images import to_array, to_image
from fastnce.data.stream import counter_rng
from fastnce.demo.mosaics import Parts, divide, mosaic
from fastnce.demo.sets import (
    PHOTOS,
    Images,
    load_packaged,
    scaled_photo,
    write_once,
)
from fastnce.demo.texture_networks import TextureRecipe, write_networks
from fastnce.errors import UserError


class Texture(NamedTuple):
    """A part of a photograph that looks much the same everywhere."""

    package: str
    path: str
    box: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom; None for the whole photograph."""
    scale: float = 1.0
    """So that a cell shows several of what the texture is made of."""


# The label of a mosaic's cell is the place of its texture in this list.
TEXTURES = {
    "petals": Texture("sklearn", "datasets/images/flower.jpg", (205, 105, 405, 330)),
    "foliage": Texture("sklearn", "datasets/images/china.jpg", (360, 345, 560, 427)),
    "tissue": Texture("skimage", "data/ihc.png", scale=0.5),
    "wood": Texture("skimage", "data/coffee.png", (485, 190, 600, 400)),
    "gravel": Texture("skimage", "data/gravel.png", scale=0.5),
    "brick": Texture("skimage", "data/brick.png", scale=0.5),
    "stars": Texture("skimage", "data/hubble_deep_field.jpg", scale=0.5),
    "roof": Texture("sklearn", "datasets/images/china.jpg", (110, 135, 320, 340)),
    "grass": Texture("skimage", "data/grass.png", scale=0.5),
}

LEVELS = 8

_MOSAIC_STREAM, _POSTERISED_STREAM = 30, 31
_SPLITS = ("train", "test")


def write_texture_mosaics(
    out: Path | str,
    size: int = 32,
    *,
    cells: int = 4,
    textures: int = 6,
    train_count: int = 1000,
    test_count: int = 250,
    seed: int = 0,
    networks: TextureRecipe | None = TextureRecipe(),  # noqa: B008 frozen
    progress: bool = True,
) -> Path:
    """Writes the texture-mosaics set: random cells as label maps, and images in which each cell shows a texture.

    The cells of an image are those of a Voronoi diagram of random points; each has a random one of the first `textures` of
    `TEXTURES`, and shows a random crop of it. The crops of the test images come from other parts of the photographs than those
    of the training images, and the judges' from a third one. `out/labels.json` holds the recipe, and for each label map the
    texture of each cell and the corner of its crop.

    Beside the images there are three networks: see `fastnce.demo.texture_networks.write_networks`.

    Args:
        out: Folder to write: `train_label`, `train_img`, `train_inst`, `test_label`, `test_img` and `test_inst`, of PNG files, the
            layout "folders" of `fastnce.data.LabelMaps`. Labels are 0 to `textures` - 1, instances the numbers of the cells.
        size: Side of the images in pixels, at most 66.
        cells: Cells of an image, 1 to 255; each has a random texture, and is an instance.
        textures: How many textures, 2 to 9; the labels are 0 to `textures` - 1.
        train_count, test_count: Images for training and for testing.
        seed: Seed of the cells and the crops.
        networks: How the networks are trained, or None for none.
        progress: Shows a bar while they are trained.

    Raises:
        UserError: An argument is out of range, a texture is too small for `size`, a package is missing, or `out` holds something
            else or cannot be written.
    """
    _expect_within("cells", cells, 1, 255)
    _expect_within("textures", textures, 2, len(TEXTURES))
    _expect_counts(size, train_count, test_count)
    names = list(TEXTURES)[:textures]
    settings = {
        "seed": seed,
        "size": size,
        "cells": cells,
        "textures": names,
        "train_count": train_count,
        "test_count": test_count,
        "networks": networks and networks.settings(),
    }
    parts = [divide(f'the texture "{name}"', load_texture(name), size) for name in names]
    counts = {"train": train_count, "test": test_count}

    def more(folder: Path) -> dict[str, Any]:
        return write_networks(folder, parts, size, networks, progress=progress)

    made = lambda: _mosaics(parts, size, cells, counts, seed)  # noqa: E731
    return write_once(Path(out), "texture-mosaics", settings, made, networks and more)


def write_posterised_photos(
    out: Path | str,
    size: int = 32,
    *,
    train_count: int = 1000,
    test_count: int = 250,
    seed: int = 0,
    networks: TextureRecipe | None = TextureRecipe(),  # noqa: B008 frozen
    progress: bool = True,
) -> Path:
    """Writes the posterised-photos set: crops of the seven photographs, and their luminance, blurred and quantised to 8 levels.

    What is to be predicted is colour and texture: the label map has only the large areas of light and dark. Each photograph is
    scaled (bicubic) so that a crop shows about a sixth of its height. Test crops come from other bands of the photographs than training crops, and
    the judges' from others again.

    Args:
        out: Folder to write: `train_label`, `train_img`, `test_label` and `test_img`, of PNG files. Labels are 0 (dark) to 7.
        size: Side of the images in pixels, at most 100.
        train_count, test_count: Images for training and for testing, of all photographs together.
        seed: Seed of the crops.
        networks: As of `write_texture_mosaics`; critic and judge tell the photographs apart, and there is no segmenter.
        progress: Shows a bar while they are trained.

    Raises:
        UserError: As `write_texture_mosaics`.
    """
    _expect_counts(size, train_count, test_count)
    settings = {
        "seed": seed,
        "size": size,
        "levels": LEVELS,
        "photos": list(PHOTOS),
        "train_count": train_count,
        "test_count": test_count,
        "networks": networks and networks.settings(),
    }
    side = min(6 * size, 300)  # the smallest of them is 300 pixels high
    parts = [divide(f'the photograph "{x}"', scaled_photo(x, side), size) for x in PHOTOS]
    counts = {"train": train_count, "test": test_count}

    def more(folder: Path) -> dict[str, Any]:
        return write_networks(folder, parts, size, networks, segmenter=False, progress=progress)

    made = lambda: _posterised(parts, size, counts, seed)  # noqa: E731
    return write_once(Path(out), "posterised-photos", settings, made, networks and more)


def posterise(image: np.ndarray, size: int) -> np.ndarray:
    """The luminance of (H, W, 3) uint8, blurred with a sigma of a sixteenth of `size` and quantised: (H, W) uint8, 0 to 7."""
    blurred = to_image(image).convert("L").filter(ImageFilter.GaussianBlur(size / 16))
    return np.asarray(blurred) // (256 // LEVELS)


def _mosaics(
    parts: list[Parts], size: int, cells: int, counts: dict[str, int], seed: int
) -> Images:
    for split in _SPLITS:
        textures = [getattr(part, split) for part in parts]
        for number in range(counts[split]):
            rng = counter_rng(seed, _MOSAIC_STREAM, 2 * number + (split == "test"))
            image, cell, told = mosaic(textures, size, cells, rng)
            label = np.array([one["texture"] for one in told], np.uint8)[cell]
            yield f"{split}_label/{number:04d}.png", label[:, :, None], {"cells": told}
            yield f"{split}_img/{number:04d}.png", image, {}
            yield f"{split}_inst/{number:04d}.png", cell[:, :, None], {}


def _posterised(parts: list[Parts], size: int, counts: dict[str, int], seed: int) -> Images:
    names, levels = list(PHOTOS), [posterise(part.train.image, size) for part in parts]
    for split in _SPLITS:
        for number in range(counts[split]):
            rng = counter_rng(seed, _POSTERISED_STREAM, 2 * number + (split == "test"))
            chosen = number % len(parts)
            image, (y, x) = getattr(parts[chosen], split).crop(size, rng)
            label = levels[chosen][y : y + size, x : x + size, None]
            told = {"photo": names[chosen], "corner": (y, x)}
            yield f"{split}_label/{number:04d}.png", label, told
            yield f"{split}_img/{number:04d}.png", image, {}


def load_texture(name: str) -> np.ndarray:
    """One of `TEXTURES`, at its scale: (H, W, 3) uint8. UserError if its package is not installed."""
    package, path, box, scale = TEXTURES[name]
    image = to_image(load_packaged(package, path, f'The texture "{name}"')).crop(box)
    size = (round(image.width * scale), round(image.height * scale))
    return to_array(image.resize(size, Image.Resampling.BICUBIC))


def _expect_counts(size: int, train_count: int, test_count: int) -> None:
    _expect_within("size", size, 16, None)
    _expect_within("train_count", train_count, 1, None)
    _expect_within("test_count", test_count, 1, None)


def _expect_within(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"{low} to {high}"
        raise UserError(f"{name}={value}: expected {limits}.")
