"""Judging translations: those of a run, of a network in training, or of any program, on any two folders of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastnce.data import list_images, split_folder
from fastnce.data.broken import readable
from fastnce.data.domains import Side, find_pairs, half_of, holds_pairs
from fastnce.data.images import UnfitFile, image_size, load_image, read_image, to_array, to_tensor
from fastnce.demo import Evaluator, evaluate_digits, is_digits_photos
from fastnce.errors import UserError
from fastnce.metrics import Row, evaluate, format_table
from fastnce.metrics.extractors import load_extractor
from fastnce.metrics.image_sets import (
    BEST,
    TRANSLATED,
    WITHOUT_NCE,
    format_pair_table,
    halves_name,
    pair_numbers,
    untranslated_name,
)
from fastnce.metrics.segmentation import (
    LabelKind,
    ScriptedSegmenter,
    evaluate_segmentation,
    format_segmentation_table,
    label_files,
)
from fastnce.metrics.tables import write_result
from fastnce.systems.translating import targets

# For some files, what reads the image of one of them at the size at which they are compared.
Reader = Callable[[Side], Callable[[Path], Tensor]]
# The names of rows, by what `System.evaluate` calls their networks.
ROWS = {"run": TRANSLATED, "best": BEST, "without_nce": WITHOUT_NCE}


@dataclass(frozen=True)
class Segmentation:
    """How the segmentation of translated images is scored, with Cityscapes' classes."""

    segmenter: Path
    """TorchScript file, see `fastnce.metrics.segmentation.ScriptedSegmenter`."""
    labels: Path
    """Folder of label maps, found by the images' names: see `fastnce.metrics.segmentation.label_key`."""
    kind: LabelKind = "train-ids"
    """The content of the label maps."""

    def scores(
        self, folder: Path, device: torch.device, value_range: tuple[float, float] | None = None
    ) -> dict[str, Any]:
        """Of the images in a folder; see `fastnce.metrics.segmentation.evaluate_segmentation`."""
        images = ((path, load_image(path, value_range=value_range)) for path in list_images(folder))
        segmenter = ScriptedSegmenter(self.segmenter, device)
        return evaluate_segmentation(
            images, label_files(self.labels, self.kind), segmenter, self.kind
        )


def load_judge(
    data: Path | Mapping[str, Path],
    extractor: Path | str | None,
    device: torch.device | str = "cpu",
) -> nn.Module | None:
    """The extractor that judges translations after `data`; None for a digits-photos set, which brings its own.

    Raises:
        UserError: the extractor cannot be had, or nothing is there to judge images of this kind.
    """
    if extractor is not None:
        return load_extractor(extractor, device)
    if is_digits_photos(data):
        return None
    raise UserError(
        f"{data}: only sets of `fastnce data digits-photos` bring the network that judges their images. Give --extractor FILE, "
        "a TorchScript module from (N, 3, H, W) uint8 to features, such as the Inception-v3 of 2015-12-05, or --extractor "
        "torch-fidelity, which downloads it."
    )


def judge_folders(
    folders: Mapping[str, Path],
    data: Path | Mapping[str, Path],
    extractor: nn.Module | None,
    *,
    direction: str = "AtoB",
    read: Reader | None = None,
    baselines: bool = True,
    evaluator: Evaluator | None = None,
    paired: bool = False,
    skip: bool = False,
    value_range: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Judges folders of translated test images, beside untranslated images and other real ones, by features of all of them.

    Args:
        folders: by the name of the row. Of a digits-photos set the files have the names of the source's test images.
        data: folder of the data set.
        extractor: see `load_judge`.
        direction: "AtoB": testA was translated, and testB is the reference; or "BtoA".
        read: reads the real images; by default at their own size.
        baselines: judge the untranslated and the other real images too.
        evaluator: of a digits-photos set, if it is loaded already.
        paired: the data are pairs.
        skip: leave out files that cannot be read.
        value_range: the images' numbers that stand for black and white.

    Returns:
        See `fastnce.metrics.evaluate`.
    """
    as_they_are = partial(_as_they_are, value_range=value_range)
    read = read or as_they_are
    if is_digits_photos(data):
        paths = list_images(split_folder(data, "test", direction[0]))
        images = {name: _stacked(folder, paths, value_range) for name, folder in folders.items()}
        return evaluate_digits(
            images[TRANSLATED],
            data,
            best=images.get(BEST),
            without_nce=images.get(WITHOUT_NCE),
            direction=direction,
            extractor=extractor,
            evaluator=evaluator,
            baselines=baselines,
        )
    assert extractor is not None, "load_judge refuses this"

    def images_of(side: Side, read: Reader) -> Iterator[Tensor]:
        count = 0
        for _, image in readable(side.paths, read(side), skip=skip):
            count += 1
            yield image
        if count < 2:
            raise UserError(
                f"{side.folder}: holds one image, and FID needs at least two. Add more, the more the better."
            )

    plain, real = (side(data, "test", direction, which, paired) for which in (0, 1))
    rows: dict[str, Row | str] = {
        name: Row(images_of(Side(folder, list_images(folder)), as_they_are))
        for name, folder in folders.items()
    }
    source, target = direction[0], direction[-1]
    if baselines:
        rows[untranslated_name(source)] = Row(images_of(plain, read))
        try:
            others = side(data, "train", direction, 1, paired)
        except UserError:
            folder = "train" if paired else f"train{target}"
            rows[halves_name(target)] = f"not measured: there is no {folder}"
        else:
            spread = others._replace(paths=_spread(others.paths, len(plain.paths)))
            rows[halves_name(target)] = Row(images_of(spread, read))
    result = evaluate(rows, images_of(real, read), extractor, baseline=untranslated_name(source))
    return {"data": _shown(data), "reference": _name(real)} | result


def judge_pairs(
    folders: Mapping[str, Path],
    data: Path | Mapping[str, Path],
    *,
    direction: str = "AtoB",
    read: Reader | None = None,
    channels: int = 3,
    bits: int = 8,
    baselines: bool = True,
    skip: bool = False,
    value_range: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """L1, PSNR and SSIM of folders of translated test images of a set of pairs, each against its own truth.

    The files have the names of the test images, as `fastnce translate` gives them, with any extension; some may be missing. All are
    read with so many `channels` and `bits`; for the other arguments see `judge_folders`.

    Returns:
        {"reference", "rows": [{"name"} and `fastnce.metrics.image_sets.pair_numbers`, ...]}.
    """
    source, truth = find_pairs(data, "test", direction)
    partners = dict(zip(source.paths, truth.paths, strict=True))
    as_they_are = partial(_as_they_are, channels=channels, bits=bits, value_range=value_range)
    read = read or as_they_are
    read_source, read_truth = read(source), read(truth)

    def row(name: str, files: Mapping[Path, Path], read_one: Callable[[Path], Tensor]) -> dict:
        def pair(path: Path) -> tuple[Tensor, Tensor]:
            image, true = read_one(files[path]), read_truth(partners[path])
            if image.shape != true.shape:
                raise UnfitFile(
                    f"{files[path]}: is {image.shape[2]}x{image.shape[1]}, but what it should be, in {partners[path]}, "
                    f"{true.shape[2]}x{true.shape[1]}. Give them one size."
                )
            return image, true

        there = [path for path in source.paths if files[path].is_file()]
        if not there:
            raise UserError(
                f"{next(iter(files.values())).parent}: holds no translation of {source.paths[0].name} or another test image. "
                "Keep the files' names."
            )
        return {"name": name} | pair_numbers(both for _, both in readable(there, pair, skip=skip))

    rows = []
    for name, folder in folders.items():
        there = {path.with_suffix(""): path for path in list_images(folder)}
        made = {
            path: target if target.is_file() else there.get(target.with_suffix(""), target)
            for path, target in targets(source.paths, source.folder, folder).items()
        }
        rows.append(row(name, made, as_they_are(Side(folder, []))))
    if baselines:
        themselves = {path: path for path in source.paths}
        rows.append(row(untranslated_name(direction[0]), themselves, read_source))
    return {"reference": _name(truth), "rows": rows}


def _as_they_are(
    side: Side,
    channels: int = 3,
    bits: int = 8,
    value_range: tuple[float, float] | None = None,
) -> Callable[[Path], Tensor]:
    def read(path: Path) -> Tensor:
        image = read_image(path, channels, bits, value_range)
        return to_tensor(to_array(half_of(image, side.half)))

    return read


def side(
    data: Path | Mapping[str, Path], split: str, direction: str, which: int, paired: bool
) -> Side:
    """The images of a split that are translated (`which` 0), or those that are like what they should become (1)."""
    if paired:
        return find_pairs(data, split, direction)[which]
    folder = split_folder(data, split, direction.split("to")[which])
    return Side(folder, list_images(folder))


def _name(side: Side) -> str:
    """testB, or the right halves of test."""
    return f"the {side.half} halves of {side.folder.name}" if side.half else side.folder.name


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of the paths, spread evenly over them."""
    if len(paths) <= count:
        return list(paths)
    chosen = torch.linspace(0, len(paths) - 1, count, dtype=torch.float64).long()
    return [paths[i] for i in chosen]


def _stacked(
    folder: Path, sources: Sequence[Path], value_range: tuple[float, float] | None
) -> Tensor:
    """The translations of `sources` in a folder, found by their names without extension, in that order. (N, 3, H, W)"""
    files = {path.stem: path for path in list_images(folder)}
    missing = [path.stem for path in sources if path.stem not in files]
    if missing:
        raise UserError(
            f"{folder}: holds no translation of {missing[0]} and of {len(missing) - 1} more of the {len(sources)} test images. "
            f"Translate all of {sources[0].parent}, and keep the files' names."
        )
    images = []
    size = image_size(sources[0])
    for source in sources:
        image = load_image(files[source.stem], value_range=value_range)
        if image.shape[:0:-1] != size:
            raise UserError(
                f"{files[source.stem]}: is {image.shape[2]}x{image.shape[1]}, but the digits are {size[0]}x{size[1]}. "
                "Translate them at their own size."
            )
        images.append(image)
    return torch.stack(images)


def _shown(data: Path | Mapping[str, Path]) -> str:
    return ", ".join(map(str, data.values())) if isinstance(data, Mapping) else str(data)


def evaluate_images(
    images: Path,
    data: Path | None = None,
    *,
    extractor: Path | None = None,
    segmentation: Segmentation | None = None,
    direction: str = "AtoB",
    out: Path | None = None,
    device: torch.device | str = "cpu",
    broken_files: Literal["error", "skip"] | None = None,
    value_range: tuple[float, float] | None = None,
) -> tuple[dict[str, Any], str]:
    """The evaluation of a folder of translated images, whatever program made them.

    All images are compared at their own size. Writes `metrics.json` and `metrics.md` into `out`, by default the folder of the images.

    Args:
        images: the translations of the test images of `data`.
        data: folder with testA and testB, or with test of pairs side by side; not needed where only segmentations are scored.
        extractor, segmentation, direction, value_range: see `TranslationSystem.evaluate`.
        out: folder of the report.
        device: where the extractor runs.
        broken_files: "skip" leaves out files that cannot be read.

    Raises:
        UserError: folders or images are missing, or nothing to judge these images.
    """
    result: dict[str, Any] = {"images": str(images)}
    tables = []
    if data is not None:
        paired = holds_pairs(data)
        options: dict[str, Any] = {
            "direction": direction,
            "value_range": value_range,
            "skip": broken_files == "skip",
        }
        if extractor or not paired:
            judge = load_judge(data, extractor, device)
            folders = {TRANSLATED: images}
            result |= judge_folders(folders, data, judge, paired=paired, **options)
            tables.append(format_table(result))
        if paired:
            result["pairs"] = judge_pairs({TRANSLATED: images}, data, **options)
            tables.insert(0, format_pair_table(result["pairs"]))
    if segmentation is not None:
        result["segmentation"] = segmentation.scores(images, device, value_range)
        tables.append(format_segmentation_table(result["segmentation"]))
    if not tables:
        raise UserError(
            "images without data have nothing to be compared with. Give --data, or --segmenter and --labels."
        )
    table = "\n".join(tables)
    write_result(result, table, out or images)
    return result, table
