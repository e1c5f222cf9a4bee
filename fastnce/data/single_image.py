"""Patches of one image per domain, at random zooms, as an endless stream of samples: the data of SinCUT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastnce.data.broken import readable
from fastnce.data.domains import expect_one_of
from fastnce.data.folders import describe_folder, list_images, split_folder
from fastnce.data.images import Bands, read_image, resize, to_array, to_tensor
from fastnce.data.stream import Stream, counter_rng
from fastnce.errors import UserError
from fastnce.files import named_sizes

A_STREAM, B_STREAM = 20, 21


class SingleImagePatches(Stream):
    """Patches of `root/trainA` and of `root/trainB`, which hold one image each, or a few.

    Sample i, for any i >= 0, is a pure function of (seed, i) and the arguments. It is made for A and for B independently: an
    image of the folder is drawn and shrunk to random shares of its width and height, each uniform in [1 / max_zoom_out, 1] but
    no smaller than the patch. A patch of `crop_size` pixels is cut at a uniformly drawn place, and mirrored in half of the
    cases.

    The patch is that of the whole image shrunk, which the published code does for every patch, but only the patch's own pixels
    are computed: Pillow's `resize` with a `box` reads beyond the box what the bicubic kernel needs, so that a patch has no
    borders. Values are rounded and clipped to 8 bits between the horizontal and the vertical pass, and Pillow chooses by the
    sizes which comes first. Where the order differs, so do pixels: by a level or, at edges that overshoot black or white, by
    some.

    The published code draws zooms for groups of as many samples as a batch has, and then shuffles the samples, so that its
    batches mix zooms all the same. Here the zoom is drawn for each sample.

    Args:
        root: Folder that holds trainA and trainB; or the two folders by these names, wherever they are.
        split: "train" or any other prefix of the two folders.
        crop_size: Side of a patch in pixels.
        max_zoom_out: By how much the image is shrunk at most, at least 1; `--random_scale_max` of the published code.
        flip: Mirrors each patch with probability 0.5.
        epoch_samples: Samples in an epoch, which only the learning rate's schedule knows.
        broken_files: "error" stops at a file that cannot be read; "skip" leaves it out and names it in the log.
        channels_a, channels_b, bits, value_range, direction, seed: As of `UnpairedImages`.

    Raises:
        UserError: A folder is missing or empty, a file is not an image, an image is smaller than a patch, or an argument is
            out of range.

    Source: Park et al., "Contrastive Learning for Unpaired Image-to-Image Translation", ECCV 2020 (SinCUT).
    """

    def __init__(
        self,
        root: Path | str | Mapping[str, Path],
        split: str = "train",
        *,
        crop_size: int = 64,
        max_zoom_out: float = 3.0,
        flip: bool = True,
        channels_a: int = 3,
        channels_b: int = 3,
        bits: int = 8,
        value_range: tuple[float, float] | None = None,
        direction: str = "AtoB",
        epoch_samples: int = 100_000,
        seed: int = 0,
        broken_files: str = "error",
    ) -> None:
        super().__init__(seed)
        least_one = {
            "crop_size": crop_size,
            "max_zoom_out": max_zoom_out,
            "epoch_samples": epoch_samples,
        }
        for name, value in least_one.items():
            if value < 1:
                raise UserError(f"{name}={value} is too small. Use {name} >= 1.")
        expect_one_of("direction", direction, ("AtoB", "BtoA"))
        folders = [split_folder(root, split, domain) for domain in direction.split("to")]
        self._read_from = [
            (folder, channels, bits, value_range)
            for folder, channels in zip(folders, (channels_a, channels_b), strict=True)
        ]
        self._skip = broken_files == "skip"
        self.crop_size, self.max_zoom_out, self.flip = crop_size, max_zoom_out, flip
        self.epoch_samples = epoch_samples
        (self.a, files_a), (self.b, files_b) = (self._images(*how) for how in self._read_from)
        self._files = {"A": files_a, "B": files_b}

    def files(self) -> dict[str, dict[str, int | None]]:
        """The files of "A" and "B" by their names, with their sizes in bytes: see `fastnce.files.changed_files`."""
        return {name: dict(files) for name, files in self._files.items()}

    def output_sizes(self) -> tuple[dict[tuple[int, int], Path], dict[tuple[int, int], Path]]:
        """The size (width, height) of the samples' "A" and "B", each with its folder."""
        size = (self.crop_size, self.crop_size)
        folder_a, folder_b = (how[0] for how in self._read_from)
        return {size: folder_a}, {size: folder_b}

    def describe(self) -> list[str]:
        """A line for each folder: see `describe_folder`."""
        return [
            line
            for folder, *how in self._read_from
            for line in describe_folder(folder, list_images(folder), *how, skip_broken=self._skip)
        ]

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self.epoch_samples

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """{"A": (C, crop_size, crop_size), "B": the same}, float32 in [-1, 1]."""
        return {
            "A": self._patch(self.a, counter_rng(self.seed, A_STREAM, index)),
            "B": self._patch(self.b, counter_rng(self.seed, B_STREAM, index)),
        }

    def _patch(self, images: list[Image.Image | Bands], rng: np.random.Generator) -> torch.Tensor:
        image = images[rng.integers(len(images))]
        shares = rng.uniform(1 / self.max_zoom_out, 1.0, size=2)
        width, height = (
            max(self.crop_size, round(side * share))
            for side, share in zip(image.size, shares, strict=True)
        )
        left = int(rng.integers(width - self.crop_size + 1))
        top = int(rng.integers(height - self.crop_size + 1))
        patch = to_array(shrunk_patch(image, (width, height), (left, top), self.crop_size))
        mirrored = self.flip and rng.random() < 0.5
        return to_tensor(patch[:, ::-1] if mirrored else patch)

    def _images(
        self, folder: Path, *how: object
    ) -> tuple[list[Image.Image | Bands], dict[str, int | None]]:
        """All images of `folder`, decoded once and for all, each checked to be as large as a patch; and the files' sizes in bytes."""
        paths, images = list_images(folder), []
        sizes = dict.fromkeys(path.relative_to(folder).as_posix() for path in paths)
        for path, image in readable(paths, lambda path: read_image(path, *how), skip=self._skip):
            if min(image.size) < self.crop_size:
                raise UserError(
                    f"{path}: {image.width}x{image.height} is smaller than the crop of {self.crop_size}x{self.crop_size}. Use a "
                    f"crop_size of at most {min(image.size)}, or a larger image."
                )
            images.append(image)
            sizes |= named_sizes(folder, [path])
        return images, sizes


def shrunk_patch(
    image: Image.Image | Bands, size: tuple[int, int], corner: tuple[int, int], side: int
) -> Image.Image | Bands:
    """The square at `corner` (left, top) of `image` resized to `size` (bicubic), without resizing the rest of it."""
    scale_x, scale_y = image.width / size[0], image.height / size[1]
    left, top = corner
    box = (left * scale_x, top * scale_y, (left + side) * scale_x, (top + side) * scale_y)
    # The last edge may come out of the image by a rounding error, which Pillow refuses.
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
    return resize(image, side, side, box)
