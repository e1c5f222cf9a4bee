"""Real digits and photographs that ship inside scikit-learn and scikit-image: no download."""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from fastnce.data.images import read_image, to_array, to_image
from fastnce.errors import UserError

# Photograph -> the package it ships in, and where.
PHOTOS = {
    "coffee": ("skimage", "data/coffee.png"),
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}

DIGIT_SIZE = 32
DIGIT_MARGIN = 4
NOISE_SIGMA = 0.2
# At full size a crop of 32 pixels shows little more than one colour; at this shorter side it shows part of the scene.
BACKGROUND_SIDE = 128


def load_photo(name: str) -> np.ndarray:
    """One of `PHOTOS`: (H, W, 3) uint8. UserError if there is no such photograph, or its package is not installed."""
    if name not in PHOTOS:
        raise UserError(f'photo="{name}": no such photograph. Use one of {", ".join(PHOTOS)}.')
    package, path = PHOTOS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package, f'The photograph "{name}"')
    return to_array(read_image(Path(spec.submodule_search_locations[0], path), 3))


def scaled_photo(name: str, size: int = BACKGROUND_SIDE) -> np.ndarray:
    """One of `PHOTOS`, scaled down (bicubic) to a shorter side of `size` pixels: (H, W, 3) uint8."""
    image = to_image(load_photo(name))
    if not 8 <= size <= min(image.size):
        raise UserError(
            f'size={size}: the photograph "{name}" has {image.width}x{image.height} pixels. '
            f"Use a size of 8 to {min(image.size)}, or another photograph."
        )
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    return to_array(image.resize(scaled, Image.Resampling.BICUBIC))


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits of `load_enlarged_digits` at 24 pixels, with a margin of 4: (1797, 32, 32) and their labels."""
    strokes, labels = load_enlarged_digits(DIGIT_SIZE - 2 * DIGIT_MARGIN)
    margin = (DIGIT_MARGIN, DIGIT_MARGIN)
    return np.pad(strokes, ((0, 0), margin, margin)), labels


def load_enlarged_digits(size: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits, each scaled (bicubic) from its 8x8 pixels to `size` x `size`.

    Returns the strokes (1797, size, size) float32 in [0, 1], 1 for ink, and their digits (1797,) int64.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise _missing("sklearn", "The set of handwritten digits") from error
    bunch = load()
    small = (Image.fromarray((image / 16).astype(np.float32)) for image in bunch.images)
    large = np.stack([x.resize((size, size), Image.Resampling.BICUBIC) for x in small])
    return large.clip(0, 1), bunch.target.astype(np.int64)


def noisy_digit(stroke: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White on black, with sensor noise of sigma 0.2 drawn for each pixel and channel.

    (..., H, W) float32 in [0, 1] to (..., H, W, 3) uint8.
    """
    noise = rng.standard_normal((*stroke.shape, 3), dtype=np.float32)
    return to_bytes(stroke[..., None] + np.float32(NOISE_SIGMA) * noise)


def composite(stroke: np.ndarray, background: np.ndarray) -> np.ndarray:
    """|photo - digit|: the photograph, with its colours inverted where there is ink.

    (..., H, W) float32 in [0, 1] and (..., H, W, 3) uint8 to (..., H, W, 3) uint8.
    """
    return to_bytes(np.abs(background.astype(np.float32) / 255 - stroke[..., None]))


def split_photo(name: str, image: np.ndarray, size: int) -> dict[str, tuple[np.ndarray, int]]:
    """Divides a photograph (H, W, C) into a left part for training and a right one for testing, with the columns where they start.

    The right part is a quarter of the width, or `size`, the side of the crops to come, if that is more. UserError if a crop does
    not fit into both.
    """
    height, width = image.shape[:2]
    test_width = max(size, width // 4)
    if size < 4 or width - test_width < size or height < size:
        raise UserError(
            f'size={size}: does not fit the photograph "{name}" ({width}x{height}), which is '
            "divided into a part for training and one for testing. "
            f"Use a size of 4 to {min(width // 2, height)}, or another photograph."
        )
    start = width - test_width
    return {"train": (image[:, :start], 0), "test": (image[:, start:], start)}


def random_crop(
    image: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int]]:
    """A random square of `size` pixels of (H, W, C), and its upper left corner (y, x)."""
    y = int(rng.integers(image.shape[0] - size + 1))
    x = int(rng.integers(image.shape[1] - size + 1))
    return image[y : y + size, x : x + size], (y, x)


def random_crops(photo: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 32, 32, 3) uint8 from random places of a photograph (H, W, 3)."""
    window = np.arange(DIGIT_SIZE)
    y, x = (rng.integers(side - DIGIT_SIZE + 1, size=count) for side in photo.shape[:2])
    return photo[(y[:, None] + window)[:, :, None], (x[:, None] + window)[:, None, :]]


def to_bytes(values: np.ndarray) -> np.ndarray:
    """[0, 1] to uint8, rounded; values beyond are clipped."""
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)


def _missing(package: str, what: str) -> UserError:
    distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
    return UserError(
        f"{what} comes with {distribution}, which is not installed. Run: pip install 'fastnce[demo]'"
    )
