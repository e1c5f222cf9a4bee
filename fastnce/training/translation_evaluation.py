"""Judging translations: those of a run, of a network in training, or of any program, on any two folders of images."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnce.data import list_images, split_folder
from fastnce.data.broken import readable
from fastnce.data.folders import image_size, load_image, read_image, to_tensor
from fastnce.errors import UserError
from fastnce.metrics import Evaluator, Row, evaluate, evaluate_digits, is_digits_photos
from fastnce.metrics.extractors import load_extractor
from fastnce.metrics.translation import (
    BEST,
    TRANSLATED,
    WITHOUT_NCE,
    halves_name,
    untranslated_name,
)
from fastnce.training.config import UnpairedTrainConfig
from fastnce.training.system import Measure

# Reads the images of files at the size at which they are compared.
Read = Callable[[Sequence[Path]], Iterator[Tensor]]

# Of the numbers of an evaluation, those that are measured during the training.
_MEASURED = ("fid", "kid", "precision", "recall", "density", "coverage", "content_accuracy")


def load_judge(
    data: Path, extractor: Path | str | None, device: torch.device | str = "cpu"
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
    data: Path,
    extractor: nn.Module | None,
    *,
    direction: str = "AtoB",
    read: Read | None = None,
    baselines: bool = True,
    evaluator: Evaluator | None = None,
) -> dict[str, Any]:
    """Judges folders of translated test images, beside untranslated images and other real ones.

    Args:
        folders: By the name of the row. Of a digits-photos set the files have the names of the source's test images, with any
            extension; of other sets the names do not matter.
        data: Folder of the data set.
        extractor: See `load_judge`.
        direction: "AtoB": testA was translated, and testB is the reference; or "BtoA".
        read: Reads the real images; by default at their own size.
        baselines: Judge the untranslated and the other real images too.
        evaluator: Of a digits-photos set, if it is loaded already.

    Returns:
        See `fastnce.metrics.evaluate`.

    Raises:
        UserError: folders or images are missing.
    """
    read = read or _as_they_are
    source, target = direction[0], direction[-1]
    if is_digits_photos(data):
        paths = list_images(split_folder(data, "test", source))
        images = {name: _stacked(folder, paths) for name, folder in folders.items()}
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
    plain, real = (_test_images(data, domain) for domain in (source, target))
    rows: dict[str, Row | str] = {}
    for name, folder in folders.items():
        paths = list_images(folder)
        _expect_two(folder, paths)
        rows[name] = Row(_as_they_are(paths))
    if baselines:
        rows[untranslated_name(source)] = Row(read(plain))
        try:
            others = list_images(split_folder(data, "train", target))
        except UserError:
            rows[halves_name(target)] = f"not measured: there is no train{target}"
        else:
            rows[halves_name(target)] = Row(read(_spread(others, len(plain))))
    result = evaluate(rows, read(real), extractor, baseline=untranslated_name(source))
    return {"data": str(data), "reference": f"test{target}"} | result


def translation_measure(config: UnpairedTrainConfig, _: object) -> Measure | None:
    """What `measure_every` measures: the averaged network's translations of the test images.

    None, and a line that says why, if nothing is there to judge them.

    Raises:
        UserError: the extractor or the test images cannot be had.
    """
    try:
        extractor = load_judge(config.data, config.extractor)
    except UserError as error:
        if config.extractor is not None:
            raise
        print(f"Nothing is measured. {error}", file=sys.stderr)
        return None

    def measure(_: nn.Module, network: nn.Module) -> dict[str, float]:
        with translations({TRANSLATED: network}, config, config.data) as folders:
            row = judge_folders(
                folders,
                config.data,
                extractor,
                direction=config.direction,
                read=scaled_reader(config),
                baselines=False,
            )["rows"][0]
        return {name: row[name] for name in _MEASURED if row[name] is not None}

    return measure


@contextmanager
def translations(
    networks: Mapping[str, nn.Module],
    config: UnpairedTrainConfig,
    data: Path,
    direction: str | None = None,
) -> Iterator[dict[str, Path]]:
    """Folders, which are removed afterwards, of a set's test images as `fastnce translate` translates them.

    Args:
        networks: by name.
        config: of their run; says how images are scaled.
        data: folder of the data set.
        direction: "AtoB" or "BtoA", for networks of both directions; by default that of the run.

    Yields:
        the folders by name.
    """
    # Here, because `translate` knows all systems, and they know what measures them.
    from fastnce.training.translate_files import translate_folder

    source = split_folder(data, "test", (direction or config.direction)[0])
    with tempfile.TemporaryDirectory() as parent:
        folders = {name: Path(parent, str(number)) for number, name in enumerate(networks)}
        for name, network in networks.items():
            was_training = network.training
            translate_folder(network.eval(), config, source, folders[name], direction=direction)
            network.train(was_training)
        yield folders


def scaled_reader(config: UnpairedTrainConfig) -> Read:
    """Reads images scaled as in the training, without its crop: as those to translate are. What is skipped in the training is
    skipped here."""
    from fastnce.training.translate_files import image_scaling

    def read(paths: Sequence[Path]) -> Iterator[Tensor]:
        scale = image_scaling(config, paths)

        def one(path: Path) -> Tensor:
            return to_tensor(scale.prepare(read_image(path, 3)))

        return (image for _, image in readable(paths, one, skip=config.broken_files == "skip"))

    return read


def _as_they_are(paths: Sequence[Path]) -> Iterator[Tensor]:
    return (load_image(path) for path in paths)


def _test_images(data: Path, domain: str) -> list[Path]:
    folder = split_folder(data, "test", domain)
    paths = list_images(folder)
    _expect_two(folder, paths)
    return paths


def _expect_two(folder: Path, paths: Sequence[Path]) -> None:
    if len(paths) < 2:
        raise UserError(
            f"{folder}: holds one image, and FID needs at least two. Add more, the more the better."
        )


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of the paths, spread evenly over them."""
    if len(paths) <= count:
        return list(paths)
    chosen = torch.linspace(0, len(paths) - 1, count, dtype=torch.float64).long()
    return [paths[i] for i in chosen]


def _stacked(folder: Path, sources: Sequence[Path]) -> Tensor:
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
        image = load_image(files[source.stem])
        if image.shape[:0:-1] != size:
            raise UserError(
                f"{files[source.stem]}: is {image.shape[2]}x{image.shape[1]}, but the digits are {size[0]}x{size[1]}. "
                "Translate them at their own size."
            )
        images.append(image)
    return torch.stack(images)
