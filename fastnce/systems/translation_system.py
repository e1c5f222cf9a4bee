"""Shared by the systems that translate images, beside their models: data, preview, measurements and evaluation."""

from __future__ import annotations

import copy
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastnce.errors import UserError
from fastnce.systems.patch_contrast import feature_shapes
from fastnce.systems.schedule import LinearDecay
from fastnce.systems.system import Measure, Rows, System, random_images, rng_kept
from fastnce.systems.translation import (
    TranslationConfig,
    UnpairedConfig,
    in_direction,
    input_channels,
)

if TYPE_CHECKING:
    from fastnce.data import AlignedImages, SingleImagePatches, UnpairedImages
    from fastnce.systems.judging import Reading, Segmentation

# Of the numbers of an evaluation, those that are measured during the training.
_MEASURED = ("l1", "psnr", "ssim", "fid", "kid", "precision", "recall", "density", "coverage")
_MEASURED += ("content_accuracy",)

# Networks and training for the 32x32 digits of `fastnce data digits-photos`, for some minutes on a CPU.
DIGITS_PHOTOS: dict[str, object] = {
    "base_channels": 16,
    "num_blocks": 4,
    "disc_channels": 32,
    "disc_layers": 2,
    "disc_norm": "none",
    "disc_antialias": False,
    "init_gain": None,
    "lr": 4e-4,
    "batch_size": 8,
    "ema_decay": 0.995,
    "load_size": 32,
    "crop_size": 32,
    "flip": False,
    "augment_a": "affine",
    "workers": 0,
    "steps": 1000,
    "log_every": 20,
    "sample_every": 200,
    "sample_count": 16,
    "measure_every": 200,
    "checkpoint_every": 200,
}
DIGITS_PATCHES: dict[str, object] = {"nce_layers": (4, 8, 12, 15), "num_patches": 64}


class TranslationSystem(System):
    """A system whose network translates images.

    Its `model_class` is made of the configuration and the (height, width) of the first training image.

    Attributes:
        seeing: the networks that see the images, by their names in errors: the attribute's path.
    """

    seeing: Mapping[str, str] = {"generator": "generator", "discriminator": "discriminator"}
    network_name = "generator"
    best = "fid"
    does = "translate images"
    next_command = "fastnce translate --run {run} --input DIR --out DIR"
    compares_best = True
    reports_cost = True
    judged_by = frozenset({"without_nce", "extractor", "segmentation", "direction", "value_range"})
    in_direction = staticmethod(in_direction)
    output = "translation"
    any_size = True

    def folders_read(self, config: TranslationConfig) -> list[Path]:
        if isinstance(config.folders, dict):
            return list(config.folders.values())
        splits = ("train", "test", "val", "valid")
        return [config.data / (split + domain) for split in splits for domain in ("", "A", "B")]

    def dataset(self, config: TranslationConfig) -> UnpairedImages:
        """The training images of two folders."""
        from fastnce.data import list_images, split_folder

        counts = [len(list_images(split_folder(config.folders, "train", d))) for d in "AB"]
        dataset = _folders(
            config,
            "train",
            load_size=config.load_size,
            flip=config.flip,
            augment_a=config.augment_a,
            jitter_samples=config.epochs * max(counts) if config.decay_epochs else None,
        )
        if config.batch_size > 1:
            dataset.expect_one_size()
        return dataset

    def schedule(self, config: TranslationConfig, epoch_samples: int) -> LinearDecay:
        return LinearDecay.of(
            epochs=config.epochs,
            decay_epochs=config.decay_epochs,
            steps=config.steps,
            samples_per_step=config.samples_per_step,
            epoch_samples=epoch_samples,
        )

    def model(self, config: TranslationConfig, dataset: Any) -> nn.Module:
        _, height, width = dataset[0]["A"].shape
        model = self.model_class(config, (height, width))
        networks = {name: model.get_submodule(path) for name, path in self.seeing.items()}
        expect_sizes_fit(config, dataset, networks, **self.sizes(config, model))
        return model

    def sizes(self, config: UnpairedConfig, model: Any) -> dict[str, str | None]:
        """The further arguments of `expect_sizes_fit`."""
        fixed = config.discriminator == "stylegan2"
        return {"one_size": "discriminator=stylegan2 is made for one size" if fixed else None}

    def preview(self, config: TranslationConfig, dataset: Dataset) -> Callable[[nn.Module], Rows]:
        images = first_test_images(config)

        def rows(generator: nn.Module) -> Rows:
            return {"input": images, "output": translated(generator, images)}

        return rows

    def measure(self, config: TranslationConfig, dataset: Dataset) -> Measure | None:
        """Of the averaged network's translations of the test images. None, and a line that says why, if nothing can judge them."""
        from fastnce.systems import judging

        extractor, by_features = None, not self.paired or config.extractor is not None
        try:
            if by_features:
                extractor = judging.load_judge(config.folders, config.extractor)
            for which in (0, 1):  # whether they are there
                judging.side(config.folders, "test", config.direction, which, self.paired)
        except UserError as error:
            if config.extractor is not None:
                raise
            print(f"Nothing is measured. {error}", file=sys.stderr)
            return None

        def measure(_: nn.Module, network: nn.Module) -> dict[str, float]:
            named = {judging.TRANSLATED: network}
            with self._translations(named, config, config.folders) as folders:
                result, _ = judging.judge(
                    folders,
                    config.folders,
                    self._reading(config),
                    (lambda: extractor) if by_features else None,
                    baselines=False,
                )
            row = result["pairs"]["rows"][0] if self.paired else {}
            if by_features:
                row |= result["rows"][0]
            return {name: row[name] for name in _MEASURED if row.get(name) is not None}

        return measure

    def evaluate(
        self,
        config: TranslationConfig,
        networks: Mapping[str, nn.Module],
        data: Path | Mapping[str, Path],
        device: torch.device,
        *,
        extractor: Path | None = None,
        segmentation: Segmentation | None = None,
        direction: str | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> tuple[dict[str, Any], str]:
        """FID, KID, precision, recall and more of the translations of the test images, beside their baselines.

        Of a digits-photos set also content accuracy. Of pairs L1, PSNR and SSIM of each translation against its own truth,
        and the others only with an extractor.

        Args:
            extractor: what gives the features; by default that of the run, or a digits-photos set's own network.
            segmentation: also score the segmentation of the translations; then there need not be an extractor.
            direction: "AtoB" or "BtoA", for systems of both directions; by default that of the training.
            value_range: the images' numbers that stand for black and white; by default as in the training.
        """
        from fastnce.systems import judging

        if value_range is not None:
            config = replace(config, value_range=value_range)
        rows = {judging.ROWS[name]: network for name, network in networks.items()}
        extractor = extractor or config.extractor
        by_features = extractor or judging.is_digits_photos(data)
        any_features = by_features or (segmentation is None and not self.paired)
        result: dict[str, Any] = {}
        with self._translations(rows, config, data, direction) as folders:
            if segmentation is not None:
                run = folders[judging.TRANSLATED]
                result["segmentation"] = segmentation.scores(run, device, config.value_range)
            judged, tables = judging.judge(
                folders,
                data,
                self._reading(config, direction),
                partial(judging.load_judge, data, extractor, device) if any_features else None,
            )
        result |= judged
        if segmentation is not None:
            tables.append(judging.format_segmentation_table(result["segmentation"]))
        if self.paired and not by_features:
            tables.append("FID and its kin: not measured without --extractor FILE.\n")
        return result, "\n".join(tables)

    def translate_folder(
        self, network: nn.Module, config: TranslationConfig, input: Path, out: Path, **how: Any
    ) -> int:
        from fastnce.systems.translating import translate_folder

        how = self.known_options(translate_folder, how)
        return translate_folder(network, config, input, out, paired=self.paired, **how)

    def graph_inputs(
        self, network: nn.Module, config: TranslationConfig, channels: int, count: int
    ) -> dict[str, Tensor]:
        multiple = getattr(network, "size_multiple", 4)
        least = -(-32 // multiple)
        sides = multiple * (least + count - 2), multiple * (least + 1)
        return {"image": random_images(count, channels, *sides)}

    def _reading(self, config: TranslationConfig, direction: str | None = None) -> Reading:
        """As the training reads its images, and scaled as they are, without the crop: as those to translate are."""
        from fastnce.systems.judging import Reading
        from fastnce.systems.translating import image_scaling

        return Reading(
            direction=direction or config.direction,
            paired=self.paired,
            channels=config.out_channels,
            bits=config.bits,
            skip=config.broken_files == "skip",
            value_range=config.value_range,
            scaling=lambda side: image_scaling(config, side.paths, part=side.half),
        )

    @contextmanager
    def _translations(
        self,
        networks: Mapping[str, nn.Module],
        config: TranslationConfig,
        data: Path | Mapping[str, Path],
        direction: str | None = None,
    ) -> Iterator[dict[str, Path]]:
        """Folders by name, removed afterwards, of a set's test images as `fastnce translate` translates them.

        Files, because several measurements read each of them and a test set may be larger than the memory.
        """
        from fastnce.systems.judging import side
        from fastnce.systems.translating import translate_folder

        source = side(data, "test", direction or config.direction, 0, self.paired)
        part = source.half or "whole"
        with tempfile.TemporaryDirectory() as parent:
            folders = {name: Path(parent, str(number)) for number, name in enumerate(networks)}
            for name, network in networks.items():
                was_training = network.training
                translate_folder(
                    network.eval(),
                    config,
                    source.folder,
                    folders[name],
                    paired=self.paired,
                    direction=direction,
                    part=part,
                )
                network.train(was_training)
            yield folders


def first_test_images(config: TranslationConfig, domain: str = "A") -> list[Tensor]:
    """The first test images of "A" or "B"; of the training images where there is no test folder."""
    from fastnce.data import split_folder

    split = "test"
    try:
        for folder in "AB":
            split_folder(config.folders, split, folder)
    except UserError:
        split = "train"
    dataset = _folders(config, split, load_size=config.crop_size, flip=False, serial=True)
    return [dataset[i][domain] for i in range(min(config.sample_count, len(dataset)))]


def _folders(config: TranslationConfig, split: str, **options: object) -> UnpairedImages:
    from fastnce.data import UnpairedImages

    return UnpairedImages(config.folders, split, **(reading_options(config) | options))


def reading_options(config: TranslationConfig) -> dict[str, object]:
    """How a dataset of A and B reads its images, as far as training and test images agree."""
    return {
        "crop_size": config.crop_size,
        "preprocess": config.preprocess,
        "channels_a": config.in_channels,
        "channels_b": config.out_channels,
        "direction": config.direction,
        "serial": config.serial,
        "seed": config.seed,
        "bits": config.bits,
        "value_range": config.value_range,
        "broken_files": config.broken_files,
        "cache_bytes": int(config.cache_gb * 2**30),
    }


def expect_sizes_fit(
    config: TranslationConfig,
    dataset: UnpairedImages | AlignedImages | SingleImagePatches,
    networks: Mapping[str, nn.Module],
    *,
    one_size: str | None = None,
    compared: str | None = "",
) -> None:
    """Checks the sizes of all training images before the first step, without computing anything.

    Args:
        networks: by their names those that see the images.
        one_size: why all images of A and B must have one size; None: they need not.
        compared: "A" or "AB": of whose maps `num_patches` patches are compared.
    """
    a, b = dataset.output_sizes()
    found = b | a
    if one_size is not None and len(found) > 1:
        (first, one), (second, other) = list(found.items())[:2]
        raise UserError(
            f"{other}: gives {second[0]}x{second[1]}, but {one} {first[0]}x{first[1]}, and {one_size}. Use "
            'preprocess="resize_and_crop", or another that makes them one size. fastcut, cyclegan and dclgan take several.'
        )
    patches = {size: path for name in compared for size, path in {"A": a, "B": b}[name].items()}
    if patches:
        width, height = min(patches, key=math.prod)
        try:
            feature_shapes(config, (height, width))
        except UserError as error:
            raise UserError(
                f"{patches[width, height]}: gives {width}x{height}, and {error}"
            ) from error
    with rng_kept():
        shapes = {name: copy.deepcopy(network).to("meta") for name, network in networks.items()}
        # What is too small is so by a side or by its number of pixels.
        for width, height in {min(found, key=min), min(found, key=math.prod)}:
            for name, network in shapes.items():
                if _takes(network, config.batch_size, height, width):
                    continue
                sides = range(4, 516, 4)
                fitting = (s for s in sides if _takes(network, config.batch_size, s, s))
                least = next((f", which needs {side}x{side} or more" for side in fitting), "")
                raise UserError(
                    f"{found[width, height]}: gives {width}x{height}, too small for the {name}{least}. Use a larger crop_size or load_size, larger images, or a "
                    f"smaller {name}."
                )


def _takes(network: nn.Module, count: int, height: int, width: int) -> bool:
    """Whether a network can be trained on so many images of a size."""
    try:
        network(torch.empty(count, input_channels(network), height, width, device="meta"))
    except (RuntimeError, ValueError):  # such as a padding that is wider than the map
        return False
    return True


@torch.inference_mode()
def translated(generator: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
    """The translations of images (C, H, W), on the CPU. A line on standard error says if they have collapsed."""
    device = next(generator.parameters()).device
    # One at a time: without a crop they may differ in size.
    outputs = [generator(image[None].to(device))[0].float().cpu() for image in images]
    reason = collapse(images, outputs)
    if reason is not None:
        print(f"The translations have collapsed: {reason}.", file=sys.stderr)
    return outputs


# The least that translations should have of their inputs' variety, from image to image, and of their contrast, in each image.
_LEAST_VARIETY, _LEAST_CONTRAST = 0.02, 1e-4


def collapse(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str | None:
    """How a generator has collapsed, in words; None if it has not, or that cannot be told from one image or from equal ones.

    Variety is the share of the variance from image to image in that of all pixels, of the images as 16x16 squares of grey.
    Contrast is the variance of the pixels of an image.
    """
    variety_in, contrast_in = _variety_and_contrast(inputs)
    variety_out, contrast_out = _variety_and_contrast(outputs)
    if contrast_out < _LEAST_CONTRAST * contrast_in:
        return "each of them is nearly one colour"
    if variety_out < _LEAST_VARIETY * variety_in:
        share = 100 * variety_out / variety_in
        return f"those of different images are nearly the same, with {share:.1f} % of the variety of their inputs"
    return None


def _variety_and_contrast(images: Sequence[Tensor]) -> tuple[float, float]:
    grey = [image.double().mean(0, keepdim=True) for image in images]
    squares = torch.stack([F.adaptive_avg_pool2d(image, 16) for image in grey])  # (N, 1, 16, 16)
    between = squares.var(0, correction=0).mean()
    total = squares.var(correction=0).clamp_min(1e-12)
    contrast = torch.stack([image.double().var((1, 2), correction=0).mean() for image in images])
    return float(between / total), float(contrast.mean())
