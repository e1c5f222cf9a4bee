"""Finding, reading and writing image files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastnce.data.files import atomic_path
from fastnce.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff")

LAYOUT = "trainA and trainB (for testing, testA and testB, or valA and valB)"


def _signed_unit(dtype: type[np.unsignedinteger]) -> np.ndarray:
    """(x / max - 0.5) / 0.5 in float32 for each value x of an unsigned type."""
    highest = np.iinfo(dtype).max
    values = np.arange(highest + 1, dtype=np.float32) / np.float32(highest)
    return (values - np.float32(0.5)) / np.float32(0.5)


SIGNED_UNIT, SIGNED_UNIT_16 = _signed_unit(np.uint8), _signed_unit(np.uint16)


def list_images(folder: Path | str) -> list[Path]:
    """All image files in `folder` and the folders below it, sorted by path.

    Hidden files and folders (names that start with a dot) are left out.

    Args:
        folder: The folder to search.

    Returns:
        At least one path.

    Raises:
        UserError: If the folder is missing, is not a folder, or holds no image.

    Example:
        >>> list_images("no/such/folder")
        Traceback (most recent call last):
        ...
        fastnce.errors.UserError: no/such/folder: no such folder. Expected a folder of images.
    """
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"{folder}: no such folder. Expected a folder of images.")
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file. Expected a folder of images.")
    found = []
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and name.lower().endswith(EXTENSIONS)
        ]
    if not found:
        raise UserError(
            f"{folder}: holds no image. Looked in it and below for {' '.join(EXTENSIONS)}. "
            "Put images there, or name another folder."
        )
    return sorted(found)


def split_folder(root: Path | str, split: str, domain: str) -> Path:
    """The folder of one domain of one split: `root/trainA` for ("train", "A").

    "test" falls back to "val" when there is no test folder.

    Raises:
        UserError: If there is no such folder; the message gives the layout expected and what `root`
            holds.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"{root}: no such folder. Expected a folder with {LAYOUT} inside.")
    if not root.is_dir():
        raise UserError(f"{root}: is a file. Expected a folder with {LAYOUT} inside.")
    names = [f"{split}{domain}"] + ([f"val{domain}"] if split == "test" else [])
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UserError(
        f"{root}: holds no folder {' or '.join(names)}. Expected {LAYOUT}; found {contents(root)}. "
        "Name the folder that holds these, or rename yours."
    )


def contents(folder: Path) -> str:
    """The first names in a folder, for an error: "testB, trainA, trainB", or "nothing"."""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"


def image_size(path: Path | str) -> tuple[int, int]:
    """Width and height in pixels, from the file's header alone.

    Raises:
        UserError: If the file is not a readable image.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except _BROKEN as error:
        raise _broken(path, error) from error


def read_image(path: Path | str, channels: int, bits: int = 8) -> Image.Image:
    """Reads an image file as RGB (`channels=3`) or greyscale (`channels=1`); an alpha channel is dropped.

    With `bits=8` images of 16 bits are scaled to 8. With `bits=16`, for greyscale only, the image has the mode "I;16", and
    files of 8 bits are scaled to 16, white to white.

    Raises:
        UserError: If the file is not a readable image, `channels` is neither 1 nor 3, or `bits` is not for such images.
    """
    check_depth(channels, bits)
    try:
        with Image.open(path) as image:
            image.load()
            if bits == 16:
                return _as_16_bit(image)
            if image.mode.startswith("I"):
                # Converting would clip at 255 and leave an image that is almost white.
                image = Image.fromarray(
                    (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                )
            return image.convert("L" if channels == 1 else "RGB")
    except _BROKEN as error:
        raise _broken(path, error) from error


def check_depth(channels: int, bits: int) -> None:
    """Raises UserError unless images of so many channels can be read with so many bits."""
    if channels not in (1, 3):
        raise UserError(f"channels={channels}: images have 1 (greyscale) or 3 (RGB). Use 1 or 3.")
    if bits not in (8, 16):
        raise UserError(f"bits={bits}: images have 8 or 16 bits per channel. Use 8 or 16.")
    if bits == 16 and channels != 1:
        raise UserError(
            f"bits=16 is for greyscale, got channels={channels}: Pillow reads 16-bit RGB files as 8-bit. "
            "Use one channel, or bits=8."
        )


def _as_16_bit(image: Image.Image) -> Image.Image:
    """A greyscale image in the mode "I;16"; an 8-bit one scaled so that white stays white."""
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers, expected 8 or 16 bits")
    if image.mode.startswith("I"):
        array = np.asarray(image).astype(np.int64).clip(0, 65535)
    else:
        array = np.asarray(image.convert("L")).astype(np.int64) * 257
    return Image.fromarray(array.astype(np.uint16))


def load_image(path: Path | str, channels: int = 3, bits: int = 8) -> torch.Tensor:
    """Reads an image file at its own size.

    Args:
        path: The file.
        channels: 3 for RGB, 1 for greyscale.
        bits: 16 keeps all bits of a 16-bit greyscale file, 8 scales it to 8.

    Returns:
        (C, H, W) float32 in [-1, 1].

    Raises:
        UserError: If the file is not a readable image.
    """
    return to_tensor(to_array(read_image(path, channels, bits)))


def read_alpha(path: Path | str) -> Image.Image | None:
    """The alpha channel of an image file, in the mode "L" and turned as `read_image` turns the image; None if it has none.

    Raises:
        UserError: If the file is not a readable image.
    """
    try:
        with Image.open(path) as image:
            if not image.has_transparency_data:
                return None
            return image.convert("RGBA").getchannel("A")
    except _BROKEN as error:
        raise _broken(path, error) from error


@contextmanager
def any_number_of_pixels() -> Iterator[None]:
    """Context in which images of any size are read. Elsewhere those of more than 179 megapixels are errors, as Pillow takes them for
    files that were made to fill the memory."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


# Of the formats that lose something, how little: 95 of 100.
_SAVE_OPTIONS = dict.fromkeys((".jpg", ".jpeg", ".webp"), {"quality": 95})


def save_image(
    tensor: torch.Tensor, path: Path | str, bits: int = 8, alpha: Image.Image | None = None
) -> None:
    """Writes an image file, atomically; the format follows from the extension. JPEG and WebP have quality 95.

    Values are clamped to [-1, 1], mapped to (x + 1) / 2 * 255 and truncated to 8 bits, as CUT's
    result files are; with `bits=16` they are mapped to 65535 and rounded.

    Args:
        tensor: (C, H, W) float in [-1, 1], C of 1 or 3, on any device; C of 1 for `bits=16`.
        path: The file to write; for `bits=16` a .png or .tif.
        bits: 8 or 16.
        alpha: An alpha channel of the same size, in the mode "L"; not for JPEG, nor for 16 bits.

    Raises:
        ValueError: If the shape is another one.
        UserError: If the file cannot be written, or `bits` is not for such images.
    """
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ValueError(
            "save_image: tensor: expected the shape (C, H, W) with C of 1 or 3, "
            f"got {tuple(tensor.shape)}."
        )
    check_depth(tensor.shape[0], bits)
    values = to_uint8(tensor) if bits == 8 else to_uint16(tensor)
    image = to_image(values.permute(1, 2, 0).numpy())
    if alpha is not None:
        image.putalpha(alpha)
    with atomic_path(path) as temporary:
        image.save(temporary, **_SAVE_OPTIONS.get(Path(path).suffix.lower(), {}))


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] of any shape to uint8 on the CPU: clamped, (x + 1) / 2 * 255, truncated.

    A ten-thousandth of a level is added first: float32 arithmetic leaves 63 of the 256 levels just
    below themselves, and truncation would darken an image each time it is loaded and saved.
    """
    levels = (images.detach().float().clamp(-1, 1) + 1) / 2 * 255
    return (levels + 1e-4).to("cpu", torch.uint8)


def to_uint16(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] of any shape to uint16 on the CPU: clamped, (x + 1) / 2 * 65535, rounded."""
    levels = (images.detach().double().clamp(-1, 1) + 1) / 2 * 65535
    return levels.round().to("cpu", torch.uint16)


def to_array(image: Image.Image) -> np.ndarray:
    """An image as (H, W, C): uint8 of greyscale or RGB, uint16 of the mode "I;16"."""
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def to_image(array: np.ndarray) -> Image.Image:
    """(H, W, C) uint8 or, for C of 1, uint16 as an image; the inverse of `to_array`."""
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """(H, W, C) uint8 or uint16 to (C, H, W) float32 in [-1, 1], contiguous.

    float32 tells all 65,536 values apart.
    """
    values = SIGNED_UNIT_16 if array.dtype == np.uint16 else SIGNED_UNIT
    return torch.from_numpy(values[np.ascontiguousarray(array.transpose(2, 0, 1))])


_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def _broken(path: Path | str, error: BaseException) -> UserError:
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())
    if isinstance(error, Image.DecompressionBombError):
        return UserError(
            f"{path}: is larger than what is read unasked ({reason.partition(',')[0]}), as such files may be made to fill the "
            "memory. If it is yours: fastnce translate --tile 512 reads any size; for a training, cut it up or scale it down."
        )
    return UserError(f"{path}: cannot be read as an image ({reason}). Replace or remove this file.")
