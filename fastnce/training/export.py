"""What `fastnce export` writes: a run's weights for the published repositories, or for sharing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastnce.data.files import atomic_path
from fastnce.errors import UserError
from fastnce.training.checkpoint import load_checkpoint
from fastnce.training.shared import write_shared
from fastnce.training.systems import SYSTEMS
from fastnce.training.translate import checkpoint_path, load_config, load_generator


def export_published(
    run: Path,
    out: Path,
    *,
    label: str = "latest",
    which: Literal["ema", "raw"] = "ema",
    checkpoint: str | Path = "last",
    module_prefix: bool = False,
) -> list[Path]:
    """Writes a run's networks as the published repository keeps them: `out/{label}_net_{G,D,F}.pth`, plain state dicts.

    Args:
        run: folder of the run.
        out: folder for the files; created.
        label: the epoch in the files' names.
        which: "ema" for the running average of the generator's weights, "raw" for the weights that training goes on from.
            The other networks have no average.
        checkpoint: "last", "best", or the path of a checkpoint file.
        module_prefix: put `module.` before every key, as the published code does when it trains on a CPU.

    Returns:
        The files.

    Raises:
        UserError: no such run or checkpoint, a system that no published repository has, or `out` cannot be written.
    """
    config = load_config(run)
    system = SYSTEMS[config.system]
    if not system.published:
        raise UserError(
            f"a run of {config.system} has no published layout of files. Use format=safetensors."
        )
    state = load_checkpoint(checkpoint_path(run, checkpoint))
    model: dict[str, Tensor] = dict(state["model"])
    if which == "ema":
        model |= {f"{system.network_name}.{k}": v for k, v in state["average"]["module"].items()}
    written = []
    for name, attribute in system.published.items():
        weights = _below(model, f"{attribute}.")
        if weights:
            path = Path(out) / f"{label}_net_{name}.pth"
            prefix = "module." if module_prefix else ""
            _save({f"{prefix}{k}": v.clone() for k, v in weights.items()}, path)
            written.append(path)
    return written


def export_shared(
    run: Path,
    out: Path,
    *,
    which: Literal["ema", "raw"] = "ema",
    checkpoint: str | Path = "last",
) -> Path:
    """Writes the network that a run was made for, with its configuration, as `out/model.safetensors`.

    The file takes the place of the run's folder wherever a trained network is read.

    Returns:
        The file.

    Raises:
        UserError: no such run or checkpoint, or `out` cannot be written.
    """
    network, config = load_generator(run, which=which, checkpoint=checkpoint)
    path = Path(out) / "model.safetensors"
    write_shared(network, config, path)
    return path


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _save(state: dict[str, Tensor], path: Path) -> None:
    with atomic_path(path) as temporary:
        torch.save(state, temporary)
