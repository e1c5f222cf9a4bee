"""Judging translations: those of a run, of a network in training, or of any program, on any two folders of images."""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastnce.data import Preprocess, list_images, split_folder
from fastnce.data.broken import readable
from fastnce.data.domains import Side, find_pairs, half_of, holds_pairs
from fastnce.data.images import (
    UnfitFile,
    image_size,
    load_image,
    read_image,
    to_array,
    to_tensor,
    to_uint8,
)
from fastnce.demo import evaluate_digits, is_digits_photos
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
from fastnce.metrics.prediction import PREDICTED, Pair, evaluate_prediction
from fastnce.metrics.segmentation import (
    CLASSES,
    LabelKind,
    ScriptedSegmenter,
    evaluate_segmentation,
    format_segmentation_table,
    label_files,
    train_ids,
)
from fastnce.metrics.tables import write_result
from fastnce.systems.translating import targets

# The names of rows, by what `System.evaluate` calls their networks.
ROWS = {"run": TRANSLATED, "best": BEST, "without_nce": WITHOUT_NCE}
PREDICTIONS = {"run": PREDICTED, "best": f"{PREDICTED}, best checkpoint"}

# Networks that the built-in sets of label maps bring with them.
JUDGE, SEGMENTER = "judge.pt", "segmenter.pt"

Item = TypeVar("Item")


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
    """The extractor that judges translations after `data`; None for a digits-photos set, which brings its own."""
    if extractor is not None:
        return load_extractor(extractor, device)
    if is_digits_photos(data):
        return None
    raise UserError(
        f"{data}: only sets of `fastnce data digits-photos` bring the network that judges their images. Give --extractor FILE, "
        "a TorchScript module from (N, 3, H, W) uint8 to features, such as the Inception-v3 of 2015-12-05, or --extractor "
        "torch-fidelity, which downloads it."
    )


@dataclass(frozen=True)
class Reading:
    """How the images of a test set, and their translations, are found and read."""

    direction: str = "AtoB"
    """"AtoB": testA was translated, and testB is the reference; or "BtoA"."""
    paired: bool = False
    """The data are pairs."""
    channels: int = 3
    """Of the images of pairs."""
    bits: int = 8
    """Of a channel of the images of pairs."""
    skip: bool = False
    """Leave out files that cannot be read."""
    value_range: tuple[float, float] | None = None
    """The images' numbers that stand for black and white."""
    scaling: Callable[[Side], Preprocess] | None = None
    """How some real images are scaled; None: they are read at their own size."""

    def reader(
        self, side: Side, *, scaled: bool = True, channels: int = 3, bits: int = 8
    ) -> Callable[[Path], Tensor]:
        """The function that reads the image of one of the files, (C, H, W) in [-1, 1]."""
        scale = self.scaling(side) if scaled and self.scaling else None

        def read(path: Path) -> Tensor:
            image = half_of(read_image(path, channels, bits, self.value_range), side.half)
            return to_tensor(scale.prepare(image) if scale else to_array(image))

        return read


def judge(
    folders: Mapping[str, Path],
    data: Path | Mapping[str, Path],
    how: Reading,
    extractor: Callable[[], nn.Module | None] | None,
    *,
    baselines: bool = True,
) -> tuple[dict[str, Any], list[str]]:
    """Judges folders of translated test images: of pairs against their truth, and by features where there is an extractor.

    Args:
        folders: by the name of the row. The files have the names of the source's test images.
        extractor: gives what `load_judge` does; None: no judgement by features.
        baselines: judge the untranslated and the other real images too.

    Returns:
        The result of `fastnce.metrics.evaluate`, of pairs also "pairs", see `judge_pairs`; and its tables.
    """
    result: dict[str, Any] = {}
    tables = []
    if extractor is not None:
        result |= judge_by_features(folders, data, how, extractor(), baselines)
        tables.append(format_table(result))
    if how.paired:
        result["pairs"] = judge_pairs(folders, data, how, baselines)
        tables.insert(0, format_pair_table(result["pairs"]))
    return result, tables


def judge_by_features(
    folders: Mapping[str, Path],
    data: Path | Mapping[str, Path],
    how: Reading,
    extractor: nn.Module | None,
    baselines: bool,
) -> dict[str, Any]:
    """See `judge`: distances of the translations' features from those of the reference's."""
    if is_digits_photos(data):
        paths = list_images(split_folder(data, "test", how.direction[0]))
        images = {n: _stacked(folder, paths, how.value_range) for n, folder in folders.items()}
        return evaluate_digits(
            images[TRANSLATED],
            data,
            best=images.get(BEST),
            without_nce=images.get(WITHOUT_NCE),
            direction=how.direction,
            extractor=extractor,
            baselines=baselines,
        )
    assert extractor is not None, "load_judge refuses this"

    def images_of(side: Side, scaled: bool = True) -> Iterator[Tensor]:
        count = 0
        for _, image in readable(side.paths, how.reader(side, scaled=scaled), skip=how.skip):
            count += 1
            yield image
        if count < 2:
            raise UserError(
                f"{side.folder}: holds one image, and FID needs at least two. Add more, the more the better."
            )

    plain, real = (side(data, "test", how.direction, which, how.paired) for which in (0, 1))
    rows: dict[str, Row | str] = {
        name: Row(images_of(Side(folder, list_images(folder)), scaled=False))
        for name, folder in folders.items()
    }
    source, target = how.direction[0], how.direction[-1]
    if baselines:
        rows[untranslated_name(source)] = Row(images_of(plain))
        try:
            others = side(data, "train", how.direction, 1, how.paired)
        except UserError:
            folder = "train" if how.paired else f"train{target}"
            rows[halves_name(target)] = f"not measured: there is no {folder}"
        else:
            spread = others._replace(paths=_spread(others.paths, len(plain.paths)))
            rows[halves_name(target)] = Row(images_of(spread))
    result = evaluate(rows, images_of(real), extractor, baseline=untranslated_name(source))
    return {"data": _shown(data), "reference": _name(real)} | result


def judge_pairs(
    folders: Mapping[str, Path], data: Path | Mapping[str, Path], how: Reading, baselines: bool
) -> dict[str, Any]:
    """L1, PSNR and SSIM of folders of translated test images of a set of pairs, each against its own truth.

    The files have the names of the test images, as `fastnce translate` gives them, with any extension; some may be missing. The
    result is {"reference", "rows": [{"name"} and `fastnce.metrics.image_sets.pair_numbers`, ...]}.
    """
    source, truth = find_pairs(data, "test", how.direction)
    partners = dict(zip(source.paths, truth.paths, strict=True))
    form = {"channels": how.channels, "bits": how.bits}
    read_truth = how.reader(truth, **form)

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
        pairs = readable(there, pair, skip=how.skip)
        return {"name": name} | pair_numbers(both for _, both in pairs)

    rows = []
    for name, folder in folders.items():
        there = {path.with_suffix(""): path for path in list_images(folder)}
        made = {
            path: target if target.is_file() else there.get(target.with_suffix(""), target)
            for path, target in targets(source.paths, source.folder, folder).items()
        }
        rows.append(row(name, made, how.reader(Side(folder, []), scaled=False, **form)))
    if baselines:
        themselves = {path: path for path in source.paths}
        rows.append(
            row(untranslated_name(how.direction[0]), themselves, how.reader(source, **form))
        )
    return {"reference": _name(truth), "rows": rows}


def judge_predictions(
    predicted: Mapping[str, Iterable[tuple[Tensor, Mapping[str, Tensor]]]],
    others: Sequence[Mapping[str, Tensor]],
    data: Path | Mapping[str, Path],
    *,
    count: int,
    cityscapes: bool = False,
    critic: Path | None = None,
    extractor: Path | str | None = None,
    segmenter: Path | None = None,
    device: torch.device | str = "cpu",
    baselines: bool = True,
) -> tuple[dict[str, Any], str]:
    """Judges images predicted from label maps, beside the real ones: see `fastnce.metrics.prediction.evaluate_prediction`.

    Args:
        predicted: by what `System.evaluate` calls their networks, images (3, H, W) in [-1, 1], each with its sample of
            `fastnce.data.label_maps.LabelMaps`.
        others: samples with other real images, of which `count` are taken.
        data: if it holds them, the extractor is its judge.pt and the segmenter its segmenter.pt where no other is given.
        cityscapes: the labels are Cityscapes' ids, and the segmenter's classes its 19 train ids; else they are the labels.
        critic: file of the network that the training compared features of, which is refused as an extractor.
        baselines: judge the real images too.

    Raises:
        UserError: a network that cannot be had, or the critic as the extractor.
    """
    extractor = extractor or _beside(data, JUDGE)
    segmenter = segmenter or _beside(data, SEGMENTER)
    if critic and extractor and Path(extractor).is_file() and filecmp.cmp(critic, extractor, False):
        raise UserError(
            f"extractor={extractor} is the critic that the run was trained with, which no longer tells good images from bad ones. "
            "Give another network, or leave it out: the sliced Wasserstein distance needs none."
        )
    classes = len(CLASSES) if cityscapes else None

    def pairs(made: Iterable[tuple[Tensor, Mapping[str, Tensor]]]) -> Iterator[Pair]:
        for image, sample in made:
            label = train_ids(sample["label"]) if cityscapes else sample["label"]
            yield to_uint8(image), to_uint8(sample["B"]), label

    return evaluate_prediction(
        {PREDICTIONS[name]: pairs(made) for name, made in predicted.items()},
        others=(to_uint8(others[i]["B"]) for i in _spread(range(len(others)), count)),
        extractor=None if extractor is None else load_extractor(extractor, device),
        segmenter=None if segmenter is None else ScriptedSegmenter(segmenter, device, classes),
        baselines=baselines,
    )


def _beside(data: Path | Mapping[str, Path], name: str) -> Path | None:
    """A network that the data bring with them."""
    path = None if isinstance(data, Mapping) else Path(data, name)
    return path if path and path.is_file() else None


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


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, spread evenly over them."""
    if len(items) <= count:
        return list(items)
    chosen = torch.linspace(0, len(items) - 1, count, dtype=torch.float64).long()
    return [items[i] for i in chosen]


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

    `images` are the translations of the test images of `data`, which need not be given where only segmentations are scored. All
    images are compared at their own size. Writes `metrics.json` and `metrics.md` into `out`, by default the folder of the images.
    For the other arguments see `TranslationSystem.evaluate`.
    """
    result: dict[str, Any] = {"images": str(images)}
    tables: list[str] = []
    if data is not None:
        paired, skip = holds_pairs(data), broken_files == "skip"
        how = Reading(direction, paired, skip=skip, value_range=value_range)
        judged, tables = judge(
            {TRANSLATED: images},
            data,
            how,
            partial(load_judge, data, extractor, device) if extractor or not paired else None,
        )
        result |= judged
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
