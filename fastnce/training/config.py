"""The options of a training run: frozen dataclasses whose fields are the command line's options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

from fastnce.errors import UserError
from fastnce.models import CUTConfig, options

# Fields that change how a run is carried out or watched, not what it computes: a resumed run may change them.
FREE_FIELDS = frozenset(
    {
        "out",
        "device",
        "workers",
        "deterministic",
        "log_every",
        "sample_every",
        "sample_count",
        "checkpoint_every",
    }
)
# Fields that a resumed run may change as long as the steps already made stay what they were.
SCHEDULE_FIELDS = frozenset({"epochs", "decay_epochs", "steps"})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options that every system shares."""

    system: ClassVar[str]

    data: Path
    """Folder with trainA and trainB, and testA and testB for the sample grids."""
    out: Path
    """Folder of the run; created. A run that is there already is continued."""
    seed: int = 0
    """Seed of the initialisation, the data order, the augmentation and the patches."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU if there is one."""
    deterministic: bool = False
    """On a GPU: only deterministic algorithms, which may be slower. On a CPU runs are always repeatable."""
    batch_size: int = 1
    """Images of each domain per step."""
    workers: int = 2
    """Processes that read images; 0 reads in the training process. The run is the same with any number."""
    epochs: int = 200
    """Epochs at the full learning rate."""
    decay_epochs: int = 200
    """Further epochs in which the learning rate falls linearly towards 0."""
    steps: int | None = None
    """Stop after this many steps; by default after epochs + decay_epochs."""
    ema_decay: float = 0.999
    """Decay of the running average of the generator's weights; 0 keeps the last weights."""
    load_size: int = 286
    """Images are scaled to this size before the crop; in the decay epochs to crop_size."""
    crop_size: int = 256
    """Size of the random crop."""
    preprocess: str = "resize_and_crop"
    """Steps before the network: resize, scale_width, scale_shortside, crop or none, joined by _and_."""
    flip: bool = True
    """Mirror each training image with probability 1/2."""
    augment_a: Literal["none", "affine"] = "none"
    """affine: turn, scale and shift the images of A slightly."""
    direction: Literal["AtoB", "BtoA"] = "AtoB"
    """Which domain is translated to which."""
    serial: bool = False
    """Read both folders in order instead of shuffling A and drawing from B."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl; a line holds the means over these steps."""
    sample_every: int = 500
    """Steps between two sample grids."""
    sample_count: int = 8
    """Test images in a sample grid."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        options.at_least(self, 1, "batch_size", "log_every", "sample_every", "checkpoint_every")
        options.at_least(self, 1, "load_size", "crop_size", "sample_count")
        options.at_least(self, 0, "workers", "epochs", "decay_epochs", "seed")
        options.in_unit_interval(self, "ema_decay")
        options.one_of(self, "augment_a", ("none", "affine"))
        options.one_of(self, "direction", ("AtoB", "BtoA"))
        if self.steps is not None:
            options.at_least(self, 1, "steps")
        if self.epochs + self.decay_epochs == 0:
            raise UserError("epochs=0 and decay_epochs=0 leave nothing to train. Use epochs >= 1.")


@dataclass(frozen=True, kw_only=True)
class CUTTrainConfig(CUTConfig, TrainConfig):
    """Training of CUT or FastCUT."""

    system: ClassVar[str] = "cut"

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        CUTConfig.__post_init__(self)


CONFIGS: dict[str, type[TrainConfig]] = {"cut": CUTTrainConfig}


def to_dict(config: TrainConfig) -> dict[str, object]:
    """The configuration as JSON values, with its system's name first."""
    values: dict[str, object] = {"system": config.system}
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        values[field.name] = value
    return values


def differing_fields(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Names of the fields of two `to_dict` results that differ and change what a run computes."""
    names = [*one, *(name for name in other if name not in one)]
    return [
        name
        for name in names
        if name not in FREE_FIELDS
        and name not in SCHEDULE_FIELDS
        and one.get(name) != other.get(name)
    ]
