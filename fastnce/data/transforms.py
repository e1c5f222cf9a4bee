"""From an image file's pixels to the network: scaling, cutting, warping, mirroring.

Every random choice comes from a generator that is made from (seed, stream, index), so an image's
augmentation depends on nothing but these: not on the order of reading, the number of workers, or
where a run was resumed.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastnce.data.images import Bands, resize, to_array, to_image
from fastnce.errors import UserError

RANDOM_TOKENS = ("zoom", "crop", "patch", "trim")
TOKENS = ("resize", "fixsize", "scale_width", "scale_shortside", *RANDOM_TOKENS, "none")

# The `fixed_size` of a folder's images before the first one's is known.
OF_FIRST_IMAGE = (0, 0)

# zoom scales each side by a factor of its own, drawn uniformly between these.
ZOOM = (0.8, 1.0)

MAX_ROTATION = math.radians(10)
MAX_SHIFT = 1 / 20
MAX_SCALING = 0.08


def multiple_size(width: int, height: int, multiple: int = 4) -> tuple[int, int]:
    """The size whose sides are the nearest multiples, each at least one multiple."""
    return tuple(max(multiple, round(side / multiple) * multiple) for side in (width, height))


def resize_to_multiple(image: Image.Image | Bands, multiple: int = 4) -> Image.Image | Bands:
    """Resizes (bicubic) so that both sides are multiples, which two halvings and doublings need."""
    return resize(image, *multiple_size(*image.size, multiple))


@dataclass(frozen=True)
class Preprocess:
    """Scale, cut, round to a multiple, warp, flip: in this order, each only if asked for.

    `prepare` is the part that is the same every time and can be cached, `augment` the random part.

    `steps` names what is done, matched by substring as CUT's `--preprocess` is, for instance
    "resize_and_crop". Each time the same, in this order:

    - "fixsize" scales to `fixed_size` (for a folder: that of its first image),
    - "resize" to a square of `load_size`, or "scale_width" or "scale_shortside" that side to
      `load_size`, keeping the aspect;

    at random:

    - "zoom" shrinks each side by a factor of its own between 0.8 and 1, but not below `crop_size`,
    - "crop" cuts a square of `crop_size`,
    - "patch" cuts a cell of a grid of such squares that has a random offset,
    - "trim" cuts the sides that are longer than `crop_size` to it.

    "none" does nothing.

    Sides are rounded to a `multiple`. `nearest` takes the nearest pixel in the place of a bicubic mean, as label maps need it.
    """

    steps: str = "resize_and_crop"
    load_size: int = 286
    crop_size: int = 256
    flip: bool = True
    affine: bool = False
    fixed_size: tuple[int, int] | None = None
    multiple: int = 4
    nearest: bool = False

    def __post_init__(self) -> None:
        # Each part, so that a misspelt one is not silently left out.
        if not all(any(token in part for token in TOKENS) for part in self.steps.split("_and_")):
            raise UserError(
                f'preprocess="{self.steps}": names an unknown step. Use {", ".join(TOKENS)}, '
                'one or more of them joined as in "resize_and_crop".'
            )
        for name, size in (("load_size", self.load_size), ("crop_size", self.crop_size)):
            if size < 1:
                raise UserError(f"{name}={size}: expected a number of pixels, at least 1.")
        if "fixsize" in self.steps and self.fixed_size is None:
            raise ValueError('Preprocess: steps with "fixsize" need fixed_size=(width, height).')
        if self.crops and self._scales and self.load_size < self.crop_size:
            raise UserError(
                f"load_size={self.load_size} is smaller than crop_size={self.crop_size}: no crop "
                f"fits. Use a load_size of at least {self.crop_size}, or a smaller crop_size."
            )

    @property
    def crops(self) -> bool:
        """Whether the result is a square of `crop_size`, whatever the image was."""
        return "crop" in self.steps or "patch" in self.steps

    @property
    def _scales(self) -> bool:
        return any(token in self.steps for token in ("resize", "scale_width", "scale_shortside"))

    def prepared_size(self, width: int, height: int) -> tuple[int, int]:
        """The size of `prepare`'s result for an image of this width and height."""
        if "fixsize" in self.steps:
            width, height = self.fixed_size
        if "resize" in self.steps:
            return self.load_size, self.load_size
        if "scale_width" in self.steps:
            return self.load_size, max(1, round(height * self.load_size / width))
        if "scale_shortside" in self.steps:
            scale = self.load_size / min(width, height)
            return max(1, round(width * scale)), max(1, round(height * scale))
        return width, height

    def output_size(self, width: int, height: int) -> tuple[int, int] | None:
        """The size that an image of this width and height has in the end; None if it is random."""
        if self.crops:
            return multiple_size(self.crop_size, self.crop_size, self.multiple)
        if "zoom" in self.steps:
            return None
        width, height = self.prepared_size(width, height)
        if "trim" in self.steps:
            width, height = min(width, self.crop_size), min(height, self.crop_size)
        return multiple_size(width, height, self.multiple)

    def output_sizes(self, width: int, height: int) -> list[tuple[int, int]]:
        """The size that an image has in the end; the least and the greatest if it is random."""
        result = self.output_size(width, height)
        if result is not None:
            return [result]
        width, height = self.prepared_size(width, height)
        least = (max(self.crop_size, round(side * ZOOM[0])) for side in (width, height))
        greatest = (max(self.crop_size, side) for side in (width, height))
        sizes = [tuple(least), tuple(greatest)]
        if "trim" in self.steps:
            sizes = [tuple(min(side, self.crop_size) for side in size) for size in sizes]
        return [multiple_size(*size, self.multiple) for size in sizes]

    def check(self, name: object, width: int, height: int) -> None:
        """Raises UserError, naming the file, if an image of this size is smaller than the crop."""
        prepared = self.prepared_size(width, height)
        if self.crops and "zoom" not in self.steps and min(prepared) < self.crop_size:
            size = f"{width}x{height}"
            if prepared != (width, height):
                size += f" ({prepared[0]}x{prepared[1]} after scaling)"
            other, what = "resize_and_crop", "every image"
            if "scale_width" in self.steps:
                other, what = "scale_shortside_and_crop", "the shorter side"
            raise UserError(
                f"{name}: {size} is smaller than the crop of {self.crop_size}x{self.crop_size}. "
                f'Use a crop_size of at most {min(prepared)}, or preprocess="{other}" to scale {what} to load_size first.'
            )

    def prepare(self, image: Image.Image | Bands) -> np.ndarray:
        """Scales. Returns (H, W, C) uint8, uint16 of an image of 16 bits, or float32 of one with a range of values."""
        size = self.prepared_size(*image.size)
        return to_array(resize(image, *size, nearest=self.nearest))

    def augment(self, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The random part: (H, W, C) in and out, of the same type."""
        if "zoom" in self.steps:
            array = _zoom(array, self.crop_size, rng)
        if "crop" in self.steps:
            array = _cut(array, self.crop_size, rng)
        if "patch" in self.steps:
            array = _cut_cell(array, self.crop_size, rng)
        if "trim" in self.steps:
            array = _cut(array, self.crop_size, rng)
        if array.shape[0] % self.multiple or array.shape[1] % self.multiple:
            image = to_image(array)
            size = multiple_size(*image.size, self.multiple)
            array = to_array(resize(image, *size, nearest=self.nearest))
        if self.affine:
            array = warp(array, draw_affine(rng))
        if self.flip and rng.random() < 0.5:
            array = array[:, ::-1]
        return array


def _zoom(array: np.ndarray, least: int, rng: np.random.Generator) -> np.ndarray:
    factors = rng.uniform(*ZOOM, size=2)
    height, width = (
        max(least, round(side * factor))
        for side, factor in zip(array.shape[:2], factors, strict=True)
    )
    return to_array(resize(to_image(array), width, height))


def _cut(array: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random piece with sides of `size`, or of the whole length where that is shorter."""
    top = rng.integers(max(array.shape[0] - size, 0) + 1)
    left = rng.integers(max(array.shape[1] - size, 0) + 1)
    return array[top : top + size, left : left + size]


def _cut_cell(array: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random cell of a grid of squares of `size` with a random offset."""
    starts = []
    for side in array.shape[:2]:
        cells, room = divmod(side, size)
        starts.append(rng.integers(room + 1) + size * rng.integers(cells))
    top, left = starts
    return array[top : top + size, left : left + size]


class Affine(NamedTuple):
    """A small similarity: rotation in radians, scaling factor, shifts as shares of the side."""

    rotation: float
    scaling: float
    shift_y: float
    shift_x: float


def draw_affine(rng: np.random.Generator) -> Affine:
    """Uniform within +-10 degrees, +-8 % of the size and +-1/20 of the side."""
    u = 2 * rng.random(4) - 1
    return Affine(MAX_ROTATION * u[0], 1 + MAX_SCALING * u[1], MAX_SHIFT * u[2], MAX_SHIFT * u[3])


def warp(array: np.ndarray, affine: Affine) -> np.ndarray:
    """Turns and scales an array (H, W, C) about the centre, then shifts.

    Takes the nearest pixel, because any average of neighbours would weaken sensor noise, and then
    training would see less of it than testing. Beyond the border the image is mirrored, which
    leaves no edge without noise either.
    """
    height, width = array.shape[:2]
    y, x = _centred_grid(height, width)
    y, x = y - affine.shift_y * height, x - affine.shift_x * width
    cos = math.cos(affine.rotation) / affine.scaling
    sin = math.sin(affine.rotation) / affine.scaling
    rows = _mirror(cos * y - sin * x + (height - 1) / 2, height)
    columns = _mirror(sin * y + cos * x + (width - 1) / 2, width)
    return array[rows, columns]


@lru_cache(maxsize=8)
def _centred_grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    y = np.arange(height, dtype=np.float32)[:, None] - np.float32((height - 1) / 2)
    x = np.arange(width, dtype=np.float32)[None, :] - np.float32((width - 1) / 2)
    return y, x


def _mirror(position: np.ndarray, size: int) -> np.ndarray:
    """The nearest index, mirrored about the first and the last; a small warp needs it once."""
    index = np.abs(np.rint(position).astype(np.int64))
    return np.maximum(size - 1 - np.abs(size - 1 - index), 0)
