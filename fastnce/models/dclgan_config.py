"""The options of DCLGAN and SimDCL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastnce.errors import UserError
from fastnce.models import options
from fastnce.models.gan import GANMode
from fastnce.models.patch_contrast_config import Negatives, PatchContrastConfig
from fastnce.models.translation_config import TwoWayConfig


@dataclass(frozen=True, kw_only=True)
class DCLGANConfig(PatchContrastConfig, TwoWayConfig):
    """What defines DCLGAN's networks, losses and optimisers. The defaults are the published DCLGAN."""

    gan_mode: GANMode = "hinge"
    """Adversarial objective."""
    generator_hinge: Literal["margin", "linear"] = "margin"
    """The generators' loss with gan_mode=hinge. margin: max(0, 1 - D), the discriminators' own loss of real images, as the
    published code has it; linear: -D, as hinge losses usually have it."""
    lambda_gan: float = 1.0
    """Weight of the generators' adversarial losses."""
    lambda_nce: float = 2.0
    """Weight of the contrastive losses; 0 turns them off, together with everything they need."""
    lambda_idt: float = 1.0
    """Weight of leaving an image as it is that is in the target domain already (L1); 0 turns it off."""
    lambda_sim: float = 0.0
    """SimDCL: weight of the distance between heads on real and on translated images of a domain; 0 turns it off."""
    nce_layers: tuple[int, ...] = (4, 8, 12, 16)
    """Generator layers whose features are compared."""
    negatives: Negatives = "batch"
    """Which patches are negatives. image: others of the same image; batch: those of all images of the batch; queue: those of
    earlier images only; image+queue: others of the same image and those of earlier images."""
    lr_f: float = 1e-3
    """Adam of projectors and heads: learning rate. The published code gives them, unlike the other networks, PyTorch's defaults;
    SimDCL gives them those of the other networks."""
    beta1_f: float = 0.9
    """Adam of projectors and heads: decay of the mean gradient."""
    beta2_f: float = 0.999
    """Adam of projectors and heads: decay of the squared gradient."""

    def __post_init__(self) -> None:
        PatchContrastConfig.__post_init__(self)
        TwoWayConfig.__post_init__(self)
        options.one_of(self, "generator_hinge", ("margin", "linear"))
        options.at_least(self, 0, "lambda_gan", "lambda_nce", "lambda_idt", "lambda_sim")
        options.above_zero(self, "lr_f")
        options.in_unit_interval(self, "beta1_f", "beta2_f")
        if self.lambda_sim > 0:
            self._check_similarity()
        if self.in_channels != self.out_channels:
            self._check_channels()

    def _check_similarity(self) -> None:
        what = (
            f"lambda_sim={self.lambda_sim} compares the projected patches of the contrastive loss"
        )
        if self.lambda_nce == 0 or self.projector == "none":
            raise UserError(
                f"{what}, but lambda_nce={self.lambda_nce} and projector={self.projector}. "
                "Use lambda_nce > 0 and projector=mlp, or lambda_sim=0."
            )
        if self.num_patches < 3 or self.projection_dim < 3:
            raise UserError(
                f"{what} as images of {self.num_patches}x{self.projection_dim}. "
                "Use num_patches >= 3 and projection_dim >= 3."
            )

    def _check_channels(self) -> None:
        both = f"in_channels={self.in_channels} and out_channels={self.out_channels}"
        if self.lambda_idt > 0:
            raise UserError(
                f"lambda_idt={self.lambda_idt} compares images of A with images of B, which have {both}. Use lambda_idt=0."
            )
        if self.projector == "none" and 0 in self.nce_layers:
            raise UserError(
                f"projector=none compares the pixels of layer 0 themselves, which {both} make different. "
                "Use projector=mlp, or drop layer 0 from nce_layers."
            )
