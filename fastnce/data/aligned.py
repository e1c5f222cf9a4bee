"""Pairs of images, as an endless stream of samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fastnce.data.broken import BrokenFiles
from fastnce.data.domains import A_STREAM, CachedImages, Side, TwoDomains, expect_one_of
from fastnce.data.folders import contents, list_images, split_folder
from fastnce.data.stream import counter_rng
from fastnce.data.transforms import Preprocess
from fastnce.errors import UserError

_LAYOUTS = "Expected train with A and B side by side in each image, or trainA and trainB with equal names (for testing, test or val)."


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
        super().__init__(seed)
        expect_one_of("direction", direction, ("AtoB", "BtoA"))
        expect_one_of("broken_files", broken_files, ("error", "skip"))
        sides = find_pairs(root, split, direction)
        phases = [Preprocess(preprocess, load_size, crop_size, flip)]
        broken = BrokenFiles(sides[0].folder, sides[0].paths, broken_files == "skip")
        self.serial = serial
        self.a, self.b = (
            CachedImages(side, broken, phases, channels, bits, value_range, cache_bytes // 2)
            for side, channels in zip(sides, (channels_a, channels_b), strict=True)
        )
        for index in self.a.sizes.keys() & self.b.sizes.keys():
            size_a, size_b = self.a.sizes[index], self.b.sizes[index]
            if size_a != size_b:
                raise UserError(
                    f"{self.b.paths[index]}: is {size_b[0]}x{size_b[1]}, but its partner {self.a.paths[index]} "
                    f"{size_a[0]}x{size_a[1]}. Scale one of them: the images of a pair must have one size."
                )

    def __len__(self) -> int:
        """Pairs."""
        return len(self.a.paths)

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        while True:
            broken = self.broken_count
            pair = {
                # Two generators that draw the same: the same crop and mirroring.
                name: domain.sample(
                    self.position(index), 0, counter_rng(self.seed, A_STREAM, index)
                )
                for name, domain in (("A", self.a), ("B", self.b))
            }
            # Else one of them was just found broken, and the next one in its place is no partner of the other.
            if self.broken_count == broken:
                return pair


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
