"""Two folders of images without pairs, as an endless stream of samples."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from fastnce.data.broken import BrokenFiles
from fastnce.data.files import named_sizes
from fastnce.data.folders import (
    Bands,
    check_depth,
    image_size,
    list_images,
    read_image,
    split_folder,
    to_tensor,
)
from fastnce.data.survey import describe_folder
from fastnce.data.transforms import Preprocess, counter_rng
from fastnce.errors import UserError

ORDER_STREAM, A_STREAM, B_STREAM = 0, 1, 2

# Up to this many bytes of images are decoded when the dataset is made, the rest when first needed.
EAGER_BYTES = 64 * 2**20


class UnpairedImages(Dataset):
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
        expect_one_of("broken_files", broken_files, ("error", "skip"))
        expect_one_of("augment_a", augment_a, ("none", "affine"))
        expect_one_of("direction", direction, ("AtoB", "BtoA"))
        first, second = ("A", "B") if direction == "AtoB" else ("B", "A")
        folder_a, folder_b = split_folder(root, split, first), split_folder(root, split, second)

        def domain(folder: Path, channels: int, affine: bool) -> CachedImages:
            check_depth(channels, bits)
            paths = list_images(folder)
            first_size = (1, 1)  # known when the headers have been read
            phases = [
                Preprocess(preprocess, size, crop_size, flip, affine, first_size)
                for size in ([load_size] if jitter_samples is None else [load_size, crop_size])
            ]
            broken = BrokenFiles(folder, paths, broken_files == "skip")
            return CachedImages(
                folder, paths, channels, bits, value_range, phases, cache_bytes // 2, broken
            )

        self.seed, self.serial, self.jitter_samples = seed, serial, jitter_samples
        self.a = domain(folder_a, channels_a, augment_a == "affine")
        self.b = domain(folder_b, channels_b, False)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Samples in an epoch: the larger folder's number of images."""
        return max(len(self.a.paths), len(self.b.paths))

    def __iter__(self):
        """One epoch; without this a plain `for` would never end, as every index is valid."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index` of the stream: {"A": (C, H, W), "B": (C, H, W)}, float32 in [-1, 1]."""
        if index < 0:
            raise IndexError(f"UnpairedImages: sample {index} does not exist. Samples start at 0.")
        phase = int(self.jitter_samples is not None and index >= self.jitter_samples)
        rng_a = counter_rng(self.seed, A_STREAM, index)
        rng_b = counter_rng(self.seed, B_STREAM, index)
        index_b = index if self.serial else int(rng_b.integers(len(self.b.paths)))
        return {
            "A": self.a.sample(self._index_a(index), phase, rng_a),
            "B": self.b.sample(index_b % len(self.b.paths), phase, rng_b),
        }

    def files(self) -> dict[str, dict[str, int | None]]:
        """The files of "A" and "B" by their names, with their sizes in bytes: see `fastnce.data.files.changed_files`."""
        return {"A": self.a.files(), "B": self.b.files()}

    @property
    def broken_count(self) -> int:
        """How many files of both folders have been found broken, and skipped, so far."""
        return self.a.broken.count + self.b.broken.count

    def describe(self) -> list[str]:
        """What was found, in a line for each folder: see `describe_folder`."""
        return self.a.describe() + self.b.describe()

    def output_sizes(self) -> tuple[dict[tuple[int, int], Path], dict[tuple[int, int], Path]]:
        """The sizes (width, height) that the samples' "A" and "B" can have, each with a file that gives it."""
        return self.a.output_sizes(), self.b.output_sizes()

    def expect_one_size(self) -> None:
        """Raises UserError, naming two files, unless all samples can be stacked into batches."""
        for domain in (self.a, self.b):
            domain.expect_one_size()

    def _index_a(self, index: int) -> int:
        epoch, position = divmod(index, len(self))
        if not self.serial:
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = counter_rng(self.seed, ORDER_STREAM, epoch).permutation(len(self))
            position = int(self._order[position])
        return position % len(self.a.paths)


class CachedImages:
    """One domain's images, scaled, and kept in memory as far as they fit.

    `phases` has one `Preprocess` for each part of the training. With `half`, "left" or "right", an image is that half of its
    file. With the `broken` of another domain, a file that is found broken there is passed over here too.
    """

    def __init__(
        self,
        folder: Path,
        paths: list[Path],
        channels: int,
        bits: int,
        value_range: tuple[float, float] | None,
        phases: list[Preprocess],
        cache_bytes: int,
        broken: BrokenFiles,
        half: str | None = None,
    ) -> None:
        self.folder, self.paths, self.half = folder, paths, half
        self.channels, self.bits, self.value_range = channels, bits, value_range
        self.cache_bytes, self.broken = cache_bytes, broken
        self._bytes = named_sizes(folder, paths)
        self._cache: dict[int, tuple[int, np.ndarray]] = {}
        self._cached_bytes = 0
        # Reading every header now finds what would otherwise stop a run hours later.
        self.sizes = self._read_sizes()
        first_size = next(iter(self.sizes.values()))
        self.phases = [replace(phase, fixed_size=first_size) for phase in phases]
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
        return describe_folder(
            self.folder,
            self.paths,
            self.channels,
            self.bits,
            self.value_range,
            skip_broken=self.broken.skip,
        )

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
        one, first = None, None
        for index, size in self.sizes.items():
            path, result = self.paths[index], self.phases[0].output_size(*size)
            if result is None:
                raise UserError(
                    f'preprocess="{self.phases[0].steps}" gives images of random sizes, and a batch needs one. '
                    "Add _and_crop, or use batch_size=1."
                )
            one, first = (path, result) if first is None else (one, first)
            if result != first:
                raise UserError(
                    f"{path}: gives {result[0]}x{result[1]}, but {one} {first[0]}x"
                    f"{first[1]}, and a batch needs one size. Use batch_size=1, or "
                    'preprocess="resize_and_crop".'
                )

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
        how = self.channels, self.bits, self.value_range
        image = half_of(read_image(self.paths[index], *how), self.half)
        array = self.phases[phase].prepare(image)
        if cached is not None:
            self._cached_bytes -= cached.nbytes
            del self._cache[index]
        worker = get_worker_info()
        room = self.cache_bytes // (worker.num_workers if worker else 1)
        if self._cached_bytes + array.nbytes <= room:
            self._cache[index] = (phase, array)
            self._cached_bytes += array.nbytes
        return array


def half_of(image: Image.Image | Bands, half: str | None) -> Image.Image | Bands:
    """The "left" or the "right" half of an image, without the column between them if its width is odd."""
    width, height = image.size
    if half == "left":
        return image.crop((0, 0, width // 2, height))
    return image.crop((width - width // 2, 0, width, height)) if half == "right" else image


def expect_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f'{name}="{value}": expected {" or ".join(choices)}.')
