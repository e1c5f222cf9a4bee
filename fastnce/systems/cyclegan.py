"""CycleGAN: unpaired image translation in both directions, held together by translating back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastnce.errors import UserError
from fastnce.systems import options
from fastnce.systems.adversarial import generator_loss
from fastnce.systems.translation import descend, l1, together
from fastnce.systems.translation_system import DIGITS_PHOTOS
from fastnce.systems.two_way import TwoWayConfig, TwoWayModel, TwoWaySystem


@dataclass(frozen=True, kw_only=True)
class CycleGANConfig(TwoWayConfig):
    """The options of CycleGAN's networks, losses and optimisers.

    The objective's defaults are the published CycleGAN's; the networks' are CUT's, so that the two can be compared. The
    first publication's networks do not blur before downsampling: antialias=False, disc_antialias=False.
    """

    system: ClassVar[str] = "cyclegan"

    pool_size: int = 50
    """Discriminator: earlier translations to draw from; 0: those of this step only."""
    lambda_a: float = 10.0
    """Weight of the cycle A to B to A."""
    lambda_b: float = 10.0
    """Weight of the cycle B to A to B."""
    lambda_identity: float = 0.5
    """Weight, relative to the cycles', of leaving an image as it is that is in the target domain already; 0 turns it off."""

    epochs: int = 100
    """Epochs at the full learning rate."""
    decay_epochs: int = 100
    """Further epochs in which the learning rate falls linearly towards 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 0, "lambda_a", "lambda_b", "lambda_identity")
        if self.lambda_identity > 0 and self.in_channels != self.out_channels:
            raise UserError(
                f"lambda_identity={self.lambda_identity} compares images of A with images of B, which have "
                f"in_channels={self.in_channels} and out_channels={self.out_channels}. Use lambda_identity=0."
            )


class CycleGAN(TwoWayModel):
    """The networks `generators`, `discriminator_a` and `discriminator_b`, their Adam `optimizers`, and one training step.

    With G_A: A to B and G_B: B to A the generators, and D_A the judge of B and D_B of A, as the publication names them:

        G loss = l(D_A(G_A(A)), real) + l(D_B(G_B(B)), real)
                 + lambda_a |G_B(G_A(A)) - A| + lambda_b |G_A(G_B(B)) - B|
                 + lambda_identity (lambda_b |G_A(B) - B| + lambda_a |G_B(A) - A|)
        D loss = (l(D_A(B), real) + l(D_A(pool of G_A(A)), fake)) / 2 + the same for D_B

    |x| is the mean of the absolute values. First the generators are updated, then the discriminators.

    Source: Zhu et al., "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", ICCV 2017.

    Args:
        config: see `CycleGANConfig`.
        image_size: (height, width) of the training images; only discriminator=stylegan2 needs it.

    Attributes:
        optimizers: "G" for both generators, "D" for both discriminators.
    """

    def __init__(self, config: CycleGANConfig, image_size: tuple[int, int] | None = None) -> None:
        super().__init__(config, image_size)
        self.config = config

    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One update of the generators, then one of the discriminators.

        Args:
            batch: "A" and "B", (N, C, H, W) images in [-1, 1] on the device of the networks; their sizes may differ.

        Returns:
            Detached scalars, weights included: "G_A", "G_B", "cycle_A", "cycle_B", "idt_A" and "idt_B" (unless
            `lambda_identity` is 0), "G", "D_A", "D_B".
        """
        real_a, real_b = batch["A"], batch["B"]
        losses, fake_a, fake_b = self._update_generators(real_a, real_b)
        losses |= self._update_discriminators(real_a, real_b, fake_a, fake_b)
        return {name: loss.detach() for name, loss in losses.items()}

    def _update_generators(
        self, real_a: Tensor, real_b: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        config = self.config
        a_to_b, b_to_a = self.generators.a_to_b, self.generators.b_to_a
        with self._autocast():
            if config.lambda_identity > 0:
                fake_b, same_b = together(a_to_b, real_a, real_b)
                fake_a, same_a = together(b_to_a, real_b, real_a)
            else:
                fake_b, fake_a = a_to_b(real_a), b_to_a(real_b)
            again_a, again_b = b_to_a(fake_b), a_to_b(fake_a)
        logits_a, logits_b = self._judge(fake_a, fake_b)
        losses = {
            "G_A": generator_loss(logits_a, config.gan_mode),
            "G_B": generator_loss(logits_b, config.gan_mode),
            "cycle_A": config.lambda_a * l1(again_a, real_a),
            "cycle_B": config.lambda_b * l1(again_b, real_b),
        }
        if config.lambda_identity > 0:
            losses["idt_A"] = config.lambda_identity * config.lambda_b * l1(same_b, real_b)
            losses["idt_B"] = config.lambda_identity * config.lambda_a * l1(same_a, real_a)
        losses["G"] = sum(losses.values())
        descend(losses["G"], self.optimizers["G"])
        return losses, fake_a.detach(), fake_b.detach()


class CycleGANSystem(TwoWaySystem):
    """CycleGAN in the training loop."""

    config_class = CycleGANConfig
    model_class = CycleGAN
    variants = {"cyclegan": {}}
    presets = {"digits": DIGITS_PHOTOS}
    panels = (
        ("G_A", "D_A"),
        ("G_B", "D_B"),
        ("cycle_A", "cycle_B", "idt_A", "idt_B"),
        ("G",),
    )
