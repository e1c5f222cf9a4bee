"""Images of chosen classes from a trained conditional generator."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastnce import viz
from fastnce.data import save_image
from fastnce.data.files import expect_apart
from fastnce.data.labelled import open_labelled
from fastnce.errors import UserError
from fastnce.systems.labelled import LabelledConfig

# A grid shows so many images of a class at most; the folders hold all.
_GRID_COLUMNS = 12


def latent(
    count: int, dim: int, *, truncation: float | None = None, generator: torch.Generator
) -> Tensor:
    """Noise (count, dim): normal, or normal cut off at +-truncation, which trades variety for fidelity (BigGAN)."""
    z = torch.empty(count, dim)
    if truncation is None:
        return z.normal_(generator=generator)
    return nn.init.trunc_normal_(z, a=-truncation, b=truncation, generator=generator)


def interpolate(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """`steps` points (steps, D) on the line from z `start` to z `end`, (D,) each, both included."""
    return torch.lerp(start, end, torch.linspace(0, 1, steps)[:, None])


def generate_folder(
    generator: nn.Module,
    config: LabelledConfig,
    out: Path,
    *,
    classes: Sequence[str] = (),
    count: int = 16,
    truncation: float | None = None,
    interpolation: int = 0,
    seed: int = 0,
    batch_size: int = 64,
) -> int:
    """Writes `out/CLASS/NNNN.png` for each class, `out/grid.png`, and `out/interpolation.png` if asked for.

    All classes share their noise, so that a column of the grid shows what the class changes.

    Args:
        generator: as `load_generator` gives it.
        config: the configuration of its run.
        out: folder; created.
        classes: Numbers or names of the classes; by default all. Those of a run from before runs kept them are looked up in its
            data.
        count: Images of each class.
        truncation: Cut the noise off at this value, such as 0.8: less variety, more fidelity.
        interpolation: Also a picture with so many steps from one noise to another; 0 for none.
        seed: Seed of the noise.
        batch_size: Images generated at a time.

    Returns:
        The number of images.

    Raises:
        UserError: a value out of range.
    """
    for name, value, minimum in (("count", count, 1), ("batch_size", batch_size, 1)):
        if value < minimum:
            raise UserError(f"{name}={value} is too small. Use {name} >= {minimum}.")
    # Generated images among those that the run, or its evaluation, reads.
    expect_apart(out, [Path(config.data) / split for split in ("train", "test", "valid", "val")])
    if truncation is not None and not truncation > 0:
        raise UserError(f"truncation={truncation} must be positive. Use about 0.5 to 2.")
    if interpolation < 0 or interpolation == 1:
        raise UserError(f"interpolation={interpolation} must be 0 for none, or at least 2 columns.")
    chosen = _labels(classes, _class_names(config, generator.num_classes))
    random = torch.Generator().manual_seed(seed)
    z = latent(count, generator.latent_dim, truncation=truncation, generator=random)
    ends = latent(2, generator.latent_dim, truncation=truncation, generator=random)

    rows, between = {}, {}
    for label, name in tqdm(chosen.items(), desc="generate", unit="class", disable=None):
        images = sample_images(generator, z, torch.full((count,), label), batch_size)
        for number, image in enumerate(images):
            save_image(image, Path(out) / name / f"{number:04d}.png")
        rows[name] = list(images[:_GRID_COLUMNS])
        if interpolation:
            line = interpolate(*ends, interpolation)
            between[name] = list(
                sample_images(generator, line, torch.full((interpolation,), label))
            )
    viz.save_sample_grid(rows, Path(out) / "grid.png")
    if interpolation:
        viz.save_sample_grid(between, Path(out) / "interpolation.png")
    return count * len(chosen)


def _labels(classes: Sequence[str], names: Sequence[str]) -> dict[int, str]:
    """Label -> name of the chosen classes."""
    if not classes:
        return dict(enumerate(names))
    chosen = {}
    for text in classes:
        if text in names:
            label = names.index(text)
        elif text.isdecimal() and int(text) < len(names):
            label = int(text)
        else:
            raise UserError(
                f"class={text} is unknown. Use a number from 0 to {len(names) - 1}, or a name such as {names[0]}."
            )
        chosen[label] = names[label]
    return chosen


def _class_names(config: LabelledConfig, count: int) -> list[str]:
    """The run's; of an old run those of its data, or numbers if that is not there or has other classes by now."""
    if config.class_names:
        return list(config.class_names)
    with contextlib.suppress(UserError):
        names = open_labelled(config.data, "train").class_names
        if len(names) == count:
            return list(names)
    return [str(label) for label in range(count)]


@torch.inference_mode()
def sample_images(generator: nn.Module, z: Tensor, labels: Tensor, batch_size: int = 256) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] of a generator in eval mode, on the CPU, for `z` (N, latent_dim) and `labels` (N,)."""
    device = next(generator.parameters()).device
    parts = zip(z.split(batch_size), labels.split(batch_size), strict=True)
    images = [generator(a.to(device), b.to(device)).float().cpu() for a, b in parts]
    return torch.cat(images).contiguous()
