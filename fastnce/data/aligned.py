"""Pairs of images, as an endless stream of samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from fastnce.data.broken import BrokenFiles
from fastnce.data.folders import check_depth, contents, list_images, split_folder
from fastnce.data.transforms import Preprocess, counter_rng
from fastnce.data.unpaired import A_STREAM, ORDER_STREAM, CachedImages, expect_one_of
from fastnce.errors import UserError

_LAYOUTS = "Expected train with A and B side by side in each image, or trainA and trainB with equal names (for testing, test or val)."


class AlignedImages(Dataset):
    """Pairs of images in one of two layouts, with the transforms of pix2pix.

    `root/train` (for testing `root/test`, or `root/val`) holds files with A in the left and B in the right half. Or
    `root/trainA` and `root/trainB` (testA and testB, or valA and valB) hold files of equal names, but for the extension.

    Sample i, for any i >= 0, is a pure function of (seed, i) and the arguments. Every `len(self)` samples are an epoch: all
    pairs, in an order drawn for that epoch. Crop and mirroring are drawn for each sample, the same for both images.

    Args:
        root: folder of the data; or the folders by the names trainA, trainB, testA and testB, wherever they are.
        split: "train" or "test".
        load_size: side, in pixels, to which `preprocess` scales.
        crop_size: side of the random crop.
        preprocess: steps, matched by substring: see `Preprocess`.
        flip: mirrors each pair with probability 0.5.
        channels_a: 3 for RGB, 1 for greyscale, of the samples' "A".
        channels_b: the same for "B".
        bits: 16 keeps all bits of 16-bit greyscale files; 8 scales them to 8.
        value_range: the files' numbers that become -1 and 1: see `UnpairedImages`.
        direction: "AtoB", or "BtoA" to exchange the samples' "A" and "B".
        serial: takes the pairs in order, without shuffling.
        seed: seed of the stream.
        cache_bytes: memory for decoded images, shared out among the workers.
        broken_files: "error" stops at the first file that cannot be read. "skip" takes the next readable pair in its place
            and names the file in the log, once.

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
        expect_one_of("direction", direction, ("AtoB", "BtoA"))
        expect_one_of("broken_files", broken_files, ("error", "skip"))
        sides = find_pairs(root, split, direction)
        phases = [Preprocess(preprocess, load_size, crop_size, flip)]

        broken = BrokenFiles(sides[0].folder, sides[0].paths, broken_files == "skip")

        def domain(side: Side, channels: int) -> CachedImages:
            check_depth(channels, bits)
            rest = (phases, cache_bytes // 2, broken, side.half)
            return CachedImages(side.folder, side.paths, channels, bits, value_range, *rest)

        self.seed, self.serial = seed, serial
        self.a = domain(sides[0], channels_a)
        self.b = domain(sides[1], channels_b)
        self._check_sizes()
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Pairs."""
        return len(self.a.paths)

    def __iter__(self):
        """One epoch; without this a plain `for` would never end, as every index is valid."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index` of the stream: {"A": (C, H, W), "B": (C, H, W)}, float32 in [-1, 1]."""
        if index < 0:
            raise IndexError(f"AlignedImages: sample {index} does not exist. Samples start at 0.")
        while True:
            broken = self.broken_count
            pair = {
                # Two generators that draw the same: the same crop and mirroring.
                name: domain.sample(self._index(index), 0, counter_rng(self.seed, A_STREAM, index))
                for name, domain in (("A", self.a), ("B", self.b))
            }
            # Else one of them was just found broken, and the next one in its place is no partner of the other.
            if self.broken_count == broken:
                return pair

    def files(self) -> dict[str, dict[str, int | None]]:
        """The files of "A" and "B" by their names, with their sizes in bytes: see `fastnce.data.files.changed_files`."""
        return {"A": self.a.files(), "B": self.b.files()}

    @property
    def broken_count(self) -> int:
        """How many pairs with a broken file have been found, and skipped, so far."""
        return self.a.broken.count

    def describe(self) -> list[str]:
        """What was found, in a line for each folder: see `describe_folder`."""
        one_folder = self.a.folder == self.b.folder
        return self.a.describe() + ([] if one_folder else self.b.describe())

    def output_sizes(self) -> tuple[dict[tuple[int, int], Path], dict[tuple[int, int], Path]]:
        """The sizes (width, height) that the samples' "A" and "B" can have, each with a file that gives it."""
        return self.a.output_sizes(), self.b.output_sizes()

    def expect_one_size(self) -> None:
        """Raises UserError, naming two files, unless all samples can be stacked into batches."""
        self.a.expect_one_size()

    def _index(self, index: int) -> int:
        epoch, position = divmod(index, len(self))
        if self.serial:
            return position
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = counter_rng(self.seed, ORDER_STREAM, epoch).permutation(len(self))
        return int(self._order[position])

    def _check_sizes(self) -> None:
        for index in self.a.sizes.keys() & self.b.sizes.keys():
            size_a, size_b = self.a.sizes[index], self.b.sizes[index]
            if size_a != size_b:
                raise UserError(
                    f"{self.b.paths[index]}: is {size_b[0]}x{size_b[1]}, but its partner {self.a.paths[index]} "
                    f"{size_a[0]}x{size_a[1]}. Scale one of them: the images of a pair must have one size."
                )


class Side(NamedTuple):
    """One domain's files, in the order of the pairs, and which half of a file it is; None for all of it."""

    folder: Path
    paths: list[Path]
    half: str | None = None


def find_pairs(
    root: Path | str | Mapping[str, Path], split: str, direction: str = "AtoB"
) -> tuple[Side, Side]:
    """The files of the images to translate, and those of what they should become, in the layouts of `AlignedImages`.

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
    named = [
        {path.relative_to(folder).with_suffix(""): path for path in list_images(folder)}
        for folder in (folder_a, folder_b)
    ]
    names = sorted(named[0].keys() | named[1].keys())
    for name in names:
        for found, folder in zip(named, (folder_a, folder_b), strict=True):
            if name not in found:
                raise UserError(
                    f"{folder}: holds no {name}, but its partner folder does. "
                    "Give the files of a pair the same name, and each a partner."
                )
    a, b = ([found[name] for name in names] for found in named)
    return Side(folder_a, a), Side(folder_b, b)
