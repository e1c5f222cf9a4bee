"""What `fastnce evaluate` measures of a run, by the run's system."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.metrics import (
    digits_to_translate,
    evaluate_digits,
    evaluate_generation,
    format_generation_table,
    format_table,
    generation_evaluator,
    write_generation_report,
    write_report,
)
from fastnce.metrics.representation import (
    RANDOM_ENCODER,
    RAW_PIXELS,
    TRAINED_ENCODER,
    evaluate_encoders,
    format_encoder_table,
)
from fastnce.metrics.tables import write_result
from fastnce.training.config import ContraGANTrainConfig, RepresentationTrainConfig
from fastnce.training.generation import labelled_images, reference_images, sampler
from fastnce.training.representation import images_of, random_encoder
from fastnce.training.runtime import resolve_device
from fastnce.training.systems import SYSTEMS
from fastnce.training.translate import load_config, load_generator, translate


def evaluate_translation(
    run: Path,
    data: Path,
    *,
    without_nce: Path | None = None,
    checkpoint: str = "last",
    weights: Literal["ema", "raw"] = "ema",
    device: str = "auto",
) -> tuple[dict[str, Any], str]:
    """Content accuracy, FID and KID of a run of CUT on a digits-photos set, beside their baselines.

    Writes `metrics.json` and `metrics.md` into the run's folder.

    Returns:
        The result, see `fastnce.metrics.evaluate_digits`, and its table.

    Raises:
        UserError: no such run, checkpoint or data.
    """
    target = resolve_device(device)
    images = digits_to_translate(data)

    def translated(folder: Path) -> Tensor:
        generator, _ = load_generator(folder, which=weights, checkpoint=checkpoint, device=target)
        return translate(generator, images)

    result = evaluate_digits(
        translated(run),
        data,
        without_nce=None if without_nce is None else translated(without_nce),
    )
    write_report(result, run)
    return result, format_table(result)


def evaluate_conditional_generation(
    run: Path,
    data: Path | None = None,
    *,
    extractor: Path | None = None,
    checkpoint: str = "last",
    weights: Literal["ema", "raw"] = "ema",
    device: str = "auto",
    seed: int = 0,
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

    Returns:
        The result, see `fastnce.metrics.evaluate_generation`, and its table.

    Raises:
        UserError: no such run, checkpoint or data, or no extractor for this data.
    """
    target = resolve_device(device)
    generator, config = load_generator(run, which=weights, checkpoint=checkpoint, device=target)
    assert isinstance(config, ContraGANTrainConfig)
    root = config.data if data is None else data
    evaluator = generation_evaluator(root, extractor or config.extractor, device=target)
    images, labels = reference_images(labelled_images(config, "test", root), config.measure_count)
    training = reference_images(labelled_images(config, "train", root), len(labels))
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
    write_generation_report(result, run)
    return result, format_generation_table(result)


def evaluate_representation(
    run: Path,
    data: Path | None = None,
    *,
    checkpoint: str = "last",
    weights: Literal["ema", "raw"] = "ema",
    device: str = "auto",
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
    assert isinstance(config, RepresentationTrainConfig)
    train, test = (images_of(config, split, data) for split in ("train", "test"))
    encoders = {
        TRAINED_ENCODER: encoder,
        RANDOM_ENCODER: random_encoder(config, train).to(target),
        RAW_PIXELS: nn.Flatten(),
    }
    result = {"run": {"method": config.method, "checkpoint": checkpoint}}
    result |= evaluate_encoders(encoders, train, test)
    table = format_encoder_table(result)
    write_result(result, table, run)
    return result, table


def evaluate_run(
    run: Path,
    data: Path | None = None,
    *,
    without_nce: Path | None = None,
    extractor: Path | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], str]:
    """Evaluates a run of any system; see the functions above for its settings.

    Raises:
        UserError: also if a setting is not for this system.
    """
    system = load_config(run).system
    if system == "contragan":
        _only_for(system, without_nce=without_nce)
        return evaluate_conditional_generation(run, data, extractor=extractor, **settings)
    _only_for(system, extractor=extractor)
    if system == "representation":
        _only_for(system, without_nce=without_nce)
        return evaluate_representation(run, data, **settings)
    if data is None:
        data = load_config(run).data
    return evaluate_translation(run, data, without_nce=without_nce, **settings)


def _only_for(system: str, **settings: object) -> None:
    for name, value in settings.items():
        if value is not None:
            raise UserError(f"{name}={value} is not for a run of {system}. Leave it out.")
