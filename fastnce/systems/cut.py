"""CUT, FastCUT and SinCUT: unpaired image translation with an adversarial and a patchwise contrastive loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.systems import options
from fastnce.systems.adversarial import (
    CriticOrGANMode,
    at_least_fp32,
    discriminator_losses,
    generator_loss,
    gradient_penalty,
    r1,
)
from fastnce.systems.patch_contrast import (
    Comparison,
    PatchContrast,
    PatchContrastConfig,
    build_projector,
    feature_shapes,
    projected_dims,
)
from fastnce.systems.system import Ablation, autocast
from fastnce.systems.translation import (
    UnpairedConfig,
    adam,
    build_discriminator,
    build_generator,
    can_convert,
    convert_channels,
    descend,
    images_of_one_size,
    initialise,
    together,
)
from fastnce.systems.translation_system import (
    DIGITS_PATCHES,
    DIGITS_PHOTOS,
    TranslationSystem,
)

if TYPE_CHECKING:
    from fastnce.data import SingleImagePatches, UnpairedImages


@dataclass(frozen=True, kw_only=True)
class CUTConfig(PatchContrastConfig, UnpairedConfig):
    """The options of CUT's networks, losses and optimisers. The defaults are the published CUT."""

    system: ClassVar[str] = "cut"

    gan_mode: CriticOrGANMode = "lsgan"
    """Adversarial objective."""
    lambda_gp: float = 10.0
    """Weight of the gradient penalty of wgangp, relative to the critic's loss."""
    lambda_r1: float = 0.0
    """Weight of R1, the penalty on the discriminator's gradient at real images; 0 turns it off."""
    lambda_gan: float = 1.0
    """Weight of the generator's adversarial loss."""
    lambda_nce: float = 1.0
    """Weight of the contrastive loss; 0 turns it off, together with everything it needs."""
    nce_idt: bool = True
    """Add the contrastive loss between images of B and their translation (the identity loss of CUT)."""
    lambda_identity: float = 0.0
    """Weight of the L1 distance between images of B and their translation; 0 turns it off."""
    flip_equivariance: bool = False
    """FastCUT: mirror the generator's input in half of the steps and its features back."""
    reuse_features: bool = True
    """Take the keys from the generator's own forward pass (exact) instead of encoding the input again."""

    dataset: Literal["folders", "single-image"] = "folders"
    """single-image: train on patches of crop_size of the one image in trainA and the one in trainB, at random zooms, whatever load_size and preprocess say."""
    max_zoom_out: float = 3.0
    """single-image: by how much the image is shrunk at most before a patch is cut out of it."""
    epoch_samples: int = 100_000
    """single-image: patches in an epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 0, "lambda_gan", "lambda_nce", "lambda_r1", "lambda_identity")
        options.above_zero(self, "lambda_gp")
        self._check_channels()
        options.at_least(self, 1, "max_zoom_out", "epoch_samples")

    def _check_channels(self) -> None:
        if self.in_channels == self.out_channels:
            return
        both = f"in_channels={self.in_channels} and out_channels={self.out_channels}"
        if self.lambda_identity > 0:
            raise UserError(
                f"lambda_identity={self.lambda_identity} compares images of B with their translations, which {both} make "
                "different. Use lambda_identity=0."
            )
        if self.lambda_nce > 0 and not can_convert(self.in_channels, self.out_channels):
            raise UserError(
                f"{both}: the contrastive loss encodes translations like images of A, and only grey (1) and RGB (3) turn into "
                "each other. Use the same number of channels, or lambda_nce=0."
            )


class CUT(nn.Module):
    """The networks `generator`, `discriminator` and `projector`, their Adam `optimizers`, and one training step.

    With G the generator, D the discriminator, F the projector and E the generator's encoder:

        D loss = (l(D(B), real) + l(D(G(A)), fake)) / 2
                 + lambda_r1 / 2 r1(D, B)                                                 with R1
                 + lambda_gp / 2 gradient_penalty(D, B, G(A))                             with `gan_mode` wgangp
        G loss = lambda_gan l(D(G(A)), real)
                 + NCE(A, G(A))                                                           without `nce_idt`
                 + (NCE(A, G(A)) + NCE_Y(B, G(B))) / 2                                    with `nce_idt`
                 + lambda_identity mean |G(B) - B|
        NCE(x, y) = lambda_nce * mean over layers of patch_nce(F(E(y)), F(E(x)) without gradient)

    The features E(x) come from the forward pass that made y = G(x): E is the first part of G, and G does not change in
    between, so they are the same numbers as those of a second pass. Only in FastCUT's mirrored steps, where G saw the
    mirrored x, they are computed anew.

    The published code divides a patch by its norm plus 1e-7; `patch_nce` divides by the norm. In the first step from the
    published initialisation, when projected patches are that short, this is a difference of 1.4 % in NCE; from the second on
    there is none. `norm_floor=1e-7` does as the published code, for a few more operations.

    Where A and B differ in channels, E, which sees images like A, gets images like B through `convert_channels`.

    Source: Park et al., "Contrastive Learning for Unpaired Image-to-Image Translation", ECCV 2020.

    Args:
        config: see `CUTConfig`.
        image_size: (height, width) of the training images. If given, `num_patches` is checked against the smallest map;
            a stylegan2 discriminator must have it.

    Attributes:
        optimizers: by the letter of the network: "G", "D" and, where there is a projector, "F".

    Raises:
        UserError: `nce_layers` that this generator does not have, more patches than a map has positions, a backend that is
            not there, or a size that the discriminator cannot have.
    """

    def __init__(self, config: CUTConfig, image_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        options.backend_is_there(config.backend)
        self.config = config
        self.nce_names = ("NCE", "NCE_Y") if config.nce_idt else ("NCE",)
        if config.lambda_nce == 0:
            self.nce_names = ()
        self.translates_b = "NCE_Y" in self.nce_names or config.lambda_identity > 0
        self.generator = build_generator(config)
        self.discriminator = build_discriminator(config, image_size)
        networks = {"G": self.generator, "D": self.discriminator}
        self.projector = None
        if self.nce_names:
            channels = [shape[0] for shape in feature_shapes(config, image_size)]
            self.projector = build_projector(config, channels)
            self.contrast = PatchContrast(config, self.nce_names, projected_dims(config, channels))
        if self.projector is not None:
            networks["F"] = self.projector
        for network in networks.values():
            initialise(network, config.init_gain)
        self.optimizers = {letter: adam(config, network) for letter, network in networks.items()}

    def training_step(
        self,
        batch: Mapping[str, Tensor],
        *,
        flip: bool | None = None,
        patch_ids: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """One update of D, then one of G and F.

        Args:
            batch: "A" (N, in_channels, H, W) and "B" (N, out_channels, H, W), in [-1, 1] on the device of the networks. Sizes of A
                and B may differ where G translates A alone: without `nce_idt` and `lambda_identity`.
            flip: whether this step mirrors G's input; by default drawn with probability 1/2 if `flip_equivariance`.
            patch_ids: positions for "NCE" (and "NCE_Y"), one (S,) int64 tensor per layer; by default drawn.

        Returns:
            Detached scalars: "G_GAN", "D_real", "D_fake", "G", and "NCE", "NCE_Y", "idt", "D_r1" and "D_gp" where they are
            part of a loss. Weights are included.

        Raises:
            UserError: G translates both, and A and B differ in number, height or width.
        """
        if flip is None:
            flip = self.config.flip_equivariance and torch.rand(()).item() < 0.5
        real_a, real_b = batch["A"], batch["B"]
        source = real_a
        if self.translates_b:
            images_of_one_size(batch)
            source = torch.cat([real_a, convert_channels(real_b, self.config.in_channels)])
        translated = self._translate(source, len(real_a), flip)
        losses = self._update_discriminator(real_b, translated.fake_b.detach())
        losses |= self._update_generator(translated, patch_ids or {})
        return {name: loss.detach() for name, loss in losses.items()}

    def _translate(self, source: Tensor, count: int, flip: bool) -> _Translated:
        """G(source), mirrored first if `flip`, and the features of the unmirrored source, without gradient."""
        taps = self.config.nce_layers
        seen = source.flip(3) if flip else source
        compared = count * len(self.nce_names)
        if self.nce_names and self.config.reuse_features and not flip:
            with autocast(self):
                images, keys = self.generator(seen, taps)
            return _Translated(images, seen, count, flip, [key.detach()[:compared] for key in keys])
        with autocast(self):
            images = self.generator(seen)
        if not self.nce_names:
            return _Translated(images, seen, count, flip, [])
        with autocast(self), torch.no_grad():
            keys = self.generator.encode(source[:compared], taps)
        return _Translated(images, seen, count, flip, keys)

    def _update_discriminator(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        config = self.config
        self.discriminator.requires_grad_(True)
        if config.lambda_r1 > 0:
            # Apart: the penalty's derivatives concern the real images only.
            real = real.detach().requires_grad_()
            real_logits, fake_logits = self._judge(real), self._judge(fake)
        else:
            real_logits, fake_logits = together(self._judge, real, fake)
        real_loss, fake_loss = discriminator_losses(real_logits, fake_logits, config.gan_mode)
        penalties = {}
        if config.lambda_r1 > 0:
            penalties["D_r1"] = 0.5 * config.lambda_r1 * r1(real_logits, real)
        if config.gan_mode == "wgangp":
            penalty = gradient_penalty(self._judge, real, fake)
            penalties["D_gp"] = 0.5 * config.lambda_gp * penalty
        descend(sum(penalties.values(), 0.5 * (real_loss + fake_loss)), self.optimizers["D"])
        return {"D_real": real_loss, "D_fake": fake_loss, **penalties}

    def _update_generator(
        self, translated: _Translated, patch_ids: Mapping[str, Sequence[Tensor]]
    ) -> dict[str, Tensor]:
        config = self.config
        self.discriminator.requires_grad_(False)
        logits = self._judge(translated.fake_b)
        losses = {"G_GAN": config.lambda_gan * generator_loss(logits, config.gan_mode)}
        total = losses["G_GAN"]
        if self.nce_names:
            contrastive = self._contrastive_losses(translated, patch_ids)
            losses |= contrastive
            total = total + sum(contrastive.values()) / len(contrastive)
        if config.lambda_identity > 0:
            pair = (at_least_fp32(images[translated.count :]) for images in translated[:2])
            losses["idt"] = config.lambda_identity * F.l1_loss(*pair)
            total = total + losses["idt"]
        descend(total, *(o for letter, o in self.optimizers.items() if letter != "D"))
        return {"G": total, **losses}

    def _contrastive_losses(
        self, translated: _Translated, patch_ids: Mapping[str, Sequence[Tensor]]
    ) -> dict[str, Tensor]:
        config, names = self.config, self.nce_names
        compared = translated.images[: translated.count * len(names)]
        with autocast(self):
            queries = self.generator.encode(
                convert_channels(compared, config.in_channels), config.nce_layers
            )
            if translated.flip:
                queries = [query.flip(3) for query in queries]
            maps = zip(
                _split(queries, len(names)), _split(translated.keys, len(names)), strict=True
            )
            comparisons = {
                name: Comparison(*pair, self.projector, self.projector)
                for name, pair in zip(names, maps, strict=True)
            }
            losses = self.contrast(comparisons, patch_ids)
        return {name: config.lambda_nce * loss for name, loss in losses.items()}

    def _judge(self, images: Tensor) -> Tensor:
        with autocast(self):
            return self.discriminator(images)


class _Translated(NamedTuple):
    """G's output for the `count` images of A and, where a loss needs them, as many of B."""

    images: Tensor
    seen: Tensor  # what G saw, mirrored if `flip`
    count: int
    flip: bool
    keys: list[Tensor]  # the features of what the contrastive losses compare, not mirrored

    @property
    def fake_b(self) -> Tensor:
        return self.images[: self.count]


def _split(maps: list[Tensor], parts: int) -> list[list[Tensor]]:
    """Cuts every map's batch into `parts` equal parts: `result[part][layer]`."""
    return [list(layers) for layers in zip(*(x.chunk(parts) for x in maps), strict=True)]


class CUTSystem(TranslationSystem):
    """CUT in the training loop."""

    config_class = CUTConfig
    model_class = CUT
    network = staticmethod(build_generator)
    variants = {
        "cut": {},
        "fastcut": {
            "nce_idt": False,
            "lambda_nce": 10.0,
            "flip_equivariance": True,
            "epochs": 150,
            "decay_epochs": 50,
        },
        # One image of each domain. Widths of the published ngf=10 and ndf=8 at crops of 64 pixels; the image is translated whole.
        "sincut": {
            "generator": "stylegan2",
            "base_channels": 80,
            "num_blocks": 6,
            "discriminator": "stylegan2",
            "disc_channels": 32,
            "gan_mode": "nonsaturating",
            "lambda_r1": 1.0,
            "lambda_identity": 1.0,
            "lambda_nce": 4.0,
            "nce_layers": (0, 2, 4),
            "num_patches": 1,
            "negatives": "batch",
            "lr": 2e-3,
            "beta1": 0.0,
            "beta2": 0.99,
            "batch_size": 16,
            "dataset": "single-image",
            "crop_size": 64,
            "preprocess": "none",
            "epochs": 8,
            "decay_epochs": 8,
        },
    }
    presets = {
        # The demo: about two minutes on two CPU cores.
        "digits": DIGITS_PHOTOS | DIGITS_PATCHES,
        # SinCUT on two photographs of `fastnce data single-photos`, about four minutes on one CPU core.
        "single-photos": {
            "base_channels": 16,
            "num_blocks": 4,
            "disc_channels": 16,
            "num_patches": 16,
            "crop_size": 32,
            "batch_size": 8,
            "ema_decay": 0.99,
            "workers": 0,
            "steps": 1500,
            "log_every": 50,
            "sample_every": 250,
            "checkpoint_every": 250,
        },
    }
    ablations = {
        "cut": Ablation(
            choices={
                "CUT": {},
                "contrastive loss off": {"lambda_nce": 0.0},
                "identity loss off": {"nce_idt": False},
                "16 patches": {"num_patches": 16},
                "4 patches": {"num_patches": 4},
                "last layer only": {"nce_layers": (15,)},
                "negatives of the whole batch": {"negatives": "batch"},
                "negatives of earlier images": {"negatives": "queue"},
                "negatives of the image and earlier ones": {"negatives": "image+queue"},
                "FastCUT": {"nce_idt": False, "lambda_nce": 10.0, "flip_equivariance": True},
            },
            measures={
                "content_accuracy": ("content accuracy", ".3f"),
                "fid_share": ("FID, share of untranslated", ".4f"),
            },
            row="translated",
        )
    }
    panels = (("G_GAN", "D_real", "D_fake", "D_r1"), ("NCE", "NCE_Y", "idt"), ("G",))
    published = {"G": "generator", "D": "discriminator", "F": "projector"}
    compared = (("", "projector", "in_channels"),)

    def dataset(self, config: CUTConfig) -> UnpairedImages | SingleImagePatches:
        if config.dataset == "folders":
            return super().dataset(config)
        from fastnce.data import SingleImagePatches

        return SingleImagePatches(
            config.folders,
            crop_size=config.crop_size,
            max_zoom_out=config.max_zoom_out,
            flip=config.flip,
            channels_a=config.in_channels,
            channels_b=config.out_channels,
            bits=config.bits,
            value_range=config.value_range,
            direction=config.direction,
            epoch_samples=config.epoch_samples,
            seed=config.seed,
            broken_files=config.broken_files,
        )

    def sizes(self, config: CUTConfig, model: CUT) -> dict[str, str | None]:
        one_size = super().sizes(config, model)["one_size"]
        if config.gan_mode == "wgangp":
            one_size = "gan_mode=wgangp mixes real and translated images"
        if model.translates_b:
            one_size = "nce_idt and lambda_identity translate images of A and B in one batch"
        return {"one_size": one_size, "compared": "A" if model.nce_names else ""}
