"""What `fastnce evaluate` measures of a run, by the run's system."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from fastnce.data import list_images
from fastnce.data.aligned import holds_pairs
from fastnce.data.images import load_image
from fastnce.data.labelled import has_split
from fastnce.demo import is_digits_photos
from fastnce.errors import UserError
from fastnce.metrics import evaluate_generation, format_generation_table, format_table
from fastnce.metrics.image_sets import BEST, TRANSLATED, WITHOUT_NCE
from fastnce.metrics.pairs import format_pair_table
from fastnce.metrics.probes import (
    RANDOM_ENCODER,
    RAW_PIXELS,
    TRAINED_ENCODER,
    evaluate_encoders,
    format_encoder_table,
)
from fastnce.metrics.segmentation import (
    LabelKind,
    ScriptedSegmenter,
    evaluate_segmentation,
    format_segmentation_table,
    label_files,
)
from fastnce.metrics.tables import write_result
from fastnce.training.config import (
    ContraGANTrainConfig,
    Pix2PixTrainConfig,
    RepresentationTrainConfig,
    TrainConfig,
    UnpairedTrainConfig,
)
from fastnce.training.cost import cost_lines, read_cost
from fastnce.training.generation import judge_of, labelled_images, reference_and_training, sampler
from fastnce.training.representation import images_of, random_encoder
from fastnce.training.runtime import resolve_device
from fastnce.training.systems import SYSTEMS
from fastnce.training.translate import load_config, load_generator
from fastnce.training.translation_evaluation import (
    judge_folders,
    judge_pairs,
    load_judge,
    pair_options,
    scaled_reader,
    translations,
)


class Report(NamedTuple):
    """Where an evaluation is written: `FOLDER/STEM.json` and `.md`."""

    folder: Path
    stem: str = "metrics"

    @classmethod
    def of(cls, run: Path, data: Path | None, out: Path | None) -> Report:
        """In `out`, else in the run's folder; there under the data's name, if these are not the run's own.

        Raises:
            UserError: a file takes the run's place, and there is no `out`.
        """
        if out is not None:
            return cls(out)
        if Path(run).is_file():
            raise UserError(f"run={run} is a file, and the report needs a folder. Give --out DIR.")
        config = load_config(run)
        own = config.data is None or data is None or data.resolve() == config.data.resolve()
        return cls(run) if own else cls(run, f"metrics-{data.resolve().name}")


@dataclass(frozen=True)
class Segmentation:
    """How the segmentation of translated images is scored, with Cityscapes' classes."""

    segmenter: Path
    """TorchScript file, see `fastnce.metrics.segmentation.ScriptedSegmenter`."""
    labels: Path
    """Folder of label maps, found by the images' names: see `fastnce.metrics.segmentation.label_key`."""
    kind: LabelKind = "train-ids"
    """What the label maps hold."""

    def scores(
        self, folder: Path, device: torch.device, value_range: tuple[float, float] | None = None
    ) -> dict[str, Any]:
        """Of the images in a folder; see `fastnce.metrics.segmentation.evaluate_segmentation`."""
        images = ((path, load_image(path, value_range=value_range)) for path in list_images(folder))
        segmenter = ScriptedSegmenter(self.segmenter, device)
        return evaluate_segmentation(
            images, label_files(self.labels, self.kind), segmenter, self.kind
        )


def evaluate_translation(
    run: Path,
    data: Path | Mapping[str, Path],
    *,
    without_nce: Path | None = None,
    extractor: Path | None = None,
    segmentation: Segmentation | None = None,
    direction: str | None = None,
    checkpoint: str = "last",
    weights: Literal["ema", "raw"] = "ema",
    device: str = "auto",
    broken_files: Literal["error", "skip"] | None = None,
    value_range: tuple[float, float] | None = None,
    report: Report | None = None,
) -> tuple[dict[str, Any], str]:
    """FID, KID, precision, recall and more of a run's translations of the test images, beside their baselines.

    Of a digits-photos set also content accuracy. Of pix2pix's pairs L1, PSNR and SSIM of each translation against its own truth,
    and the others only with an extractor. If the run has a best checkpoint, it is judged beside the last one. Writes
    `metrics.json` and `metrics.md` into the run's folder.

    Args:
        run: folder of the run.
        data: folder of the data, or the folders by the names testA, testB and trainB.
        without_nce: folder of the same training without the contrastive loss.
        extractor: what gives the features: see `fastnce.metrics.extractors.load_extractor`; by default that of the run, or a
            digits-photos set's own network.
        segmentation: also score the segmentation of the translations; then there need not be an extractor.
        direction: "AtoB" or "BtoA", for systems of both directions; by default that of the training.
        checkpoint: "last", "best", or a file.
        weights: the running average, or the weights themselves.
        device: where to translate.
        broken_files: "skip" leaves out files that cannot be read and names them in the log, "error" stops at the first one; by
            default as in the training.
        value_range: the images' numbers that stand for black and white; by default as in the training.
        report: where it is written instead.

    Returns:
        The result, see `fastnce.metrics.evaluate`, and its table.

    Raises:
        UserError: no such run, checkpoint or data, or nothing to judge these images.
    """
    target = resolve_device(device)

    def network(folder: Path, which: str) -> nn.Module:
        return load_generator(folder, which=weights, checkpoint=which, device=target)[0]

    config = _with_broken_files(load_config(run), broken_files)
    assert isinstance(config, UnpairedTrainConfig)
    if value_range is not None:
        config = replace(config, value_range=value_range)
    paired = isinstance(config, Pix2PixTrainConfig)
    networks = {TRANSLATED: network(run, checkpoint)}
    if checkpoint == "last" and Path(run, "checkpoints", "best.pt").is_file():
        networks[BEST] = network(run, "best")
    if without_nce is not None:
        networks[WITHOUT_NCE] = network(without_nce, checkpoint)
    result: dict[str, Any] = {"run": {"checkpoint": checkpoint} | read_cost(run)}
    tables = []
    with translations(networks, config, data, direction) as folders:
        if segmentation is not None:
            result["segmentation"] = segmentation.scores(
                folders[TRANSLATED], target, config.value_range
            )
            tables.append(format_segmentation_table(result["segmentation"]))
        by_features = extractor or config.extractor or is_digits_photos(data)
        if by_features or (segmentation is None and not paired):
            judge = load_judge(data, extractor or config.extractor, target)
            result |= judge_folders(
                folders,
                data,
                judge,
                direction=direction or config.direction,
                read=scaled_reader(config),
                paired=paired,
                skip=config.broken_files == "skip",
                value_range=config.value_range,
            )
            tables.insert(0, format_table(result))
        if paired:
            result["pairs"] = judge_pairs(folders, data, **pair_options(config))
            tables.insert(0, format_pair_table(result["pairs"]))
            if not by_features:
                tables.append("FID and its kin: not measured without --extractor FILE.\n")
    table = "\n".join([*tables, *cost_lines(result["run"])])
    write_result(result, table, *(report or Report(run)))
    return result, table


def evaluate_images(
    images: Path,
    data: Path | None = None,
    *,
    extractor: Path | None = None,
    segmentation: Segmentation | None = None,
    direction: str = "AtoB",
    out: Path | None = None,
    device: str = "auto",
    broken_files: Literal["error", "skip"] | None = None,
    value_range: tuple[float, float] | None = None,
) -> tuple[dict[str, Any], str]:
    """The same of a folder of translated images, whatever program made them.

    All images are compared at their own size, whatever resizing there is the extractor does. Writes `metrics.json` and
    `metrics.md` into `out`, by default the folder of the images.

    Args:
        images: the translations of the test images of `data`.
        data: folder with testA and testB, or with test of pairs side by side; may be left out if there are only segmentations to
            score.
        extractor: see `evaluate_translation`.
        segmentation: see `evaluate_translation`.
        direction: "AtoB": the images are translations of testA; or "BtoA".
        out: folder of the report.
        device: where the extractor runs.
        broken_files: "skip" leaves out files that cannot be read.
        value_range: the images' numbers that stand for black and white, where they are not of 8 bits or use all of 16.

    Raises:
        UserError: folders or images are missing, or nothing to judge these images.
    """
    target = resolve_device(device)
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
            judge = load_judge(data, extractor, target)
            folders = {TRANSLATED: images}
            result |= judge_folders(folders, data, judge, paired=paired, **options)
            tables.append(format_table(result))
        if paired:
            result["pairs"] = judge_pairs({TRANSLATED: images}, data, **options)
            tables.insert(0, format_pair_table(result["pairs"]))
    if segmentation is not None:
        result["segmentation"] = segmentation.scores(images, target, value_range)
        tables.append(format_segmentation_table(result["segmentation"]))
    if not tables:
        raise UserError(
            "images without data have nothing to be compared with. Give --data, or --segmenter and --labels."
        )
    table = "\n".join(tables)
    write_result(result, table, out or images)
    return result, table


def evaluate_conditional_generation(
    run: Path,
    data: Path | None = None,
    *,
    extractor: Path | None = None,
    checkpoint: str = "last",
    weights: Literal["ema", "raw"] = "ema",
    device: str = "auto",
    seed: int = 0,
    broken_files: Literal["error", "skip"] | None = None,
    report: Report | None = None,
) -> tuple[dict[str, Any], str]:
    """FID, intra-class FID, precision, recall and more of a run of ContraGAN, against the test images.

    Beside the samples stand training images (the best to hope for) and samples of the generator before its training. Writes
    `metrics.json` and `metrics.md` into the run's folder.

    Args:
        run: folder of the run.
        data: folder of the data; by default that of the run.
        extractor: TorchScript file of a feature extractor; by default that of the run, or a digits set's own classifier.
        checkpoint: "last", "best", or a file.
        weights: the running average, or the weights themselves.
        device: where to generate.
        seed: of the noise.
        broken_files: "skip" leaves out files that cannot be read; by default as in the training.

    Returns:
        The result, see `fastnce.metrics.evaluate_generation`, and its table.

    Raises:
        UserError: no such run, checkpoint or data, or no extractor for this data.
    """
    target = resolve_device(device)
    generator, config = load_generator(run, which=weights, checkpoint=checkpoint, device=target)
    config = _with_broken_files(config, broken_files)
    assert isinstance(config, ContraGANTrainConfig)
    root = config.data if data is None else data
    evaluator = judge_of(config, root, extractor or config.extractor, target)
    train = labelled_images(config, "train", root)
    (images, labels), training = reference_and_training(config, train, root)
    torch.manual_seed(config.seed)
    untrained = SYSTEMS[config.system].network(config).to(target).eval()
    result = evaluate_generation(
        sampler(generator, seed),
        images,
        labels,
        evaluator,
        held_out=training,
        untrained=sampler(untrained, seed),
    )
    result = {"run": {"conditioning": config.conditioning, "checkpoint": checkpoint}} | result
    table = format_generation_table(result)
    write_result(result, table, *(report or Report(run)))
    return result, table


def evaluate_representation(
    run: Path,
    data: Path | None = None,
    *,
    checkpoint: str = "last",
    weights: Literal["ema", "raw"] = "ema",
    device: str = "auto",
    broken_files: Literal["error", "skip"] | None = None,
    report: Report | None = None,
) -> tuple[dict[str, Any], str]:
    """k-NN and linear accuracy of the encoder of a run of SimCLR, MoCo or SupCon, on the test images.

    Beside it stand raw pixels and the encoder before its training. Writes `metrics.json` and `metrics.md` into the run's
    folder.

    Returns:
        The result, see `fastnce.metrics.evaluate_encoders`, and its table.

    Raises:
        UserError: no such run, checkpoint or data.
    """
    target = resolve_device(device)
    encoder, config = load_generator(run, which=weights, checkpoint=checkpoint, device=target)
    config = _with_broken_files(config, broken_files)
    assert isinstance(config, RepresentationTrainConfig)
    root = config.data if data is None else data
    train = images_of(config, "train", data)
    if train.num_classes < 2 or not has_split(root, "test"):
        missing = "classes" if train.num_classes < 2 else "test images"
        raise UserError(
            f"data={root} has no {missing} to measure accuracy with. Name a folder with train/CLASS and test/CLASS."
        )
    test = images_of(config, "test", data)
    encoders = {
        TRAINED_ENCODER: encoder,
        RANDOM_ENCODER: random_encoder(config, train).to(target),
        RAW_PIXELS: nn.Flatten(),
    }
    result = {"run": {"method": config.method, "checkpoint": checkpoint}}
    result |= evaluate_encoders(encoders, train, test)
    table = format_encoder_table(result)
    write_result(result, table, *(report or Report(run)))
    return result, table


def evaluate_run(
    run: Path,
    data: Path | None = None,
    *,
    without_nce: Path | None = None,
    extractor: Path | None = None,
    segmentation: Segmentation | None = None,
    direction: str | None = None,
    value_range: tuple[float, float] | None = None,
    report: Report | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], str]:
    """Evaluates a run of any system; see the functions above for its settings.

    Writes `metrics.json` and `metrics.md` into the run's folder, of other data than its own `metrics-NAME.json` and `.md`.

    Raises:
        UserError: also if a setting is not for this system.
    """
    config = load_config(run)
    settings["report"] = report or Report.of(run, data, None)
    if data is None:
        _expect_data(run, config)
    if isinstance(config, UnpairedTrainConfig):
        return evaluate_translation(
            run,
            config.folders if data is None else data,
            without_nce=without_nce,
            extractor=extractor,
            segmentation=segmentation,
            direction=direction,
            value_range=value_range,
            **settings,
        )
    _only_for(config.system, without_nce=without_nce, segmenter=segmentation, direction=direction)
    _only_for(config.system, value_range=value_range)
    if isinstance(config, ContraGANTrainConfig):
        return evaluate_conditional_generation(run, data, extractor=extractor, **settings)
    _only_for(config.system, extractor=extractor)
    return evaluate_representation(run, data, **settings)


def _expect_data(run: Path, config: TrainConfig) -> None:
    """Raises `UserError`, saying where the path is from, if a run's own data are not there."""
    folders = config.folders if isinstance(config, UnpairedTrainConfig) else config.data
    for folder in folders.values() if isinstance(folders, dict) else [folders]:
        if not folder.exists():
            relative = "" if folder.is_absolute() else f" in {Path.cwd()}"
            raise UserError(
                f"data={folder}, which {Path(run) / 'config.json'} names, is not there{relative}. Run this where the training was "
                "started, or give the folder's place now: --data DIR."
            )


def _with_broken_files(config: TrainConfig, broken_files: str | None) -> TrainConfig:
    return config if broken_files is None else replace(config, broken_files=broken_files)


def _only_for(system: str, **settings: object) -> None:
    for name, value in settings.items():
        if value is not None:
            raise UserError(f"{name}={value} is not for a run of {system}. Leave it out.")
