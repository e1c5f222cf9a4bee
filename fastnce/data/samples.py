"""Real digits and photographs that ship inside scikit-learn and scikit-image: no download."""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from fastnce.data.folders import read_image, to_array, to_image
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

_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def load_photo(name: str) -> np.ndarray:
    """One of `PHOTOS`, read from the package it ships in: (H, W, 3) uint8.

    Raises:
        UserError: If there is no such photograph, or its package is not installed.
    """
    if name not in PHOTOS:
        raise UserError(f'photo="{name}": no such photograph. Use one of {", ".join(PHOTOS)}.')
    package, path = PHOTOS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package, f'The photograph "{name}"')
    return to_array(read_image(Path(spec.submodule_search_locations[0], path), 3))


def load_background(name: str) -> np.ndarray:
    """One of `PHOTOS`, scaled (bicubic) to a shorter side of 128 pixels: (H, W, 3) uint8."""
    return scaled_photo(name, BACKGROUND_SIDE)


def scaled_photo(name: str, size: int) -> np.ndarray:
    """One of `PHOTOS`, scaled down (bicubic) to a shorter side of `size` pixels: (H, W, 3) uint8.

    Raises:
        UserError: If `size` is below 8 or above the photograph's, there is no such photograph, or its package is not installed.
    """
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
    """scikit-learn's 1,797 handwritten digits, enlarged threefold (bicubic) into 32x32 pixels.

    Returns:
        strokes: (1797, 32, 32) float32 in [0, 1], 1 for ink.
        labels: (1797,) int64, 0 to 9.

    Raises:
        UserError: If scikit-learn is not installed.
    """
    strokes, labels = load_enlarged_digits(DIGIT_SIZE - 2 * DIGIT_MARGIN)
    margin = (DIGIT_MARGIN, DIGIT_MARGIN)
    return np.pad(strokes, ((0, 0), margin, margin)), labels


def load_enlarged_digits(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The same digits, each scaled (bicubic) from its 8x8 pixels to `size` x `size`, without a margin.

    Returns:
        strokes: (1797, size, size) float32 in [0, 1], 1 for ink.
        labels: (1797,) int64, 0 to 9.

    Raises:
        UserError: If scikit-learn is not installed.
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

    Args:
        stroke: (..., H, W) float32 in [0, 1].
        rng: Where the noise is drawn from.

    Returns:
        (..., H, W, 3) uint8.
    """
    noise = rng.standard_normal((*stroke.shape, 3), dtype=np.float32)
    return to_bytes(stroke[..., None] + np.float32(NOISE_SIGMA) * noise)


def composite(stroke: np.ndarray, background: np.ndarray) -> np.ndarray:
    """|photo - digit|: the photograph, with its colours inverted where there is ink.

    Args:
        stroke: (..., H, W) float32 in [0, 1].
        background: (..., H, W, 3) uint8.

    Returns:
        (..., H, W, 3) uint8.
    """
    return to_bytes(np.abs(background.astype(np.float32) / 255 - stroke[..., None]))


def split_photo(name: str, image: np.ndarray, size: int) -> dict[str, tuple[np.ndarray, int]]:
    """Divides a photograph into a left part for training and a right one for testing.

    The right part is a quarter of the width, or `size` if that is more.

    Args:
        name: The photograph's name, for the error.
        image: (H, W, C) uint8.
        size: Side of the crops that will be taken.

    Returns:
        {"train": (part, column), "test": (part, column)}: the pixels, and where in `image` they start.

    Raises:
        UserError: If a crop does not fit into both parts.
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


def to_bytes(values: np.ndarray) -> np.ndarray:
    """[0, 1] to uint8, rounded; values beyond are clipped."""
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)


def _missing(package: str, what: str) -> UserError:
    return UserError(
        f"{what} comes with {_DISTRIBUTIONS[package]}, which is not installed. "
        "Run: pip install 'fastnce[demo]'"
    )
