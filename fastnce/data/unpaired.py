"""Two folders of images without pairs, as an endless stream of samples."""

from collections.abc import Mapping
from pathlib import Path

import torch

from fastnce.data.broken import BrokenFiles
from fastnce.data.domains import A_STREAM, B_STREAM, CachedImages, Side, TwoDomains, expect_one_of
from fastnce.data.folders import list_images, split_folder
from fastnce.data.stream import counter_rng
from fastnce.data.transforms import Preprocess


class UnpairedImages(TwoDomains):
    """`root/trainA` and `root/trainB`, in the layout and with the transforms of CUT.

    Sample i, for any i >= 0, is a pure function of (seed, i) and the arguments, so samples can be
    read in any order, by any number of workers, and from the middle on. Every `len(self)` samples
    are an epoch: all of A (repeated if B is larger) in an order drawn for that epoch; the partner
    from B and all augmentation are drawn for each sample.

    Args:
        root: Folder that holds trainA and trainB (testA and testB, or valA and valB, for
            `split="test"`); or the folders by these names, wherever they are.
        split: "train", "test" or any other prefix of the two folders.
        load_size: Side, in pixels, to which `preprocess` scales.
        crop_size: Side of the random crop.
        preprocess: Steps, matched by substring: see `Preprocess`. "fixsize" scales to the size of
            a folder's first image.
        flip: Mirrors each image with probability 0.5.
        augment_a: "affine" turns, scales and shifts A slightly; "none" does not.
        channels_a: 3 for RGB, 1 for greyscale, of the samples' "A".
        channels_b: The same for "B".
        bits: 16 keeps all bits of 16-bit greyscale files; 8 scales them to 8.
        value_range: The files' numbers that become -1 and 1, in float32; those beyond are clipped. Without it files must hold 8
            bits or 16-bit grey.
        direction: "AtoB", or "BtoA" to read "A" from trainB and "B" from trainA.
        serial: Takes both folders in order, without shuffling.
        jitter_samples: From this sample on `load_size` is `crop_size`, as in the second half of
            CUT's training.
        seed: Seed of the stream.
        cache_bytes: Memory for decoded images, shared out among the workers.
        broken_files: "error" stops at the first file that cannot be read. "skip" takes the next
            readable file of the folder in its place, so that all other samples stay what they are,
            and names the file in the log, once.

    Raises:
        UserError: A folder is missing or empty, a file is not an image (all files of a folder, if
            they are skipped), an image is smaller than the crop, or an argument is out of range.
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
        super().__init__(seed)
        expect_one_of("broken_files", broken_files, ("error", "skip"))
        expect_one_of("augment_a", augment_a, ("none", "affine"))
        expect_one_of("direction", direction, ("AtoB", "BtoA"))
        folders = [split_folder(root, split, domain) for domain in direction.split("to")]
        load_sizes = [load_size] if jitter_samples is None else [load_size, crop_size]

        def domain(folder: Path, channels: int, affine: bool) -> CachedImages:
            side = Side(folder, list_images(folder))
            broken = BrokenFiles(folder, side.paths, broken_files == "skip")
            first_size = (1, 1)  # known when the headers have been read
            phases = [
                Preprocess(preprocess, size, crop_size, flip, affine, first_size)
                for size in load_sizes
            ]
            rest = (channels, bits, value_range, cache_bytes // 2)
            return CachedImages(side, broken, phases, *rest)

        self.serial, self.jitter_samples = serial, jitter_samples
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
