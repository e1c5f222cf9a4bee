"""The images of two domains, scaled and kept in memory: the common part of the datasets of pairs and without pairs."""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from fastnce.data.broken import BrokenFiles
from fastnce.data.files import named_sizes
from fastnce.data.folders import describe_folder
from fastnce.data.images import Bands, check_depth, image_size, read_image, to_tensor
from fastnce.data.stream import Stream
from fastnce.data.transforms import Preprocess
from fastnce.errors import UserError

ORDER_STREAM, A_STREAM, B_STREAM = 0, 1, 2

# Up to this many bytes of images are decoded when the dataset is made, the rest when first needed.
EAGER_BYTES = 64 * 2**20


class Side(NamedTuple):
    """One domain's files, of pairs in their order, and which half of a file it is; None for all of it."""

    folder: Path
    paths: list[Path]
    half: str | None = None


class CachedImages:
    """One domain's images, scaled, and kept in memory as far as they fit.

    `phases` has one `Preprocess` for each part of the training. With the `broken` of another domain, a file that is found broken there is passed over here too.
    """

    def __init__(
        self,
        side: Side,
        broken: BrokenFiles,
        phases: list[Preprocess],
        channels: int,
        bits: int,
        value_range: tuple[float, float] | None,
        cache_bytes: int,
    ) -> None:
        check_depth(channels, bits)
        self.folder, self.paths, self.half = side
        self.how, self.cache_bytes, self.broken = (channels, bits, value_range), cache_bytes, broken
        self._bytes = named_sizes(self.folder, self.paths)
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
        image = half_of(read_image(self.paths[index], *self.how), self.half)
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


class TwoDomains(Stream):
    """A stream of samples of two domains, {"A": (C, H, W), "B": (C, H, W)}, float32 in [-1, 1].

    Attributes:
        a, b: the images of each.
        serial: takes them in order, without shuffling.
    """

    a: CachedImages
    b: CachedImages
    serial: bool

    def files(self) -> dict[str, dict[str, int | None]]:
        """The files of "A" and "B" by their names, with their sizes in bytes: see `fastnce.data.files.changed_files`."""
        return {"A": self.a.files(), "B": self.b.files()}

    @property
    def broken_count(self) -> int:
        """How many files, or pairs, have been found broken, and skipped, so far."""
        return sum(broken.count for broken in {self.a.broken, self.b.broken})

    def describe(self) -> list[str]:
        """A line for each folder: see `describe_folder`."""
        one_folder = self.a.folder == self.b.folder
        return self.a.describe() + ([] if one_folder else self.b.describe())

    def output_sizes(self) -> tuple[dict[tuple[int, int], Path], dict[tuple[int, int], Path]]:
        """The sizes (width, height) that the samples' "A" and "B" can have, each with a file that gives it."""
        return self.a.output_sizes(), self.b.output_sizes()

    def expect_one_size(self) -> None:
        """Raises UserError, naming two files, unless all samples can be stacked into batches."""
        for domain in (self.a, self.b):
            domain.expect_one_size()

    def position(self, index: int) -> int:
        """Where sample `index` is in the order of the files: all of them in each epoch, in an order drawn for it."""
        epoch, position = divmod(index, len(self))
        if self.serial:
            return position
        return int(self.permutation(ORDER_STREAM, epoch, len(self))[position])


def half_of(image: Image.Image | Bands, half: str | None) -> Image.Image | Bands:
    """The "left" or the "right" half of an image, without the column between them if its width is odd."""
    width, height = image.size
    if half == "left":
        return image.crop((0, 0, width // 2, height))
    return image.crop((width - width // 2, 0, width, height)) if half == "right" else image


def expect_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f'{name}="{value}": expected {" or ".join(choices)}.')
