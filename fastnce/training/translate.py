"""Trained generators: loading one, and translating tensors and folders with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastnce.data import Preprocess, list_images, save_image
from fastnce.data.folders import read_image, to_tensor
from fastnce.errors import UserError
from fastnce.training.build import from_dict
from fastnce.training.checkpoint import load_checkpoint
from fastnce.training.config import TrainConfig, UnpairedTrainConfig
from fastnce.training.runtime import resolve_device
from fastnce.training.systems import SYSTEMS


def load_config(run: Path) -> TrainConfig:
    """The configuration of the run in the folder `run`.

    Raises:
        UserError: `run` is no folder of a training run.
    """
    path = Path(run) / "config.json"
    if not path.is_file():
        raise UserError(
            f"run={run} is no training run: it has no config.json. Name the --out folder of a `fastnce train`."
        )
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")), f"{path}: option")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged or not from this program ({error}).") from error


def load_generator(
    run: Path,
    *,
    which: Literal["ema", "raw"] = "ema",
    checkpoint: str | Path = "last",
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, TrainConfig]:
    """The trained generator of a run, in eval mode, and the run's configuration.

    Args:
        run: folder of the run.
        which: "ema" for the running average of the weights, "raw" for the weights themselves.
        checkpoint: "last", "best", or the path of a checkpoint file.
        device: where to put the generator.

    Raises:
        UserError: no such run or checkpoint, or a damaged one.
    """
    if which not in ("ema", "raw"):
        raise UserError(f"which={which} is unknown. Use ema or raw.")
    config = load_config(run)
    path = Path(checkpoint)
    if checkpoint in ("last", "best"):
        path = Path(run) / "checkpoints" / f"{checkpoint}.pt"
    state = load_checkpoint(path)
    system = SYSTEMS[config.system]
    prefix = f"{system.network_name}."
    weights = (
        state["average"]["module"]
        if which == "ema"
        else {k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
    )
    generator = system.network(config)
    try:
        generator.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{path}: is not a checkpoint of the run {run}. Name one of its own."
        ) from error
    target = resolve_device(device) if isinstance(device, str) else device
    return generator.to(target).eval().requires_grad_(False), config


@torch.inference_mode()
def translate(generator: nn.Module, images: Tensor, batch_size: int = 16) -> Tensor:
    """Translates images of any height and width.

    Args:
        generator: as `load_generator` gives it.
        images: (N, C, H, W) in [-1, 1], on any device. H and W that are no multiples of 4 are mirrored at the right and the
            bottom up to one, and the result is cut back.
        batch_size: images at a time.

    Returns:
        (N, C, H, W) in [-1, 1], on the device of `images`.
    """
    device = next(generator.parameters()).device
    height, width = images.shape[2:]
    padding = (0, -width % 4, 0, -height % 4)
    outputs = []
    for batch in images.split(batch_size):
        padded = (
            F.pad(batch.to(device), padding, mode="reflect") if any(padding) else batch.to(device)
        )
        outputs.append(generator(padded)[..., :height, :width].to(images.device))
    return torch.cat(outputs) if outputs else images.clone()


def translate_folder(
    generator: nn.Module, config: TrainConfig, input: Path, out: Path, batch_size: int = 16
) -> int:
    """Translates all images of a folder, and of the folders in it, to PNG files of the same names.

    Images are scaled as in training, to the size of its crops, but not cropped. Images that follow each other and have the
    same size are translated together.

    Returns:
        The number of images.

    Raises:
        UserError: a run that does not translate, no images, a broken one, two whose results would have the same name, or `out` cannot be written.
    """
    if not isinstance(config, UnpairedTrainConfig):
        raise UserError(
            f"a run of {config.system} does not translate images. Name a run of cut or fastcut."
        )
    paths = list_images(input)
    targets = _targets(paths, Path(input), Path(out))
    kept = [part for part in config.preprocess.split("_and_") if "crop" not in part]
    scale = Preprocess("_and_".join(kept) or "none", config.crop_size, config.crop_size, flip=False)

    def read() -> Iterator[tuple[Path, Tensor]]:
        for path, target in zip(paths, targets, strict=True):
            array = scale.prepare(read_image(path, config.in_channels))
            yield target, to_tensor(array)

    with tqdm(total=len(paths), desc="translate", unit="image", disable=None) as bar:
        for group in _groups_of_one_size(read(), batch_size):
            results = translate(generator, torch.stack([image for _, image in group]), batch_size)
            for (target, _), result in zip(group, results, strict=True):
                save_image(result, target)
            bar.update(len(group))
    return len(paths)


def _targets(paths: list[Path], folder: Path, out: Path) -> list[Path]:
    targets: dict[Path, Path] = {}
    for path in paths:
        target = out / path.relative_to(folder).with_suffix(".png")
        if target in targets:
            raise UserError(
                f"{path} and {targets[target]} would both be written to {target}. Rename one of them."
            )
        if target.resolve() == path.resolve():
            raise UserError(f"out={out} would overwrite {path}. Name another folder.")
        targets[target] = path
    return list(targets)


def _groups_of_one_size(
    images: Iterator[tuple[Path, Tensor]], limit: int
) -> Iterator[list[tuple[Path, Tensor]]]:
    group: list[tuple[Path, Tensor]] = []
    for target, image in images:
        if group and (len(group) == limit or image.shape != group[0][1].shape):
            yield group
            group = []
        group.append((target, image))
    if group:
        yield group
