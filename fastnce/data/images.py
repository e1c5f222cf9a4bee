"""Reading and writing image files."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from fastnce.errors import UserError
from fastnce.files import atomic_path

# All that Pillow reads, but for documents, films, icons and tables, and numpy's arrays.
# fmt: off
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".pfm", ".webp", ".avif", ".avifs", ".gif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".tga", ".icb", ".vda", ".vst",
    ".pcx", ".dcx", ".sgi", ".rgb", ".rgba", ".bw", ".ras", ".qoi", ".psd", ".dds", ".im", ".msp", ".pxr", ".pcd",
    ".xbm", ".xpm", ".npy",
)
# fmt: on

# Of the formats that lose something, how little: 95 of 100.
_SAVE_OPTIONS = dict.fromkeys((".jpg", ".jpeg", ".webp"), {"quality": 95})

# Raised by Pillow and numpy of files that are none of theirs, cut off or damaged.
_BROKEN = (
    *(OSError, EOFError, SyntaxError, ValueError, LookupError, NotImplementedError),
    struct.error,
)

_GREY_16, _LOST_BITS = "16-bit grey", "16 bits per channel, read as 8"
_KINDS = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with alpha",
    "P": "palette",
    "RGBA": "RGB with alpha",
    "I": "32-bit integers",
    "F": "32-bit floating-point numbers",
}


def _signed_unit(dtype: type[np.unsignedinteger]) -> np.ndarray:
    """(x / max - 0.5) / 0.5 in float32 for each value x of an unsigned type."""
    highest = np.iinfo(dtype).max
    values = np.arange(highest + 1, dtype=np.float32) / np.float32(highest)
    return (values - np.float32(0.5)) / np.float32(0.5)


SIGNED_UNIT, SIGNED_UNIT_16 = _signed_unit(np.uint8), _signed_unit(np.uint16)


class UnfitFile(UserError):
    """A file that is no broken one, but does not fit the options: never passed over as broken files are."""


class Header(NamedTuple):
    """The first bytes of an image file, read.

    Attributes:
        size: width and height in pixels, of the image as it is read: turned as its EXIF tag says.
        kind: the type of its pixels, in words.
        frames: pages of a TIFF, frames of an animation; only the first is read.
        has_white: whether the type says which numbers are black and white, so that reading needs no `value_range`.
    """

    size: tuple[int, int]
    kind: str
    frames: int = 1
    has_white: bool = True


class Bands:
    """The channels of one image, each a Pillow image, where Pillow has no mode for all of them together.

    Has those methods of a Pillow image that the datasets use; `np.asarray` gives (H, W, C).
    """

    mode = "bands"

    def __init__(self, bands: Sequence[Image.Image]) -> None:
        self.bands = list(bands)
        self.size = self.width, self.height = self.bands[0].size

    def crop(self, box: tuple[int, int, int, int]) -> Bands:
        return Bands([band.crop(box) for band in self.bands])

    def resize(self, *args: object, **options: object) -> Bands:
        return Bands([band.resize(*args, **options) for band in self.bands])

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return np.stack([np.asarray(band, dtype) for band in self.bands], axis=2)


def image_size(path: Path | str) -> tuple[int, int]:
    """(width, height) of the image as `read_image` gives it, from the file's header alone; UserError if it is none."""
    return read_header(path).size


def read_header(path: Path | str) -> Header:
    """An image's header, without decoding it; UserError if the file is not a readable image."""
    with _reading(path):
        if _is_array(path):
            array = _as_3d(np.load(path, mmap_mode="r", allow_pickle=False))
            height, width, channels = array.shape
            kind = f"{array.dtype.name} of {channels} channels"
            return Header((width, height), kind, has_white=array.dtype == np.uint8)
        with Image.open(path) as image:
            sideways = _orientation(image) >= 5
            if image.format == "TIFF" and ExifTags.Base.Orientation in image.tag_v2:
                sideways = False  # Pillow gives the size after turning
            size = image.size[::-1] if sideways else image.size
            kind = _kind(image)
            has_white = image.mode not in ("I", "F") or kind == _GREY_16
            return Header(size, kind, _frames(image), has_white)


def read_image(
    path: Path | str,
    channels: int,
    bits: int = 8,
    value_range: tuple[float, float] | None = None,
) -> Image.Image | Bands:
    """Reads an image file, turned as its EXIF tag says.

    Of several pages or frames the first is read. The alpha channel is dropped unless `channels` is 4.

    Args:
        path: The file.
        channels: 1 for greyscale, 3 for RGB, 4 for RGB and alpha; any number for `.npy` files, (H, W) or (H, W, C).
        bits: 8 scales images of 16 bits to 8. 16, for greyscale only, gives the mode "I;16", and files of 8 bits are scaled,
            white to white.
        value_range: The file's numbers that become -1 and 1; those between are mapped linearly in float32, those beyond are
            clipped. `bits` then has no effect.

    Returns:
        A Pillow image in the mode "L", "RGB" or "I;16"; with `value_range` the numbers in -1 to 1, in the mode "F". `Bands` where
        Pillow has no such mode for so many channels.

    Raises:
        UserError: If the file is not a readable image, holds other numbers than 8 or 16 bits and `value_range` does not say
            which are black and white, or has other channels; or an argument is out of range.
    """
    check_depth(channels, bits)
    check_value_range(value_range)
    with _reading(path):
        numbers = _decode(path)
        if value_range is not None:
            if isinstance(numbers, Image.Image) and numbers.info["scaled"]:
                raise _not_its_numbers(path)
            low, high = value_range
            exact = _numbers(path, numbers, channels).astype(np.float64)
            mapped = (exact - low) * (2 / (high - low)) - 1
            return to_image(mapped.clip(-1, 1).astype(np.float32))
        if isinstance(numbers, np.ndarray):
            if numbers.dtype != np.uint8:
                raise _other_numbers(path, numbers)
            return to_image(_fit_channels(path, numbers, channels))
        return _of_bits(path, numbers, channels, bits)


def read_numbers(path: Path | str, channels: int) -> np.ndarray:
    """The numbers in an image file as they are, (H, W, C); UserError if it is none, or has other channels."""
    with _reading(path):
        return _numbers(path, _decode(path), channels)


def read_indices(path: Path | str) -> np.ndarray:
    """The whole numbers in the file of a label map, or of a map of instances.

    Of a palette image they are the entries' numbers, not their colours.

    Args:
        path: A file of one channel of 8 or 16 bits that loses nothing, such as PNG; or `.npy` of integers, (H, W) or (H, W, 1).

    Returns:
        (H, W) uint16.

    Raises:
        UserError: The file cannot be read, has colours, other numbers, or is a JPEG.
    """
    with _reading(path):
        decoded = _decode(path)
    if isinstance(decoded, np.ndarray):
        kind, array = f"{decoded.dtype.name} of {decoded.shape[2]} channels", decoded[:, :, 0]
        fits = decoded.shape[2] == 1 and array.dtype.kind in "ui"
        fits = fits and array.min() >= 0 and array.max() <= 65535
    else:
        kind, array = decoded.info["kind"], np.asarray(decoded)
        fits = decoded.mode in ("1", "L", "P", "I;16") and not decoded.info["scaled"]
        if Path(path).suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif", ".webp"):
            kind, fits = "compressed with loss, which changes numbers", False
    if not fits:
        raise UnfitFile(
            f"{path}: is no label map ({kind}). Expected one channel of 8 or 16 bits that holds each pixel's number, such as grey or palette PNG. "
            "Save it so; colours have to be turned into numbers first."
        )
    return array.astype(np.uint16)


def load_image(
    path: Path | str,
    channels: int = 3,
    bits: int = 8,
    value_range: tuple[float, float] | None = None,
) -> torch.Tensor:
    """Reads an image file at its own size: (C, H, W) float32 in [-1, 1]. The arguments are those of `read_image`.

    Raises:
        UserError: If the file is not a readable image.
    """
    return to_tensor(to_array(read_image(path, channels, bits, value_range)))


def read_alpha(path: Path | str) -> Image.Image | None:
    """The alpha channel, in the mode "L" and turned as `read_image` turns the image; None if there is none, UserError if no image."""
    with _reading(path):
        if _is_array(path):
            return None
        with Image.open(path) as image:
            if not image.has_transparency_data:
                return None
        return _decode(path).convert("RGBA").getchannel("A")


@contextmanager
def any_number_of_pixels() -> Iterator[None]:
    """Context in which images of any size are read.

    Elsewhere those of more than 179 megapixels are errors, as Pillow takes them for files that were made to fill the memory.
    """
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def save_image(
    tensor: torch.Tensor,
    path: Path | str,
    bits: int = 8,
    value_range: tuple[float, float] | None = None,
    alpha: Image.Image | None = None,
) -> None:
    """Writes an image file, atomically; the format follows from the extension. JPEG and WebP have quality 95.

    Values are clamped to [-1, 1], mapped to (x + 1) / 2 * 255 and truncated to 8 bits, as CUT's
    result files are; with `bits=16` they are mapped to 65535 and rounded. With `value_range` they are mapped back to its
    numbers: rounded to integers of 8 or 16 bits if its ends are such and 255 or more apart, else float32.

    Args:
        tensor: (C, H, W) float in [-1, 1], or uint8 for 8 bits, on any device; C of 1 for `bits=16`.
        path: The file to write; see `fitting_suffixes`.
        bits: 8 or 16.
        value_range: The numbers that -1 and 1 stand for, as in `read_image`.
        alpha: An alpha channel of the same size, in the mode "L"; for 8 bits, and not for JPEG.

    Raises:
        ValueError: If the shape is another one.
        UserError: If the file cannot be written, or its format, or `bits`, is not for such images.
    """
    if tensor.ndim != 3:
        raise ValueError(
            f"save_image: tensor: expected the shape (C, H, W), got {tuple(tensor.shape)}."
        )
    if tensor.dtype == torch.uint8 and (bits != 8 or value_range is not None):
        raise ValueError(
            "save_image: tensor: uint8 is for 8 bits. Give floating-point values in [-1, 1]."
        )
    check_depth(tensor.shape[0], bits)
    check_value_range(value_range)
    suffix, suffixes = Path(path).suffix.lower(), fitting_suffixes(len(tensor), bits, value_range)
    if suffix not in suffixes:
        raise UserError(
            f"{path}: cannot be written: this format does not hold {_dtype(bits, value_range).name} with {tensor.shape[0]} channels. "
            f"Use {suffixes[0]}."
        )
    dtype = _dtype(bits, value_range)
    if value_range is None and bits == 8:
        values = to_uint8(tensor)
    else:
        low, high = value_range or (0, 65535)
        values = (tensor.detach().double().clamp(-1, 1) + 1) / 2 * (high - low) + low
        values = values if dtype == np.float32 else values.round()
    array = values.to("cpu", getattr(torch, dtype.name)).permute(1, 2, 0).numpy()
    with atomic_path(path) as temporary:
        if _is_array(path):
            np.save(temporary, array, allow_pickle=False)
            return
        image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
        if alpha is not None:
            image.putalpha(alpha)
        image.save(temporary, **_SAVE_OPTIONS.get(suffix, {}))


def fitting_suffixes(
    channels: int, bits: int = 8, value_range: tuple[float, float] | None = None
) -> tuple[str, ...]:
    """The extensions of the files that `save_image` can write such images to, the usual one first."""
    dtype = _dtype(bits, value_range)
    if dtype == np.uint8 and channels in (1, 3):
        return (".png", *EXTENSIONS)
    if dtype == np.uint8 and channels == 4:
        return (".png", ".tif", ".tiff", ".webp", ".npy")
    if channels != 1:
        return (".npy",)
    return (*([".png"] if dtype == np.uint16 else []), ".tif", ".tiff", ".npy")


def check_depth(channels: int, bits: int) -> None:
    """Raises UserError unless images of so many channels can be read with so many bits."""
    if channels < 1:
        raise UserError(f"channels={channels}: expected 1 (greyscale), 3 (RGB) or more.")
    if bits not in (8, 16):
        raise UserError(f"bits={bits}: images have 8 or 16 bits per channel. Use 8 or 16.")
    if bits == 16 and channels != 1:
        raise UserError(
            f"bits=16 is for greyscale, got channels={channels}: Pillow reads 16-bit RGB files as 8-bit. "
            "Use one channel, or bits=8."
        )


def check_value_range(value_range: tuple[float, float] | None) -> None:
    """Raises UserError unless it is None or two finite numbers, the lower first."""
    if value_range is None:
        return
    if len(value_range) != 2:
        raise UserError(f"value_range={value_range}: expected two numbers, LOW and HIGH.")
    low, high = value_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(
            f"value_range={low:g} {high:g}: expected two finite numbers, the lower first: those that become black and white."
        )


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] of any shape to uint8 on the CPU: clamped, (x + 1) / 2 * 255, truncated. uint8 stays as it is.

    A ten-thousandth of a level is added first: float32 arithmetic leaves 63 of the 256 levels just
    below themselves, and truncation would darken an image each time it is loaded and saved.
    """
    if images.dtype == torch.uint8:
        return images.cpu()
    levels = (images.detach().float().clamp(-1, 1) + 1) / 2 * 255
    return (levels + 1e-4).to("cpu", torch.uint8)


def to_array(image: Image.Image | Bands) -> np.ndarray:
    """An image as (H, W, C): uint8, uint16 of the mode "I;16", float32 of numbers mapped to -1 to 1."""
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def to_image(array: np.ndarray) -> Image.Image | Bands:
    """(H, W, C) uint8, float32 or, for C of 1, uint16 as an image; the inverse of `to_array`."""
    if array.shape[2] == 3 and array.dtype == np.uint8:
        return Image.fromarray(array)
    bands = [Image.fromarray(array[:, :, channel]) for channel in range(array.shape[2])]
    return bands[0] if len(bands) == 1 else Bands(bands)


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """(H, W, C) uint8, uint16, or float32 in [-1, 1] to (C, H, W) float32 in [-1, 1], contiguous.

    float32 tells all 65,536 values apart. Floating-point numbers are clipped: resizing overshoots at edges.
    """
    planes = np.ascontiguousarray(array.transpose(2, 0, 1))
    if planes.dtype == np.float32:
        return torch.from_numpy(planes.clip(-1, 1))
    return torch.from_numpy((SIGNED_UNIT_16 if planes.dtype == np.uint16 else SIGNED_UNIT)[planes])


def resize(
    image: Image.Image | Bands,
    width: int,
    height: int,
    box: tuple[float, float, float, float] | None = None,
    *,
    nearest: bool = False,
) -> Image.Image | Bands:
    """Resizes an image as `read_image` gives it, or the part of it in `box` (left, top, right, bottom): bicubic, or to the nearest pixel."""
    size = (width, height)
    if image.size == size and box in (None, (0, 0, *size)):
        return image
    if nearest:
        return image.resize(size, Image.Resampling.NEAREST, box)
    if image.mode != "I;16":
        return image.resize(size, Image.Resampling.BICUBIC, box)
    # Through float32, which holds 16 bits exactly; bicubic weights overshoot at edges.
    values = Image.fromarray(np.asarray(image).astype(np.float32))
    resized = np.asarray(values.resize(size, Image.Resampling.BICUBIC, box))
    return Image.fromarray(resized.round().clip(0, 65535).astype(np.uint16))


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Turns all that Pillow and numpy raise of a broken file into a UserError that names it."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path}: is larger than what is read unasked ({str(error).partition(',')[0]}), as such files may be made to fill the "
            "memory. If it is yours: fastnce translate --tile 512 reads any size; for a training, cut it up or scale it down."
        ) from error
    except _BROKEN as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(
            f"{path}: cannot be read as an image ({reason}). Replace or remove this file."
        ) from error


def _is_array(path: Path | str) -> bool:
    return str(path).lower().endswith(".npy")


def _as_3d(array: np.ndarray) -> np.ndarray:
    """(H, W, C) of an image's array (H, W) or (H, W, C)."""
    if not isinstance(array, np.ndarray):
        raise ValueError("it holds several arrays, expected one")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"its shape is {array.shape}, expected (H, W) or (H, W, C)")
    if array.dtype.kind not in "uif":
        raise ValueError(f"it holds {array.dtype}, expected integers or floating-point numbers")
    return array if array.ndim == 3 else array[:, :, None]


def _decode(path: Path | str) -> Image.Image | np.ndarray:
    """A Pillow image, turned as its EXIF tag says, with 16 bits always in the mode "I;16"; of a .npy file (H, W, C)."""
    if _is_array(path):
        return _as_3d(np.load(path, allow_pickle=False))
    with Image.open(path) as image:
        kind = _kind(image)
        scaled = kind == _LOST_BITS or _ppm_white(image) not in (None, 255)
        # Of a TIFF Pillow itself has done it when it is decoded.
        turned = image.format != "TIFF" and _orientation(image) != 1
        image.load()
        if turned:
            image = ImageOps.exif_transpose(image)
        if kind == _GREY_16:
            array = np.asarray(image)
            image = Image.fromarray(array.clip(0, 65535).astype(np.uint16))
        image.info |= {"kind": kind, "scaled": scaled}
        return image


def _kind(image: Image.Image) -> str:
    """The type of the pixels of an image that is not decoded yet, in words."""
    # Pillow keeps those of PNG and PGM, 0 to 65535, in 32 bits where it has nothing narrower.
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
        return _GREY_16
    raw_mode = str(image.tile[0][3]) if image.tile else ""
    if image.mode == "I" and ";16" in raw_mode:
        return "16-bit integers with a sign"
    if image.mode != "I" and (";16" in raw_mode or (_ppm_white(image) or 0) > 255):
        return _LOST_BITS
    return _KINDS.get(image.mode, image.mode)


def _ppm_white(image: Image.Image) -> int | None:
    """The greatest number of a PPM file that Pillow scales to the whole range of 8 or 16 bits."""
    scaled = image.format == "PPM" and image.tile and image.tile[0][0].startswith("ppm")
    return image.tile[0][3][-1] if scaled else None


def _frames(image: Image.Image) -> int:
    # Behind the first one, a camera's MPO file holds a preview, and PSD layers of it.
    if image.format in ("MPO", "PSD"):
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # damage behind the first one
        return 1


def _orientation(image: Image.Image) -> int:
    """The EXIF tag of an image that is not decoded yet, 1 to 8; 1, as it is, where there is none."""
    try:
        # That of PngImageFile would decode the image, for a tag behind it.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged tag, in whatever way, is none
        return 1
    return value if value in range(1, 9) else 1


def _of_bits(path: Path | str, image: Image.Image, channels: int, bits: int) -> Image.Image | Bands:
    """Greyscale, RGB or RGBA of 8 bits, or greyscale of 16."""
    if image.mode in ("I", "F"):
        raise _other_numbers(path, image)
    if bits == 16:
        if image.mode == "I;16":
            return image
        if image.info["kind"] == _LOST_BITS:
            raise _not_its_numbers(path)
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if image.mode == "I;16":
        # Converting would clip at 255 and leave an image that is almost white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise UnfitFile(
            f"channels={channels}: {path} can be read with 1 (greyscale), 3 (RGB) or 4 (with alpha). Other numbers of channels need "
            ".npy files."
        )
    image = image.convert(modes[channels])
    # Pillow would weight colours by alpha when it resizes; here it is a channel like the others.
    return Bands(image.split()) if channels == 4 else image


def _numbers(path: Path | str, numbers: Image.Image | np.ndarray, channels: int) -> np.ndarray:
    if isinstance(numbers, Image.Image):
        if numbers.mode not in ("I;16", "I", "F"):
            return to_array(_of_bits(path, numbers, channels, 8))
        numbers = np.asarray(numbers)[:, :, None]
    if not np.isfinite(numbers).all():
        raise ValueError("some of its numbers are not finite")
    return _fit_channels(path, numbers, channels)


def _fit_channels(path: Path | str, array: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, C) with so many channels; one is repeated for RGB."""
    if array.shape[2] == channels:
        return array
    if array.shape[2] == 1 and channels == 3:
        return array.repeat(3, axis=2)
    raise UnfitFile(
        f"channels={channels}: {path} has {array.shape[2]}. Use channels={array.shape[2]}, or other files."
    )


def _not_its_numbers(path: Path | str) -> UnfitFile:
    return UnfitFile(
        f"{path}: holds other numbers than Pillow gives, which scales them to 8 or 16 bits. Save it as .npy, which keeps them, or "
        "leave out --value-range and --bits 16."
    )


def _other_numbers(path: Path | str, numbers: Image.Image | np.ndarray) -> UnfitFile:
    array = np.asarray(numbers)
    kind = array.dtype.name if isinstance(numbers, np.ndarray) else numbers.info["kind"]
    finite = array[np.isfinite(array)] if np.isfinite(array).any() else array
    low, high = f"{finite.min():g}", f"{finite.max():g}"
    return UnfitFile(
        f"{path}: holds {kind} from {low} to {high}, and only 8 bits and 16-bit grey say what is black and white. Give the "
        f"numbers that are: --value-range LOW HIGH, the same for all files, such as {low} {high}; or, as for labelled images, save "
        "the files with 8 bits."
    )


def _dtype(bits: int, value_range: tuple[float, float] | None) -> np.dtype:
    """The type that images are written as; of a range one that holds its numbers, and no fewer levels of them than 8 bits do."""
    if value_range is None:
        return np.dtype(np.uint8 if bits == 8 else np.uint16)
    low, high = value_range
    whole = low == int(low) and high == int(high) and high - low >= 255
    if whole and low >= 0 and high <= 65535:
        return np.dtype(np.uint8 if high <= 255 else np.uint16)
    return np.dtype(np.float32)
