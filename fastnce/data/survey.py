"""What a folder of images holds, in a line for the start of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fastnce.data.folders import (
    Header,
    UnfitFile,
    counted,
    read_header,
    read_image,
    read_numbers,
    scan_folder,
)
from fastnce.errors import UserError

# The values of so many pixels are looked at; decoding all of a large set at each start would take too long.
MAX_PIXELS = 2**26

# A 16-bit folder whose greatest value is below this uses an eighth of its range: most likely it holds numbers of fewer bits.
DARK_16 = 2**13


def describe_folder(
    folder: Path,
    paths: Sequence[Path],
    channels: int,
    bits: int = 8,
    value_range: tuple[float, float] | None = None,
    *,
    skip_broken: bool = False,
) -> list[str]:
    """A line on a folder of images: how many, their sizes, pixels, least and greatest value, and what is left out and why.

    All headers are read; values of all images up to `MAX_PIXELS`, otherwise of images spread evenly over the folder.

    Args:
        folder: Where the images were looked for.
        paths: Those that are used.
        channels: With which they are read.
        bits: With which they are read.
        value_range: The numbers that become black and white, if they were given.
        skip_broken: Files that cannot be read are counted as left out, instead of ending in an error.

    Returns:
        The line, and another one if the values look wrong.

    Raises:
        UserError: If each image that is looked at is one plain colour, a file cannot be read, or one holds numbers that need a
            `value_range`.

    Example:
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
            if value_range is None and not headers[path].has_white:
                read_image(path, channels, bits)  # says so
    looked_at, low, high, plain, broken = 0, math.inf, -math.inf, True, len(paths) - len(headers)
    for path in _within_limit(headers):
        try:
            numbers = read_numbers(path, channels)
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
    line = f"{folder}: {_count(len(paths) - broken, 'image')}, {_sizes(headers)}, {_kinds(headers)}, values {low:g} to {high:g}"
    if looked_at + broken < len(paths):
        line += f" in {looked_at} of them"
    if value_range is not None and (low < value_range[0] or high > value_range[1]):
        line += f", clipped to {value_range[0]:g} to {value_range[1]:g}"
    left_out = _left_out(folder, paths, headers, broken)
    lines = [line + "".join(f"; {part}" for part in left_out)]
    if value_range is None and high < DARK_16 and _all_16_bits(headers):
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


def _kinds(headers: dict[Path, Header]) -> str:
    kinds = Counter(header.kind for header in headers.values())
    return counted(kinds) if len(kinds) > 1 else next(iter(kinds))


def _left_out(
    folder: Path, paths: Sequence[Path], headers: dict[Path, Header], broken: int
) -> list[str]:
    found, others = scan_folder(folder)
    if broken:
        others["unreadable"] = broken
    if unused := len(set(found) - set(paths)):
        others["not used"] = unused
    parts = []
    if others:
        parts.append(f"left out: {counted(others)}")
    animated = [path for path, header in headers.items() if header.frames > 1]
    if animated:
        first = (
            f"only the first of {headers[animated[0]].frames} pages of {animated[0].name} is read"
        )
        more = f", and so of {len(animated) - 1} more" if len(animated) > 1 else ""
        parts.append(first + more)
    return parts


def _all_16_bits(headers: dict[Path, Header]) -> bool:
    return all(header.kind == "16-bit grey" for header in headers.values())


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")
