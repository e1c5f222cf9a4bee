"""A trained run, opened once: its configuration, its system, and the networks of its checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.networks.weights import load_strictly
from fastnce.systems import (
    System,
    TrainConfig,
    representation,
    system_named,
)
from fastnce.systems.inverting import Inversion
from fastnce.training.checkpoint import below, load_checkpoint
from fastnce.training.config import from_dict
from fastnce.training.published import published_config, read_published, system_of_file
from fastnce.training.runtime import resolve_device
from fastnce.training.shared import read_shared

# Files that take the place of a run's folder.
WEIGHTS_FILES = (".pth", ".safetensors")


class Run:
    """A run in a folder, or a file of weights that takes its place.

    Args:
        path: folder of the run. Or a `.safetensors` of `fastnce export`, or the `.pth` of a generator of a published
            repository, or the `.pt` in which it keeps all; their configuration has defaults for what weights do not tell.
        weights: "ema" for the running average of the network's weights, "raw" for the weights themselves; a file holds one of
            them.
        checkpoint: "last", "best", or the path of a checkpoint file.
        device: where its networks are.

    Attributes:
        config: its configuration.
        system: its system.

    Raises:
        UserError: `path` is neither, or a damaged file.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        weights: Literal["ema", "raw"] = "ema",
        checkpoint: str | Path = "last",
        device: str | torch.device = "cpu",
    ) -> None:
        if weights not in ("ema", "raw"):
            raise UserError(f"which={weights} is unknown. Use ema or raw.")
        self.path, self.weights, self.checkpoint = Path(path), weights, checkpoint
        self.device = resolve_device(device) if isinstance(device, str) else device
        self._state: dict[str, Tensor] = {}
        self.is_file = self.path.suffix in (*WEIGHTS_FILES, ".pt")
        self.config: TrainConfig = self._read_file() if self.is_file else self._read_folder()
        self.system: System = system_named(self.config.system)

    def __str__(self) -> str:
        """A line on the network that a command works with."""
        name = self.system.called(self.config)
        if self.is_file:
            return f"{self.path}: a network of {name}"
        weights = "averaged" if self.weights == "ema" else "unaveraged"
        return (
            f"{self.path}: a run of {name}, {weights} weights of its checkpoint {self.checkpoint}"
        )

    @cached_property
    def network(self) -> nn.Module:
        """The network that is used after the training, in eval mode."""
        return self.network_of(self.checkpoint)

    def network_of(self, checkpoint: str | Path) -> nn.Module:
        """The same of another checkpoint."""
        network = self.system.network(self.config)
        if self.is_file:
            load_strictly(network, self._state, self.path)
        else:
            state = self.state(checkpoint)
            weights = (
                state["average"]["module"]
                if self.weights == "ema"
                else below(state["model"], self.system.network_name)
            )
            try:
                network.load_state_dict(weights)
            except RuntimeError as error:
                raise UserError(
                    f"{self.checkpoint_path(checkpoint)}: is not a checkpoint of the run {self.path}. Name one of its own."
                ) from error
        return network.to(self.device).eval().requires_grad_(False)

    def state(self, checkpoint: str | Path | None = None) -> dict[str, Any]:
        """The content of a checkpoint, by default that of this run; tensors on the CPU."""
        return load_checkpoint(self.checkpoint_path(checkpoint or self.checkpoint))

    def checkpoint_path(self, checkpoint: str | Path) -> Path:
        """The file of a checkpoint: "last" or "best" of the run, or a path."""
        if checkpoint in ("last", "best"):
            return self.path / "checkpoints" / f"{checkpoint}.pt"
        return Path(checkpoint)

    def _read_file(self) -> TrainConfig:
        if self.path.suffix == ".pt":
            system = system_of_file(self.path)
            if system is None:
                raise UserError(
                    f"run={self.path} is no training run, and no file of a published program. Name the --out folder of a "
                    "`fastnce train`; one of its checkpoints with checkpoint."
                )
            config, self._state = system.read_published(self.path)
            return config
        config = None
        if self.path.suffix == ".safetensors":
            self._state, config = read_shared(self.path)
        else:
            self._state = read_published(self.path)
        return config or published_config(self._state, self.path)

    def _read_folder(self) -> TrainConfig:
        path = self.path / "config.json"
        if not path.is_file():
            raise UserError(
                f"run={self.path} is no training run: it has no config.json. Name the --out folder of a `fastnce train`."
            )
        try:
            return from_dict(json.loads(path.read_text(encoding="utf-8")), f"{path}: option")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is damaged or not from this program ({error}).") from error


def opened(run: Run | Path | str, **how: Any) -> Run:
    """The run itself, or opened from its folder: see `Run`."""
    return run if isinstance(run, Run) else Run(run, **how)


def load_generator(
    run: Path,
    *,
    which: Literal["ema", "raw"] = "ema",
    checkpoint: str | Path = "last",
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, TrainConfig]:
    """The trained network of a run, in eval mode, and the run's configuration: see `Run`."""
    opened_run = Run(run, weights=which, checkpoint=checkpoint, device=device)
    return opened_run.network, opened_run.config


def translate_folder(
    network: nn.Module, config: TrainConfig, input: Path, out: Path, **how: Any
) -> int:
    """See `fastnce.systems.translating.translate_folder`; refuses the network of a system that does not translate."""
    system = _system_that("translate images", config)
    return system.translate_folder(network, config, input, out, **how)


def generate_folder(network: nn.Module, config: TrainConfig, out: Path, **how: Any) -> int:
    """See `generate_folder` in the system's file; refuses the network of a system that does not generate."""
    return _system_that("generate images", config).generate_folder(network, config, out, **how)


def write_features(
    network: nn.Module, config: TrainConfig, input: Path, out: Path, **how: Any
) -> tuple[int, int]:
    """See `fastnce.systems.representation.write_features`; refuses the network of a system that has no encoder of images."""
    _system_that("write features of whole images", config)
    return representation.write_features(network, config, input, out, **how)


def inversion(
    run: Run | Path,
    *,
    steps: int | None = None,
    other_shapes: Literal["error", "crop", "stretch"] | None = None,
    first: Run | Path | None = None,
    first_steps: int = 1,
) -> Inversion:
    """How a run inverts images, behind another run `first`: see `Inversion`; refuses a run of a system that does not invert.

    `other_shapes` is what becomes of images of another shape than the encoder's; by default as in the training.
    """
    run = opened(run)
    if first is not None:
        first = opened(first, weights=run.weights, device=run.device)
    for one in (run, first):
        if one is not None:
            _system_that("invert images", one.config)
    config = run.config if other_shapes is None else replace(run.config, other_shapes=other_shapes)
    return Inversion(run.network, config, steps, first, first_steps)


def _system_that(does: str, config: TrainConfig) -> System:
    system = system_named(config.system)
    system.expect_to(does, config)
    return system
