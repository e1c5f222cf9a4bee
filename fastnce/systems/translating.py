"""Translating with a trained generator: tensors, a folder of images, or one."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from fastnce.data import EXTENSIONS, Preprocess, list_images, save_image, to_uint8
from fastnce.data.broken import readable
from fastnce.data.domains import find_pairs, half_of
from fastnce.data.images import (
    UnfitFile,
    any_number_of_pixels,
    fitting_suffixes,
    image_size,
    read_alpha,
    read_image,
    to_image,
    to_tensor,
)
from fastnce.data.transforms import RANDOM_TOKENS
from fastnce.errors import UserError
from fastnce.files import expect_apart
from fastnce.networks import ResnetGenerator
from fastnce.systems.tiles import check_tile, translate_in_tiles
from fastnce.systems.translation import TranslationConfig, in_direction, input_channels

Format = Literal["png", "jpg", "tiff", "webp", "npy"]
Part = Literal["left", "right", "whole"]
# Extensions of single results, by the format that they stand for.
_FORMATS: dict[str, Format] = {
    ".png": "png",
    ".jpg": "jpg",
    ".jpeg": "jpg",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".webp": "webp",
    ".npy": "npy",
}


@torch.inference_mode()
def translate(
    generator: nn.Module, images: Tensor, batch_size: int = 16, *, tile: int | None = None
) -> Tensor:
    """Translates an image or a batch of them, of any height and width.

    Args:
        generator: as `load_generator` gives it; of a system of both directions one of its parts `a_to_b` and `b_to_a`, or all
            of it for A to B.
        images: (C, H, W) or (N, C, H, W), on any device: uint8, from 0 to 255, or floating-point in [-1, 1]. H and W that are
            no multiples of 4 (of a U-Net's `size_multiple`) are mirrored at the right and the bottom up to one, and the result
            is cut back.
        batch_size: images at a time.
        tile: images that are higher or wider are computed in tiles of this size, with the same result: see
            `translate_in_tiles`.

    Returns:
        The translations as `images` are: (C', H, W) or (N, C', H, W), of the same dtype and on the same device. uint8 holds what
        `save_image` writes. Floating-point values are in [-1, 1], but for SinCUT's, which may lie beyond.

    Raises:
        TypeError: another dtype, or no tensor.
        ValueError: another shape or number of channels, values beyond [-1, 1], or a batch below 1.

    Examples:
        >>> from fastnce.networks import ResnetGenerator
        >>> generator = ResnetGenerator(base_channels=2, num_blocks=1).eval()
        >>> photo = torch.randint(256, (3, 21, 34), dtype=torch.uint8)
        >>> translate(generator, photo).shape, translate(generator, photo).dtype
        (torch.Size([3, 21, 34]), torch.uint8)
    """
    generator = getattr(generator, "a_to_b", generator)
    _check_images(generator, images)
    if batch_size < 1:
        raise ValueError(f"translate: batch_size: expected at least 1, got {batch_size}.")
    if images.ndim == 3:
        return translate(generator, images[None], batch_size, tile=tile)[0]
    like = next(generator.parameters())
    height, width = images.shape[2:]
    in_tiles = tile is not None and max(height, width) > tile
    outputs = []
    for batch in images.split(1 if in_tiles else batch_size):
        if batch.dtype == torch.uint8:  # as `load_image` does
            batch = (batch / 255 - 0.5) / 0.5
        padded = _mirrored_up(batch.to(like.dtype), generator)
        if in_tiles:
            output = translate_in_tiles(generator, padded, tile)
        else:
            output = generator(padded.to(like.device))
        output = output[..., :height, :width]
        outputs.append((to_uint8(output) if images.dtype == torch.uint8 else output).to(images))
    return torch.cat(outputs) if outputs else images.clone()


def _check_images(generator: nn.Module, images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(
            f"translate: images: expected a tensor, got a {type(images).__name__}. For an array: torch.from_numpy(...)."
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(
            f"translate: images: expected uint8 (0 to 255) or floating-point ([-1, 1]), got {images.dtype}. "
            "Use images.to(torch.uint8) for values from 0 to 255."
        )
    channels = input_channels(generator)
    fits = images.ndim in (3, 4) and channels in (None, images.shape[-3])
    if not fits or 0 in images.shape[-2:]:
        raise ValueError(
            f"translate: images: expected (C, H, W) or (N, C, H, W) with C = {channels}, got {tuple(images.shape)}. "
            "Of (H, W, C) make that with images.permute(2, 0, 1)."
        )
    if images.is_floating_point() and images.numel():
        least, greatest = (value.item() for value in images.aminmax())
        if least < -1.001 or greatest > 1.001:  # false with NaN, which is translated to NaN
            raise ValueError(
                f"translate: images: expected values in [-1, 1], got {least:g} to {greatest:g}. Pass 0 to 255 as uint8, or "
                "use images / 127.5 - 1."
            )


def _mirrored_up(images: Tensor, generator: nn.Module) -> Tensor:
    """The images, mirrored at the right and the bottom up to a size that the generator can halve."""
    multiple = getattr(generator, "size_multiple", 4)
    least = 8 if isinstance(generator, ResnetGenerator) else multiple
    for dim in (2, 3):
        size = images.shape[dim]
        length = max(size + -size % multiple, least)
        if length > size:
            # To and fro, so that also an image that is smaller than what it lacks is filled.
            period = max(2 * (size - 1), 1)
            place = torch.arange(length, device=images.device) % period
            images = images.index_select(
                dim, torch.minimum(place, period - place) if size > 1 else place
            )
    return images


def translate_folder(
    generator: nn.Module,
    config: TranslationConfig,
    input: Path,
    out: Path,
    batch_size: int = 16,
    *,
    paired: bool,
    direction: Literal["AtoB", "BtoA"] | None = None,
    preprocess: str | None = None,
    size: int | None = None,
    tile: int | None = None,
    part: Part | None = None,
    format: Format | None = None,
    broken_files: Literal["error", "skip"] | None = None,
    value_range: tuple[float, float] | None = None,
) -> int:
    """Translates all images of a folder, and of the folders in it, to files of the same names; or one image.

    Images are scaled as in training, to the size of its crops, but not cropped. Images that follow each other and have the
    same size are translated together. An alpha channel is scaled alike and written back, if the format has one.

    Args:
        generator: as `load_generator` gives it.
        config: its run's configuration.
        input: folder of the images, or an image.
        out: folder of the results; created. For one image also the file to write.
        batch_size: Images translated at a time, where they have the same size; of those that are computed in tiles, one.
        paired: whether the run learned from pairs, which may lie side by side in the files.
        direction: For systems that learn both directions; by default that of the training.
        preprocess: How images are scaled, by default as in training; none keeps their size.
        size: Size to which they are scaled; by default the crop size of the training.
        tile: Larger images are computed in tiles of this size, with the same result in less memory. Images of any number of
            pixels are read.
        part: Translate this half of each file, or the whole. By default that is the input's half where pix2pix learned from
            pairs side by side and these are such, else the whole.
        format: Of the results, unless out names a file: png, or what holds all their numbers and channels. jpg and webp have
            quality 95.
        broken_files: What a file that cannot be read does: skip leaves it out and names it, error stops when the images before
            it are translated; by default as in the training.
        value_range: The images' numbers that stand for black and white; by default as in the training. Results are written in
            these numbers.

    Returns:
        The number of images translated.

    Raises:
        UserError: no images, a broken one, two whose results would have the same name, or `out`
            cannot be written.
    """
    for name, value in (("batch_size", batch_size), ("size", size)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    if tile is not None:
        check_tile(tile)
    if broken_files is not None:
        config = replace(config, broken_files=broken_files)
    if value_range is not None:
        config = replace(config, value_range=value_range)
    input, out = Path(input), Path(out)
    if not input.exists():
        raise UserError(
            f"input={input}: no such file or folder. Name an image, or a folder of images."
        )
    paths = [input]
    if input.is_dir():
        expect_apart(out, [input])
        paths = list_images(input)
    forward = direction in (None, config.direction)
    out_channels = config.out_channels if forward else config.in_channels
    suffixes = fitting_suffixes(out_channels, config.bits, config.value_range)
    written = targets(paths, input, out, format, usual=suffixes[0])
    for target in written.values():
        if target.suffix.lower() not in suffixes:
            raise UserError(
                f"{target}: this format does not hold the numbers of the run's results, or not all their channels. "
                f"Use {_FORMATS[suffixes[0]]}."
            )
    generator, channels = in_direction(generator, config, direction)
    with_alpha = {channels, out_channels} <= {1, 3}  # else it is a channel like the others
    skip, count, lost_alpha = config.broken_files == "skip", 0, 0

    with any_number_of_pixels() if tile is not None else contextlib.nullcontext():
        if part is None:
            part = input_part(config, paths) if paired else "whole"
        scale = image_scaling(config, paths, preprocess, size, part)

        def read(path: Path) -> Picture:
            try:
                image = half_of(read_image(path, channels, config.bits, config.value_range), part)
                alpha = read_alpha(path) if with_alpha else None
            except UserError as error:
                if skip or isinstance(error, UnfitFile):
                    raise
                raise UserError(
                    f"{error} The images before it are translated. To leave out what cannot be read: "
                    "--broken-files skip."
                ) from error
            if alpha is not None:
                alpha = to_image(scale.prepare(half_of(alpha, part)))
            return Picture(to_tensor(scale.prepare(image)), alpha)

        with tqdm(total=len(paths), desc="translate", unit="image", disable=None) as bar:
            images = readable(paths, read, skip=skip)
            for group in groups_of_one_size(images, batch_size, tile):
                batch = torch.stack([image.pixels for _, image in group])
                results = translate(generator, batch, batch_size, tile=tile)
                for (path, image), result in zip(group, results, strict=True):
                    alpha = image.alpha if _holds_alpha(written[path], config) else None
                    lost_alpha += alpha is None and image.alpha is not None
                    save_image(result, written[path], config.bits, config.value_range, alpha)
                count += len(group)
                bar.update(len(group))
    if lost_alpha:
        print(
            f"Alpha channels left out: {lost_alpha}. Files of this format, or of so many bits, hold none.",
            file=sys.stderr,
        )
    return count


def input_part(config: TranslationConfig, paths: Sequence[Path]) -> Part:
    """Which part of the files in `paths` a generator translates that learned from pairs.

    All of each file, but for pairs side by side: files of the training's data, or of the shape of its files. Then it is the half
    that was the input of the training. A line on standard error says which.
    """
    if config.data is None:  # A and B in two folders
        return "whole"
    skip = config.broken_files == "skip"
    _, (width, height) = next(readable(paths, image_size, skip=skip))
    half: Part = "left" if config.direction == "AtoB" else "right"
    try:
        trained = find_pairs(config.data, "train")[0]
        _, (pair_width, pair_height) = next(readable(trained.paths, image_size, skip=True))
    except UserError:
        if width != 2 * height:
            return "whole"
        raise UserError(
            f"{paths[0]}: may be a pair side by side ({width}x{height}), or not: the training's data, {config.data}, are not "
            f"there to compare. Say --part {half}, or --part whole for whole files."
        ) from None
    if trained.half is None:
        return "whole"
    splits = (Path(config.data, name).resolve() for name in ("train", "test", "val"))
    of_the_data = any(paths[0].resolve().is_relative_to(split) for split in splits)
    same_shape = abs(width * pair_height / (height * pair_width) - 1) < 0.01
    if of_the_data or same_shape:
        print(
            f"{paths[0].parent}: holds pairs as in the training; the {half} half of each file is translated. "
            "For whole files: --part whole.",
            file=sys.stderr,
        )
        return half
    print(
        f"{paths[0].parent}: whole files are translated, as they are no pairs of the training's shape "
        f"({width}x{height}, there {pair_width}x{pair_height}). For a half of each: --part {half}.",
        file=sys.stderr,
    )
    return "whole"


def image_scaling(
    config: TranslationConfig,
    paths: Sequence[Path],
    preprocess: str | None = None,
    size: int | None = None,
    part: str | None = None,
) -> Preprocess:
    """The steps for the images in `paths`, or for a half of each, before they are translated: the steps of the training, or those
    asked for, that do not depend on chance."""
    steps = config.preprocess if preprocess is None else preprocess
    kept = [step for step in steps.split("_and_") if not any(t in step for t in RANDOM_TOKENS)]
    side = config.crop_size if size is None else size
    first = (1, 1)
    if "fixsize" in steps:
        skip = config.broken_files == "skip"
        _, (width, height) = next(readable(paths, image_size, skip=skip))
        first = (width // 2 if part in ("left", "right") else width, height)
    return Preprocess("_and_".join(kept) or "none", side, side, flip=False, fixed_size=first)


def targets(
    paths: Sequence[Path],
    input: Path,
    out: Path,
    format: Format | None = None,
    usual: str = ".png",
) -> dict[Path, Path]:
    """The file to write for each of `paths`, which is the image `input` or lies in that folder.

    A result has the name and the place of its image, with the extension of the format, or the `usual` one. Where images differ
    in their extensions alone, as `a.jpg` and `a.png`, those of another one than the format's keep it before that: `a.jpg.png`
    and `a.png`.

    Raises:
        UserError: results would have the same name or overwrite their images, or `out` or `format` is not for this.
    """
    if format is not None and format not in get_args(Format):
        raise UserError(f"format={format} is unknown. Use {', '.join(get_args(Format))}.")
    suffix = out.suffix.lower()
    if suffix in {*EXTENSIONS, *_FORMATS} and not out.is_dir():
        return {_only(paths, input, out): _as_file(out, format)}
    folder = input if input.is_dir() else input.parent
    extension = f".{format}" if format else usual
    stems = Counter(path.with_suffix("") for path in paths)
    found: dict[Path, Path] = {}
    for path in paths:
        name = path.relative_to(folder)
        alone = stems[path.with_suffix("")] == 1 or path.suffix.lower() == extension
        target = out / (name.with_suffix(extension) if alone else f"{name}{extension}")
        if target in found:
            raise UserError(
                f"{path} and {found[target]} would both be written to {target}. Rename one of them."
            )
        found[target] = path
    for target, path in found.items():
        if target.resolve() == path.resolve():
            raise UserError(f"out={out} would overwrite {path}. Name another folder.")
    return {path: target for target, path in found.items()}


def _only(paths: Sequence[Path], input: Path, out: Path) -> Path:
    """The image for which `out` names a file."""
    if input.is_dir():
        raise UserError(
            f"out={out} is the name of a file, but input={input} a folder. Name a folder for its results."
        )
    if out.resolve() == input.resolve():
        raise UserError(f"out={out} would overwrite {input}. Name another file.")
    return paths[0]


def _as_file(out: Path, format: Format | None) -> Path:
    meant = _FORMATS.get(out.suffix.lower())
    if meant is None:
        raise UserError(
            f"out={out}: results are written as {', '.join(get_args(Format))}. Use one of these extensions."
        )
    if format not in (None, meant):
        raise UserError(f"out={out} and format={format} are two formats. Leave one of them out.")
    return out


class Picture(NamedTuple):
    pixels: Tensor
    """(C, H, W) in [-1, 1]."""
    alpha: Image.Image | None
    """Of the same size."""


def _holds_alpha(path: Path, config: TranslationConfig) -> bool:
    eight_bits = config.bits == 8 and config.value_range is None
    return eight_bits and _FORMATS[path.suffix.lower()] not in ("jpg", "npy")


def groups_of_one_size(
    images: Iterable[tuple[Path, Picture]], limit: int, tile: int | None
) -> Iterator[list[tuple[Path, Picture]]]:
    """At most `limit` images that follow each other and have one size; one, where it is larger than a tile."""
    group: list[tuple[Path, Picture]] = []
    try:
        for path, image in images:
            in_tiles = tile is not None and max(image.pixels.shape) > tile
            if group and image.pixels.shape != group[0][1].pixels.shape:
                yield group
                group = []
            group.append((path, image))
            if in_tiles or len(group) == limit:
                yield group
                group = []
    except UserError:  # a file that cannot be read: those before it are not lost
        if group:
            yield group
        raise
    if group:
        yield group
