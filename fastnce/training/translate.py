"""Trained generators: loading one, and translating tensors with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fastnce.data import to_uint8
from fastnce.errors import UserError
from fastnce.networks import ResnetGenerator
from fastnce.training.build import from_dict
from fastnce.training.checkpoint import load_checkpoint
from fastnce.training.config import TrainConfig, UnpairedTrainConfig
from fastnce.training.published import load_strictly, published_config, read_published
from fastnce.training.runtime import resolve_device
from fastnce.training.shared import read_shared
from fastnce.training.systems import SYSTEMS
from fastnce.training.tiles import translate_in_tiles

# Files that take the place of a run's folder.
WEIGHTS_FILES = (".pth", ".safetensors")


def load_config(run: Path) -> TrainConfig:
    """The configuration of the run in the folder `run`, or of the generator in a file (see `load_generator`).

    Raises:
        UserError: `run` is no folder of a training run and no such file.
    """
    if Path(run).suffix in WEIGHTS_FILES:
        return _load_file(Path(run))[1]
    path = Path(run) / "config.json"
    if not path.is_file():
        raise UserError(
            f"run={run} is no training run: it has no config.json. Name the --out folder of a `fastnce train`."
        )
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")), f"{path}: option")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged or not from this program ({error}).") from error


def introduced(
    run: Path, config: TrainConfig, which: str = "ema", checkpoint: object = "last"
) -> str:
    """A line on the trained network that a command works with."""
    name = getattr(config, "method", config.system)
    if Path(run).suffix in WEIGHTS_FILES:
        return f"{run}: a network of {name}"
    weights = "averaged" if which == "ema" else "unaveraged"
    return f"{run}: a run of {name}, {weights} weights of its checkpoint {checkpoint}"


def not_for(config: TrainConfig, run: object, what: str) -> UserError:
    """The error of a command that this run is not for, with the one that is."""
    name = getattr(config, "method", config.system)
    command = SYSTEMS[config.system].next_command.format(run=run)
    return UserError(f"a run of {name} does not {what}. What to do with it: {command}")


def load_generator(
    run: Path,
    *,
    which: Literal["ema", "raw"] = "ema",
    checkpoint: str | Path = "last",
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, TrainConfig]:
    """The trained generator of a run, in eval mode, and the run's configuration.

    Args:
        run: folder of the run. Or a file that takes its place: a `.safetensors` of `fastnce export`, or the `.pth` of a
            generator of a published repository, whose configuration has defaults for all that weights do not tell.
        which: "ema" for the running average of the weights, "raw" for the weights themselves; a file holds one of them.
        checkpoint: "last", "best", or the path of a checkpoint file.
        device: where to put the generator.

    Raises:
        UserError: no such run or checkpoint, or a damaged one.
    """
    if which not in ("ema", "raw"):
        raise UserError(f"which={which} is unknown. Use ema or raw.")
    target = resolve_device(device) if isinstance(device, str) else device
    run = Path(run)
    if run.suffix in WEIGHTS_FILES:
        return _ready(*_load_file(run), target)
    config = load_config(run)
    path = checkpoint_path(run, checkpoint)
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
    return _ready(generator, config, target)


def checkpoint_path(run: Path, checkpoint: str | Path) -> Path:
    """The file of a checkpoint: "last" or "best" of the run in the folder `run`, or a path."""
    if checkpoint in ("last", "best"):
        return Path(run) / "checkpoints" / f"{checkpoint}.pt"
    return Path(checkpoint)


def _load_file(path: Path) -> tuple[nn.Module, TrainConfig]:
    if path.suffix == ".safetensors":
        state, config = read_shared(path)
    else:
        state, config = read_published(path), None
    if config is None:
        config = published_config(state, path)
    generator = SYSTEMS[config.system].network(config)
    load_strictly(generator, state, path)
    return generator, config


def _ready(
    generator: nn.Module, config: TrainConfig, device: torch.device
) -> tuple[nn.Module, TrainConfig]:
    return generator.to(device).eval().requires_grad_(False), config


@torch.inference_mode()
def translate(
    generator: nn.Module, images: Tensor, batch_size: int = 16, *, tile: int | None = None
) -> Tensor:
    """Translates an image or a batch of them, of any height and width.

    Args:
        generator: as `load_generator` gives it; of a system of both directions one of its parts `a_to_b` and `b_to_a`, or all
            of it for A to B.
        images: (C, H, W) or (N, C, H, W), on any device: uint8, from 0 to 255, or floating-point in [-1, 1]. H and W that are
            no multiples of 4 (of a U-Net's `size_multiple`) are mirrored at the right and the bottom up to one, and the result
            is cut back.
        batch_size: images at a time.
        tile: images that are higher or wider are computed in tiles of this size, with the same result: see
            `translate_in_tiles`.

    Returns:
        The translations as `images` are: (C', H, W) or (N, C', H, W), of the same dtype and on the same device. uint8 holds what
        `save_image` writes. Floating-point values are in [-1, 1], but for SinCUT's, which may lie beyond.

    Raises:
        TypeError: another dtype, or no tensor.
        ValueError: another shape or number of channels, values beyond [-1, 1], or a batch below 1.

    Example:
        >>> from fastnce.networks import ResnetGenerator
        >>> generator = ResnetGenerator(base_channels=2, num_blocks=1).eval()
        >>> photo = torch.randint(256, (3, 21, 34), dtype=torch.uint8)
        >>> translate(generator, photo).shape, translate(generator, photo).dtype
        (torch.Size([3, 21, 34]), torch.uint8)
    """
    generator = getattr(generator, "a_to_b", generator)
    _check_images(generator, images)
    if batch_size < 1:
        raise ValueError(f"translate: batch_size: expected at least 1, got {batch_size}.")
    if images.ndim == 3:
        return translate(generator, images[None], batch_size, tile=tile)[0]
    like = next(generator.parameters())
    height, width = images.shape[2:]
    in_tiles = tile is not None and max(height, width) > tile
    outputs = []
    for batch in images.split(1 if in_tiles else batch_size):
        padded = _mirrored_up(_in_unit_range(batch).to(like.dtype), generator)
        if in_tiles:
            output = translate_in_tiles(generator, padded, tile)
        else:
            output = generator(padded.to(like.device))
        output = output[..., :height, :width]
        outputs.append((to_uint8(output) if images.dtype == torch.uint8 else output).to(images))
    return torch.cat(outputs) if outputs else images.clone()


def _check_images(generator: nn.Module, images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(
            f"translate: images: expected a tensor, got a {type(images).__name__}. For an array: torch.from_numpy(...)."
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(
            f"translate: images: expected uint8 (0 to 255) or floating-point ([-1, 1]), got {images.dtype}. "
            "Use images.to(torch.uint8) for values from 0 to 255."
        )
    # The first convolution's weight; a module of one's own may have none.
    channels = next((p.shape[1] for p in generator.parameters() if p.ndim == 4), None)
    fits = images.ndim in (3, 4) and channels in (None, images.shape[-3])
    if not fits or 0 in images.shape[-2:]:
        raise ValueError(
            f"translate: images: expected (C, H, W) or (N, C, H, W) with C = {channels}, got {tuple(images.shape)}. "
            "Of (H, W, C) make that with images.permute(2, 0, 1)."
        )
    if images.is_floating_point() and images.numel():
        least, greatest = (value.item() for value in images.aminmax())
        if least < -1.001 or greatest > 1.001:  # false with NaN, which is translated to NaN
            raise ValueError(
                f"translate: images: expected values in [-1, 1], got {least:g} to {greatest:g}. Pass 0 to 255 as uint8, or "
                "use images / 127.5 - 1."
            )


def _in_unit_range(images: Tensor) -> Tensor:
    """[-1, 1], of uint8 as `load_image` does."""
    return (images / 255 - 0.5) / 0.5 if images.dtype == torch.uint8 else images


def _mirrored_up(images: Tensor, generator: nn.Module) -> Tensor:
    """The images, mirrored at the right and the bottom up to a size that the generator can halve."""
    multiple = getattr(generator, "size_multiple", 4)
    least = 8 if isinstance(generator, ResnetGenerator) else multiple
    for dim in (2, 3):
        size = images.shape[dim]
        length = max(size + -size % multiple, least)
        if length > size:
            # To and fro, so that also an image that is smaller than what it lacks is filled.
            period = max(2 * (size - 1), 1)
            place = torch.arange(length, device=images.device) % period
            images = images.index_select(
                dim, torch.minimum(place, period - place) if size > 1 else place
            )
    return images


def in_direction(
    generator: nn.Module, config: UnpairedTrainConfig, direction: str | None
) -> tuple[nn.Module, int]:
    """The part of a generator that translates from one domain to the other, and the channels of its input.

    Args:
        generator: of a system of one direction, or with the parts `a_to_b` and `b_to_a`.
        config: of its run.
        direction: "AtoB" or "BtoA", the names of the data's folders; None: as in the run.

    Raises:
        UserError: a direction that the generator does not translate in.
    """
    if direction is None or direction == config.direction:
        return getattr(generator, "a_to_b", generator), config.in_channels
    if not hasattr(generator, "b_to_a"):
        raise UserError(
            f"direction={direction}: this generator translates {config.direction} alone. Leave direction out, name a run "
            "of a system of both directions, or the weights file of the other generator."
        )
    return generator.b_to_a, config.out_channels
