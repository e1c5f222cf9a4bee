"""Options of the patchwise contrastive loss, for the systems that have one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fastnce.errors import UserError
from fastnce.models import options

Negatives = Literal["image", "batch", "queue", "image+queue"]


@dataclass(frozen=True, kw_only=True)
class PatchContrastConfig:
    """The patchwise contrastive loss. The defaults are the published CUT's.

    A system's configuration inherits from it and calls `PatchContrastConfig.__post_init__(self)` in its own.
    """

    nce_layers: tuple[int, ...] = (0, 4, 8, 12, 16)
    """Generator layers whose features are compared; 0 is the padded image itself."""
    num_patches: int = 256
    """Patches per image and layer; 0: all positions."""
    projector: Literal["mlp", "none"] = "mlp"
    """What the patches pass before they are compared: a small trained MLP per layer, or nothing."""
    projection_dim: int = 256
    """Width of the MLPs."""
    temperature: float = 0.07
    """Temperature of the contrastive loss."""
    negatives: Negatives = "image"
    """Which patches are negatives. image: others of the same image; batch: others of all images of the batch; queue: those of
    earlier images only; image+queue: others of the same image and those of earlier images."""
    queue_size: int = 4096
    """Patches of earlier images that each layer keeps, with a queue among the negatives."""
    norm_floor: float = 0.0
    """Added to the norm of a patch by which it is divided: 1e-7 in the published code, which tells in the first step only.
    With 0 the normalisation is part of the fused loss."""
    backend: str | None = None
    """Backend of the contrastive ops; by default the fastest that runs here."""

    def __post_init__(self) -> None:
        options.at_least(self, 1, "projection_dim", "queue_size")
        options.at_least(self, 0, "num_patches", "norm_floor")
        options.above_zero(self, "temperature")
        options.one_of(self, "projector", ("mlp", "none"))
        options.one_of(self, "negatives", get_args(Negatives))
        if self.norm_floor > 0 and "queue" in self.negatives:
            raise UserError(
                f"norm_floor={self.norm_floor} is for the published negatives, image and batch, got negatives={self.negatives}. "
                "Use norm_floor=0."
            )
