"""CycleGAN, unpaired image translation in both directions; and what DCLGAN, the other such system, shares with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.systems import options
from fastnce.systems.adversarial import GANMode, discriminator_losses, generator_loss
from fastnce.systems.system import Rows, autocast
from fastnce.systems.translation import (
    TranslationConfig,
    UnpairedConfig,
    adam,
    build_discriminator,
    build_generator,
    descend,
    initialise,
    l1,
    together,
)
from fastnce.systems.translation_system import (
    DIGITS_PHOTOS,
    TranslationSystem,
    first_test_images,
    translated,
)

if TYPE_CHECKING:
    from fastnce.data import UnpairedImages


@dataclass(frozen=True, kw_only=True)
class TwoWayConfig(UnpairedConfig):
    """The options that CycleGAN and DCLGAN share."""

    gan_mode: GANMode = "lsgan"
    """Adversarial objective."""
    pool_size: int = 0
    """Discriminator: earlier translations to draw from (see `ImagePool`); 0: those of this step only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 0, "pool_size")


class ImagePool(nn.Module):
    """Keeps up to `size` images and gives, for each new one, with probability 1/2 an older one in its place.

    Until the pool is full every image is kept and given back as it came. Then, for each image, either the image itself is
    given back and not kept, or a random older one is, whose place the new one takes.

    The images are part of the state dict (as extra state, for their number and sizes change), and choices are drawn from
    torch's default generator, whose state a checkpoint of the training holds: a continued run makes the same ones. In several
    processes each has a pool of its own, and the checkpoint all of them.

    Source: Shrivastava et al., "Learning from Simulated and Unsupervised Images through Adversarial Training", CVPR 2017;
    with single images as in CycleGAN (Zhu et al., ICCV 2017).

    Args:
        size: images to keep; 0 gives every image back as it came.

    Examples:
        >>> pool = ImagePool(1)
        >>> first, second = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
        >>> pool(first).mean().item(), len(pool.images)
        (0.0, 1)
        >>> bool(pool(second).mean().item() in (0.0, 1.0))
        True
    """

    differs_by_rank = True  # see `fastnce.training.loop`

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.images: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        """For `images` (N, C, H, W), of one size in all calls, as many old and new ones; without gradient."""
        if self.size == 0:
            return images.detach()
        return torch.stack([self._exchange(image) for image in images.detach()])

    def _exchange(self, image: Tensor) -> Tensor:
        if len(self.images) < self.size:
            self.images.append(image.clone())
            return image
        if torch.rand(()).item() < 0.5:
            return image
        place = int(torch.randint(self.size, ()))
        old, self.images[place] = self.images[place], image.clone()
        return old.to(image)  # after loading a checkpoint it is still on the CPU

    def get_extra_state(self) -> list[Tensor]:
        """The images, for the state dict, on the CPU."""
        return [image.cpu() for image in self.images]

    def set_extra_state(self, state: list[Tensor]) -> None:
        """Takes the images from a state dict."""
        self.images = list(state)


class TwoWayGenerators(nn.Module):
    """The generators of both directions, the published G_A and G_B, as one network; called, it translates A to B.

    Examples:
        >>> import torch
        >>> generators = TwoWayGenerators(TwoWayConfig(base_channels=4, num_blocks=1, out_channels=1))
        >>> images = torch.zeros(2, 3, 16, 16)
        >>> generators(images).shape, generators.b_to_a(generators(images)).shape
        (torch.Size([2, 1, 16, 16]), torch.Size([2, 3, 16, 16]))
    """

    def __init__(self, config: TwoWayConfig) -> None:
        super().__init__()
        self.a_to_b = build_generator(config)
        self.b_to_a = build_generator(reverse(config))

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, in_channels, H, W) of A, translated to B."""
        return self.a_to_b(x)


class TwoWayModel(nn.Module):
    """Base of CycleGAN and DCLGAN: `generators`, `discriminator_a`, `discriminator_b`, their Adam `optimizers` and pools.

    As published, D_A judges images of B, the translations of G_A, and D_B judges images of A.
    """

    def __init__(self, config: TwoWayConfig, image_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.generators = TwoWayGenerators(config)
        self.discriminator_a = build_discriminator(config, image_size)
        self.discriminator_b = build_discriminator(reverse(config), image_size)
        self.pool_a, self.pool_b = ImagePool(config.pool_size), ImagePool(config.pool_size)
        self.config = config
        discriminators = (self.discriminator_a, self.discriminator_b)
        for network in (self.generators, *discriminators):
            initialise(network, config.init_gain)
        self.optimizers = {"G": adam(config, self.generators), "D": adam(config, *discriminators)}

    def _update_discriminators(
        self, real_a: Tensor, real_b: Tensor, fake_a: Tensor, fake_b: Tensor
    ) -> dict[str, Tensor]:
        """One step of both; their losses "D_A" and "D_B", each the mean of the terms on real and on translated images."""
        losses = {
            "D_A": self._discriminator_loss(self.discriminator_a, real_b, self.pool_a(fake_b)),
            "D_B": self._discriminator_loss(self.discriminator_b, real_a, self.pool_b(fake_a)),
        }
        descend(losses["D_A"] + losses["D_B"], self.optimizers["D"])
        return losses

    def _discriminator_loss(self, discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        discriminator.requires_grad_(True)
        with autocast(self):
            real_logits, fake_logits = together(discriminator, real, fake.to(real))
        mode = self.config.gan_mode
        real_loss, fake_loss = discriminator_losses(real_logits, fake_logits, mode)
        return 0.5 * (real_loss + fake_loss)

    def _judge(self, fake_a: Tensor, fake_b: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the frozen discriminators: D_A on `fake_b` and D_B on `fake_a`."""
        self.discriminator_a.requires_grad_(False)
        self.discriminator_b.requires_grad_(False)
        with autocast(self):
            return self.discriminator_a(fake_b), self.discriminator_b(fake_a)


def reverse(config: TwoWayConfig) -> TwoWayConfig:
    """The options of the networks from B to A."""
    return replace(config, in_channels=config.out_channels, out_channels=config.in_channels)


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
        with autocast(self):
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


class TwoWaySystem(TranslationSystem):
    """A system whose network translates in both directions."""

    network = TwoWayGenerators
    network_name = "generators"
    next_command = TranslationSystem.next_command + " --direction BtoA"
    published = {
        "G_A": "generators.a_to_b",
        "G_B": "generators.b_to_a",
        "D_A": "discriminator_a",
        "D_B": "discriminator_b",
    }
    seeing = {
        "generator from A to B": "generators.a_to_b",
        "generator from B to A": "generators.b_to_a",
        "discriminator of A": "discriminator_b",
        "discriminator of B": "discriminator_a",
    }

    def preview(
        self, config: TranslationConfig, dataset: UnpairedImages
    ) -> Callable[[nn.Module], Rows]:
        images_a, images_b = (first_test_images(config, domain) for domain in "AB")

        def rows(generators: nn.Module) -> Rows:
            return {
                "A": images_a,
                "A to B": translated(generators.a_to_b, images_a),
                "B": images_b,
                "B to A": translated(generators.b_to_a, images_b),
            }

        return rows


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
