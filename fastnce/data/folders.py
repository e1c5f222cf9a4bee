"""Finding the images in folders, and telling at the start of a run what was found."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fastnce.data.images import (
    EXTENSIONS,
    Header,
    UnfitFile,
    read_header,
    read_image,
    read_numbers,
)
from fastnce.errors import UserError

LAYOUT = "trainA and trainB (for testing, testA and testB, or valA and valB)"

# The values of so many pixels are looked at; decoding all of a large set at each start would take too long.
MAX_PIXELS = 2**26

# A 16-bit folder whose greatest value is below this uses an eighth of its range: most likely it holds numbers of fewer bits.
DARK_16 = 2**13


def list_images(folder: Path | str) -> list[Path]:
    """All image files in `folder` and the folders below it, linked ones too, sorted by path.

    Hidden files and folders (names that start with a dot) are left out, and a folder that a link leads to again.

    Args:
        folder: The folder to search.

    Returns:
        At least one path.

    Raises:
        UserError: If the folder is missing, is not a folder, or holds no image.

    Examples:
        >>> list_images("no/such/folder")
        Traceback (most recent call last):
        ...
        fastnce.errors.UserError: no/such/folder: no such folder. Expected a folder of images.
    """
    folder = Path(folder)
    expect_folder(folder, "a folder of images")
    found, left_out = scan_folder(folder)
    if not found:
        there = f", and found {counted(left_out)}" if left_out else ""
        raise UserError(
            f"{folder}: holds no image. Looked in it and below for .jpg .png .tif .tiff and all else that Pillow reads{there}. "
            "Put images there, or name another folder."
        )
    return found


def expect_folder(folder: Path, expected: str) -> None:
    """Raises UserError unless there is such a folder."""
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {problem}. Expected {expected}.")


def scan_folder(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The image files in `folder` and below it, sorted, and how many other things there are of each kind.

    Links to folders are followed. A folder that is reached twice, as by a link to the folder that holds it, is read once: by
    the path without a link where there is one. Kinds are extensions (".txt"), "hidden", "folder linked twice" and "folder that
    cannot be opened".
    """
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()

    def closed(_: OSError) -> None:
        left_out["folder that cannot be opened"] += 1

    starts = [folder]
    while starts:
        links = []
        for start in starts:
            for parent, subfolders, names in os.walk(start, onerror=closed):
                real = os.path.realpath(parent)
                if real in seen:
                    left_out["folder linked twice"] += 1
                    subfolders.clear()
                    continue
                seen.add(real)
                hidden = sum(name.startswith(".") for name in subfolders + names)
                left_out += Counter(hidden=hidden)
                subfolders[:] = [name for name in subfolders if not name.startswith(".")]
                links += [
                    Path(parent, name) for name in subfolders if Path(parent, name).is_symlink()
                ]
                for name in names:
                    if name.startswith("."):
                        continue
                    if name.lower().endswith(EXTENSIONS):
                        found.append(Path(parent, name))
                    else:
                        left_out[Path(name).suffix.lower() or "without an extension"] += 1
        starts = sorted(links)
    return sorted(found), left_out


def counted(numbers: Counter[str]) -> str:
    """How many there are of each kind, most first: "12 .txt, 3 .heic"."""
    ordered = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} {name}" for name, number in ordered)


def split_folder(root: Path | str | Mapping[str, Path], split: str, domain: str) -> Path:
    """The folder of one domain of one split: `root/trainA`, or `root["trainA"]`, for ("train", "A").

    "test" falls back to "val" when there is no test folder.

    Raises:
        UserError: If there is no such folder; the message gives the layout expected and what `root`
            holds.
    """
    names = [f"{split}{domain}"] + ([f"val{domain}"] if split == "test" else [])
    if isinstance(root, Mapping):
        if names[0] not in root:
            raise UserError(
                f"{split}_{domain.lower()} is missing. Give it beside the folders of the training images, or, for an evaluation, a data "
                f"folder with {names[0]}."
            )
        return Path(root[names[0]])
    root = Path(root)
    expect_folder(root, f"a folder with {LAYOUT} inside")
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


def describe_folder(
    folder: Path,
    paths: Sequence[Path],
    channels: int,
    bits: int = 8,
    value_range: tuple[float, float] | None = None,
    *,
    skip_broken: bool = False,
    read: Callable[[Path], np.ndarray] | None = None,
) -> list[str]:
    """A line on a folder of images: how many, their sizes, pixels, least and greatest value, and what is left out and why.

    All headers are read; values of all images up to `MAX_PIXELS`, otherwise of images spread evenly over the folder. `paths` are
    the files that are used, `channels`, `bits` and `value_range` how they are read; or `read` reads them, as (H, W, C). With `skip_broken` files that cannot be read
    are counted as left out. A second line warns of values that look wrong.

    Raises:
        UserError: Each image that is looked at is one plain colour, a file cannot be read, or holds numbers that need a
            `value_range`.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.linear_gradient("L").save(folder / "1.png")
        >>> describe_folder(folder, [folder / "1.png"], 1)[0].removeprefix(str(folder))
        ': 1 image, 256x256, grey, values 0 to 255'
    """
    headers: dict[Path, Header] = {}
    for path in paths:
        try:
            headers[path] = read_header(path)
        except UserError:
            if not skip_broken:
                raise
        else:
            if read is None and value_range is None and not headers[path].has_white:
                read_image(path, channels, bits)  # says so
    looked_at, low, high, plain, broken = 0, math.inf, -math.inf, True, len(paths) - len(headers)
    for path in _within_limit(headers):
        try:
            numbers = read(path) if read else read_numbers(path, channels)
        except UserError as error:
            if not skip_broken or isinstance(error, UnfitFile):
                raise
            broken += 1
            continue
        looked_at += 1
        least, greatest = numbers.min((0, 1)), numbers.max((0, 1))
        plain = plain and bool((least == greatest).all())
        low, high = min(low, float(least.min())), max(high, float(greatest.max()))
    if not looked_at:
        return [f"{folder}: none of its {len(paths)} images can be read"]
    if plain:
        raise UserError(
            f"{folder}: each of its images is one plain colour (values {low:g} to {high:g}), so there is nothing to learn. "
            "Look at the files, or name another folder."
        )
    count = len(paths) - broken
    images = "1 image" if count == 1 else f"{count} images"
    kinds = Counter(header.kind for header in headers.values())
    kind = counted(kinds) if len(kinds) > 1 else next(iter(kinds))
    line = f"{folder}: {images}, {_sizes(headers)}, {kind}, values {low:g} to {high:g}"
    if looked_at + broken < len(paths):
        line += f" in {looked_at} of them"
    if value_range is not None and (low < value_range[0] or high > value_range[1]):
        line += f", clipped to {value_range[0]:g} to {value_range[1]:g}"
    lines = [line + "".join(f"; {x}" for x in _left_out(folder, paths, headers, broken))]
    if read is None and value_range is None and high < DARK_16 and set(kinds) == {"16-bit grey"}:
        lines.append(
            f"warning: {folder}: 16-bit images whose greatest value is {high:g} of 65535 are almost black. If that is as bright as "
            f"they can be, give --value-range 0 {2 ** max(1, int(high)).bit_length() - 1}, or, of labelled images, stretch the files."
        )
    return lines


def _within_limit(headers: dict[Path, Header]) -> list[Path]:
    """All files, or as many, spread evenly, as have about `MAX_PIXELS` pixels together; at least one."""
    pixels = sum(math.prod(header.size) for header in headers.values())
    paths = list(headers)
    count = min(len(paths), max(1, len(paths) * MAX_PIXELS // max(1, pixels)))
    return [paths[index * len(paths) // count] for index in range(count)]


def _sizes(headers: dict[Path, Header]) -> str:
    widths, heights = zip(*(header.size for header in headers.values()), strict=True)
    least, greatest = f"{min(widths)}x{min(heights)}", f"{max(widths)}x{max(heights)}"
    return least if least == greatest else f"{least} to {greatest}"


def _left_out(
    folder: Path, paths: Sequence[Path], headers: dict[Path, Header], broken: int
) -> list[str]:
    found, others = scan_folder(folder)
    others += Counter({"unreadable": broken, "not used": len(set(found) - set(paths))})
    parts = [f"left out: {counted(others)}"] if others else []
    animated = [path for path, header in headers.items() if header.frames > 1]
    if animated:
        pages, name = headers[animated[0]].frames, animated[0].name
        more = f", and so of {len(animated) - 1} more" if len(animated) > 1 else ""
        parts.append(f"only the first of {pages} pages of {name} is read{more}")
    return parts
