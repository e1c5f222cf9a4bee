"""Shared by the systems that train on images with class labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from torch.utils.data import Dataset

from fastnce.errors import UserError
from fastnce.systems.system import System, TrainConfig


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(TrainConfig):
    """Options of the systems that train on images with class labels."""

    class_names: tuple[str, ...] = ()
    """Classes to train on, in the order of their labels; by default all that the data has, sorted. A run keeps its own: a class
    that the data gets later is left out."""
    class_balance: bool = False
    """Draw every class equally often, however many images it has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.class_names:  # `generate` makes folders of them
            if Path(name).name != name or name == "..":
                raise UserError(f"class_names={name!r} is no name of a folder. Use one without /.")

    def with_class_names(self, names: tuple[str, ...]) -> Self:
        """The configuration of a run on these classes."""
        return replace(self, class_names=names)


class LabelledSystem(System):
    """A system that trains on images with class labels."""

    def settled(self, config: LabelledConfig, before: LabelledConfig | None) -> LabelledConfig:
        if before is not None and not config.class_names:
            return config.with_class_names(before.class_names)
        return config

    def of_data(self, config: LabelledConfig, dataset: Dataset) -> LabelledConfig:
        return config.with_class_names(dataset.class_names)

    def folders_read(self, config: LabelledConfig) -> Sequence[Path]:
        from fastnce.data.labelled import folders_read

        return folders_read(config.data)
