"""The images of two domains, with and without pairs, as endless streams of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from fastnce.data.broken import BrokenFiles
from fastnce.data.folders import contents, describe_folder, list_images, split_folder
from fastnce.data.images import Bands, check_depth, image_size, read_image, to_tensor
from fastnce.data.stream import Stream, counter_rng
from fastnce.data.transforms import OF_FIRST_IMAGE, Preprocess
from fastnce.errors import UserError
from fastnce.files import named_sizes

ORDER_STREAM, A_STREAM, B_STREAM = 0, 1, 2

# Up to this many bytes of images are decoded when the dataset is made, the rest when first needed.
EAGER_BYTES = 64 * 2**20

_LAYOUTS = "Expected train with A and B side by side in each image, or trainA and trainB with equal names (for testing, test or val)."


class Side(NamedTuple):
    """One domain's files, of pairs in their order, and which half of a file it is; None for all of it."""

    folder: Path
    paths: list[Path]
    half: str | None = None


class CachedImages:
    """One domain's images, scaled, and kept in memory as far as they fit.

    `phases` has one `Preprocess` for each part of the training, `how` the channels, bits and range of `read_image`. With the `broken` of another domain, a file that is found broken there is passed over here too.
    """

    def __init__(
        self,
        side: Side,
        broken: BrokenFiles,
        phases: list[Preprocess],
        how: tuple[int, int, tuple[float, float] | None],
        cache_bytes: int,
    ) -> None:
        channels, bits, value_range = how
        check_depth(channels, bits)
        self.folder, self.paths, self.half = side
        self.how, self.cache_bytes, self.broken = how, cache_bytes, broken
        self._bytes = named_sizes(self.folder, self.paths)
        self._cache: dict[int, tuple[int, np.ndarray]] = {}
        self._cached_bytes = 0
        # Reading every header now finds what would otherwise stop a run hours later.
        self.sizes = self._read_sizes()
        first_size = next(iter(self.sizes.values()))
        self.phases = [
            replace(phase, fixed_size=first_size) if phase.fixed_size == OF_FIRST_IMAGE else phase
            for phase in phases
        ]
        for index, size in self.sizes.items():
            for preprocess in self.phases:
                preprocess.check(self.paths[index], *size)
        pixels = sum(math.prod(self.phases[0].prepared_size(*s)) for s in self.sizes.values())
        item_bits = bits if value_range is None else 32
        if pixels * channels * item_bits // 8 <= min(EAGER_BYTES, cache_bytes):
            for index in range(len(self.paths)):
                self._prepared(index, 0)

    def files(self) -> dict[str, int | None]:
        """The size in bytes of each file by its name; None for a broken one."""
        return self.broken.unsized(self._bytes)

    def describe(self) -> list[str]:
        return describe_folder(self.folder, self.paths, *self.how, skip_broken=self.broken.skip)

    def sample(self, index: int, phase: int, rng: np.random.Generator) -> torch.Tensor:
        """Image `index`, augmented: (C, H, W) float32 in [-1, 1]."""
        return to_tensor(self.phases[phase].augment(self._prepared(index, phase), rng))

    def output_sizes(self) -> dict[tuple[int, int], Path]:
        """The sizes that images can have in the end, each with a file that gives it; the least and the greatest of random ones."""
        return {
            result: self.paths[index]
            for index, size in reversed(self.sizes.items())  # so that the first file stays
            for phase in self.phases
            for result in phase.output_sizes(*size)
        }

    def expect_one_size(self) -> None:
        phase = self.phases[0]
        sizes = {self.paths[index]: phase.output_size(*size) for index, size in self.sizes.items()}
        one, first = next(iter(sizes.items()))
        for path, size in sizes.items():
            if first is None or size is None:
                raise UserError(
                    f'preprocess="{phase.steps}" gives images of random sizes, and a batch needs one. '
                    "Add _and_crop, or use batch_size=1."
                )
            if size != first:
                raise UserError(
                    f"{path}: gives {size[0]}x{size[1]}, but {one} {first[0]}x{first[1]}, and a batch needs one size. "
                    'Use batch_size=1, or preprocess="resize_and_crop".'
                )

    def _read(self, path: Path) -> Image.Image | Bands:
        """The file's pixels, at their own size."""
        return half_of(read_image(path, *self.how), self.half)

    def _read_sizes(self) -> dict[int, tuple[int, int]]:
        """(width, height) of each file whose header can be read, by its index."""
        sizes = {}
        for index, path in enumerate(self.paths):
            if index in self.broken:
                continue
            try:
                width, height = image_size(path)
            except UserError as error:
                self.broken.note(index, error)
            else:
                sizes[index] = (width if self.half is None else width // 2, height)
        return sizes

    def _prepared(self, index: int, phase: int) -> np.ndarray:
        """Image `index`, or the next one in the place of a broken one, as `prepare` makes it."""
        return self.broken.read(index, lambda i: self._prepared_unless_broken(i, phase))

    def _prepared_unless_broken(self, index: int, phase: int) -> np.ndarray:
        cached_phase, cached = self._cache.get(index, (None, None))
        if cached_phase == phase:
            return cached
        array = self.phases[phase].prepare(self._read(self.paths[index]))
        if cached is not None:
            self._cached_bytes -= cached.nbytes
            del self._cache[index]
        worker = get_worker_info()
        room = self.cache_bytes // (worker.num_workers if worker else 1)
        if self._cached_bytes + array.nbytes <= room:
            self._cache[index] = (phase, array)
            self._cached_bytes += array.nbytes
        return array


class FileStream(Stream):
    """A stream of samples, each of which shows files of one or more sets of images.

    Attributes:
        parts: the sets, by the names that they have in a sample.
    """

    def __init__(self, seed: int, serial: bool, broken_files: str) -> None:
        super().__init__(seed)
        expect_one_of("broken_files", broken_files, ("error", "skip"))
        self.serial = serial

    @property
    def parts(self) -> Mapping[str, CachedImages]:
        raise NotImplementedError

    def files(self) -> dict[str, dict[str, int | None]]:
        """Each part's files by their names, with their sizes in bytes: see `fastnce.files.changed_files`."""
        return {name: part.files() for name, part in self.parts.items()}

    @property
    def broken_count(self) -> int:
        """How many files, or pairs, have been found broken, and skipped, so far."""
        return sum(broken.count for broken in {part.broken for part in self.parts.values()})

    def describe(self) -> list[str]:
        """A line for each folder: see `describe_folder`."""
        lines = [line for part in self.parts.values() for line in part.describe()]
        return list(dict.fromkeys(lines))

    def output_sizes(self) -> tuple[dict[tuple[int, int], Path], ...]:
        """The sizes (width, height) that each part's images can have, each with a file that gives it."""
        return tuple(part.output_sizes() for part in self.parts.values())

    def expect_one_size(self) -> None:
        """Raises UserError, naming two files, unless all samples can be stacked into batches."""
        for part in self.parts.values():
            part.expect_one_size()

    def position(self, index: int) -> int:
        """Where sample `index` is in the order of the files: all of them in each epoch, in an order drawn for it."""
        epoch, position = divmod(index, len(self))
        if self.serial:
            return position
        return int(self.permutation(ORDER_STREAM, epoch, len(self))[position])

    def expect_partners_of_one_size(self) -> None:
        """Raises UserError, naming two files, unless the files of each sample have the same size."""
        first, *others = self.parts.values()
        for other in others:
            for index in first.sizes.keys() & other.sizes.keys():
                size, expected = other.sizes[index], first.sizes[index]
                if size != expected:
                    raise UserError(
                        f"{other.paths[index]}: is {size[0]}x{size[1]}, but its partner {first.paths[index]} "
                        f"{expected[0]}x{expected[1]}. Scale one of them: the images of a pair must have one size."
                    )

    def partners(self, index: int) -> dict[str, torch.Tensor]:
        """What belongs together in sample `index`, with the same crop and mirroring."""
        while True:
            broken = self.broken_count
            sample = {
                # Generators that draw the same.
                name: part.sample(self.position(index), 0, counter_rng(self.seed, A_STREAM, index))
                for name, part in self.parts.items()
            }
            # Else one of them was just found broken, and the next one in its place is no partner of the other.
            if self.broken_count == broken:
                return sample


class TwoDomains(FileStream):
    """A stream of samples of two domains, {"A": (C, H, W), "B": (C, H, W)}, float32 in [-1, 1].

    Attributes:
        a, b: the images of each.
    """

    a: CachedImages
    b: CachedImages

    def __init__(self, seed: int, serial: bool, direction: str, broken_files: str) -> None:
        super().__init__(seed, serial, broken_files)
        expect_one_of("direction", direction, ("AtoB", "BtoA"))

    @property
    def parts(self) -> Mapping[str, CachedImages]:
        return {"A": self.a, "B": self.b}


class UnpairedImages(TwoDomains):
    """`root/trainA` and `root/trainB`, in the layout and with the transforms of CUT.

    Sample i, for any i >= 0, is a pure function of (seed, i) and the arguments: see `Stream`. Every `len(self)` samples are an
    epoch: all of A (repeated if B is larger) in an order drawn for that epoch; the partner from B and all augmentation are drawn
    for each sample.

    Args:
        root: Folder that holds trainA and trainB (testA and testB, or valA and valB, for `split="test"`); or the folders by
            these names, wherever they are.
        split: "train", "test" or any other prefix of the two folders.
        load_size: Side, in pixels, to which `preprocess` scales.
        crop_size: Side of the random crop.
        preprocess: Steps, matched by substring: see `Preprocess`. "fixsize" scales to the size of a folder's first image.
        flip: Mirrors each image with probability 0.5.
        augment_a: "affine" turns, scales and shifts A slightly; "none" does not.
        channels_a, channels_b: 3 for RGB, 1 for greyscale, of the samples' "A" and "B".
        bits: 16 keeps all bits of 16-bit greyscale files; 8 scales them to 8.
        value_range: The files' numbers that become -1 and 1, in float32; those beyond are clipped. Without it files must hold 8
            bits or 16-bit grey.
        direction: "AtoB", or "BtoA" to read "A" from trainB and "B" from trainA.
        serial: Takes both folders in order, without shuffling.
        jitter_samples: From this sample on `load_size` is `crop_size`, as in the second half of CUT's training.
        seed: Seed of the stream.
        cache_bytes: Memory for decoded images, shared out among the workers.
        broken_files: "error" stops at the first file that cannot be read. "skip" takes the next readable file of the folder in
            its place, so that all other samples stay what they are, and names the file in the log, once.

    Raises:
        UserError: A folder is missing or empty, a file is not an image (all files of a folder, if they are skipped), an image is
            smaller than the crop, or an argument is out of range.
    """

    def __init__(
        self,
        root: Path | str | Mapping[str, Path],
        split: str = "train",
        *,
        load_size: int = 286,
        crop_size: int = 256,
        preprocess: str = "resize_and_crop",
        flip: bool = True,
        augment_a: str = "none",
        channels_a: int = 3,
        channels_b: int = 3,
        bits: int = 8,
        value_range: tuple[float, float] | None = None,
        direction: str = "AtoB",
        serial: bool = False,
        jitter_samples: int | None = None,
        seed: int = 0,
        cache_bytes: int = 2 * 2**30,
        broken_files: str = "error",
    ) -> None:
        super().__init__(seed, serial, direction, broken_files)
        expect_one_of("augment_a", augment_a, ("none", "affine"))
        folders = [split_folder(root, split, domain) for domain in direction.split("to")]
        load_sizes = [load_size] if jitter_samples is None else [load_size, crop_size]

        def domain(folder: Path, channels: int, affine: bool) -> CachedImages:
            side = Side(folder, list_images(folder))
            broken = BrokenFiles(folder, side.paths, broken_files == "skip")
            phases = [
                Preprocess(preprocess, size, crop_size, flip, affine, OF_FIRST_IMAGE)
                for size in load_sizes
            ]
            how = (channels, bits, value_range)
            return CachedImages(side, broken, phases, how, cache_bytes // 2)

        self.jitter_samples = jitter_samples
        self.a = domain(folders[0], channels_a, augment_a == "affine")
        self.b = domain(folders[1], channels_b, False)

    def __len__(self) -> int:
        """Samples in an epoch: the larger folder's number of images."""
        return max(len(self.a.paths), len(self.b.paths))

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        phase = int(self.jitter_samples is not None and index >= self.jitter_samples)
        rng_a = counter_rng(self.seed, A_STREAM, index)
        rng_b = counter_rng(self.seed, B_STREAM, index)
        index_b = index if self.serial else int(rng_b.integers(len(self.b.paths)))
        return {
            "A": self.a.sample(self.position(index) % len(self.a.paths), phase, rng_a),
            "B": self.b.sample(index_b % len(self.b.paths), phase, rng_b),
        }


class AlignedImages(TwoDomains):
    """Pairs of images in one of two layouts, with the transforms of pix2pix.

    `root/train` (for testing `root/test`, or `root/val`) holds files with A in the left and B in the right half. Or
    `root/trainA` and `root/trainB` (testA and testB, or valA and valB) hold files of equal names, but for the extension.

    Sample i, for any i >= 0, is a pure function of (seed, i) and the arguments. Every `len(self)` samples are an epoch: all
    pairs, in an order drawn for that epoch. Crop and mirroring are drawn for each sample, the same for both images.

    Args:
        root: folder of the data; or the folders by the names trainA, trainB, testA and testB, wherever they are.
        split: "train" or "test".
        direction: "AtoB", or "BtoA" to exchange the samples' "A" and "B".
        broken_files: "error" stops at the first file that cannot be read. "skip" takes the next readable pair in its place
            and names the file in the log, once.
        load_size, crop_size, preprocess, flip, channels_a, channels_b, bits, value_range, serial, seed, cache_bytes: as of
            `UnpairedImages`.

    Raises:
        UserError: no such folders, a file without a partner, a pair of different sizes, a file that is no image, an image
            smaller than the crop, or an argument out of range.
    """

    def __init__(
        self,
        root: Path | str | Mapping[str, Path],
        split: str = "train",
        *,
        load_size: int = 286,
        crop_size: int = 256,
        preprocess: str = "resize_and_crop",
        flip: bool = True,
        channels_a: int = 3,
        channels_b: int = 3,
        bits: int = 8,
        value_range: tuple[float, float] | None = None,
        direction: str = "AtoB",
        serial: bool = False,
        seed: int = 0,
        cache_bytes: int = 2 * 2**30,
        broken_files: str = "error",
    ) -> None:
        super().__init__(seed, serial, direction, broken_files)
        sides = find_pairs(root, split, direction)
        phases = [Preprocess(preprocess, load_size, crop_size, flip)]
        broken = BrokenFiles(sides[0].folder, sides[0].paths, broken_files == "skip")
        self.a, self.b = (
            CachedImages(side, broken, phases, (channels, bits, value_range), cache_bytes // 2)
            for side, channels in zip(sides, (channels_a, channels_b), strict=True)
        )
        self.expect_partners_of_one_size()

    def __len__(self) -> int:
        """Pairs."""
        return len(self.a.paths)

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        return self.partners(index)


def find_pairs(
    root: Path | str | Mapping[str, Path], split: str, direction: str = "AtoB"
) -> tuple[Side, Side]:
    """The files to translate, and those of what they should become, in the layouts of `AlignedImages`.

    Raises:
        UserError: no such folders, or a file without a partner.
    """
    if isinstance(root, Mapping):
        a, b = _matched(split_folder(root, split, "A"), split_folder(root, split, "B"))
    else:
        a, b = _find_a_and_b(Path(root), split)
    return (a, b) if direction == "AtoB" else (b, a)


def holds_pairs(root: Path | str) -> bool:
    """Whether a folder holds test images side by side. (Files of equal names in two folders need not be pairs.)"""
    try:
        return find_pairs(root, "test")[0].half is not None
    except UserError:
        return False


def _find_a_and_b(root: Path, split: str) -> tuple[Side, Side]:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. {_LAYOUTS}")
    for name in [split] + (["val"] if split == "test" else []):
        if (root / name).is_dir():
            paths = list_images(root / name)
            return Side(root / name, paths, "left"), Side(root / name, paths, "right")
        if (root / f"{name}A").is_dir() and (root / f"{name}B").is_dir():
            return _matched(root / f"{name}A", root / f"{name}B")
    raise UserError(f"{root}: no folder {split}. {_LAYOUTS} Found {contents(root)}.")


def _matched(folder_a: Path, folder_b: Path) -> tuple[Side, Side]:
    a, b = match([folder_a, folder_b], [by_name(folder_a), by_name(folder_b)])
    return a, b


def by_name(folder: Path) -> dict[Path, Path]:
    """The images in a folder and below it, by their paths in it without the extension."""
    return {path.relative_to(folder).with_suffix(""): path for path in list_images(folder)}


def match(folders: Sequence[Path], named: Sequence[Mapping[Path, Path]]) -> list[Side]:
    """The sides whose files of equal names belong together, sorted by name.

    Args:
        folders: A folder for each side, for errors.
        named: Each side's files by name.

    Raises:
        UserError: A name that one side lacks.
    """
    names = sorted(set().union(*named))
    for name in names:
        for found, folder in zip(named, folders, strict=True):
            if name not in found:
                raise UserError(
                    f"{folder}: holds no {name}, but its partner folder does. "
                    "Give the files of a pair the same name, and each a partner."
                )
    return [
        Side(folder, [found[name] for name in names])
        for folder, found in zip(folders, named, strict=True)
    ]


def half_of(image: Image.Image | Bands, half: str | None) -> Image.Image | Bands:
    """The "left" or the "right" half of an image, without the column between them if its width is odd."""
    width, height = image.size
    if half == "left":
        return image.crop((0, 0, width // 2, height))
    return image.crop((width - width // 2, 0, width, height)) if half == "right" else image


def expect_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f'{name}="{value}": expected {" or ".join(choices)}.')
