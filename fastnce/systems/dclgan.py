"""DCLGAN and SimDCL: unpaired translation in both directions with a contrastive loss between two encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.networks import SimilarityHead
from fastnce.networks.layers import init_normal
from fastnce.systems import options
from fastnce.systems.adversarial import GANMode, at_least_fp32, generator_loss
from fastnce.systems.cyclegan import TwoWayConfig, TwoWayModel, TwoWaySystem, reverse
from fastnce.systems.patch_contrast import (
    Comparison,
    Negatives,
    PatchContrast,
    PatchContrastConfig,
    build_projector,
    feature_shapes,
    projected_dims,
    sample,
)
from fastnce.systems.system import autocast
from fastnce.systems.translation import descend, initialise, l1
from fastnce.systems.translation_system import DIGITS_PATCHES, DIGITS_PHOTOS

Maps = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class DCLGANConfig(PatchContrastConfig, TwoWayConfig):
    """The options of DCLGAN's networks, losses and optimisers. The defaults are the published DCLGAN."""

    system: ClassVar[str] = "dclgan"

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
        super().__post_init__()
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


class DCLGAN(TwoWayModel):
    """The networks, their Adam `optimizers`, and one training step.

    With G_A: A to B and G_B: B to A the generators, E_A and E_B their encoders, F_1 the projector behind E_A and F_2 the one
    behind E_B, and D_A the judge of B and D_B of A:

        G loss = (G_A + G_B) / 2 + (NCE1 + NCE2) / 2 + (idt_A + idt_B) / 2 + sim_A + sim_B
        G_A = lambda_gan l(D_A(G_A(A)), real)                          G_B likewise
        NCE1 = lambda_nce * mean over layers of patch_nce(F_2(E_B(G_A(A))), F_1(E_A(A)) without gradient)
        NCE2 = lambda_nce * mean over layers of patch_nce(F_1(E_A(G_B(B))), F_2(E_B(B)) without gradient)
        idt_A = lambda_idt |G_A(B) - B|                                idt_B = lambda_idt |G_B(A) - A|
        sim_A = lambda_sim |H_1(F_1(E_A(A))) - H_2(F_1(E_A(G_B(B))))|  sim_B likewise with F_2 E_B on B and G_A(A)
        D loss = (l(D_A(B), real) + l(D_A(G_A(A)), fake)) / 2 + the same for D_B

    |x| is the mean of the absolute values. First the discriminators are updated, then generators, projectors and heads.

    The keys E_A(A) and E_B(B) come from the forward passes that made G_A(A) and G_B(B): they are the same numbers as those of
    a second pass.

    The sim terms are SimDCL's. The heads H see the same sampled patches of real images as the contrastive loss does, and
    patches of the translations that are sampled anew; nothing is detached there.

    What the published code does otherwise than its options and the paper say is kept, as it made the published results: the
    generators' hinge loss (`generator_hinge`), another Adam for the projectors (`lr_f`), and an L1 loss asked for as a sum
    that is a mean.

    Source: Han et al., "Dual Contrastive Learning for Unsupervised Image-to-Image Translation", CVPRW 2021.

    Args:
        config: see `DCLGANConfig`.
        image_size: (height, width) of the training images. If given, `num_patches` is checked against the smallest map.

    Attributes:
        optimizers: "G" for both generators, "D" for both discriminators, "F" for projectors and heads where there are any.

    Raises:
        UserError: `nce_layers` that the generators do not have, more patches than a map has positions, or a backend that is
            not there.
    """

    def __init__(self, config: DCLGANConfig, image_size: tuple[int, int] | None = None) -> None:
        options.backend_is_there(config.backend)
        super().__init__(config, image_size)
        self.projector_a = self.projector_b = self.heads = None
        if config.lambda_nce > 0:
            self._add_contrast(image_size)

    def _add_contrast(self, image_size: tuple[int, int] | None) -> None:
        config = self.config
        channels_a, channels_b = (
            [shape[0] for shape in feature_shapes(one_way, image_size)]
            for one_way in (config, reverse(config))
        )
        self.projector_a = build_projector(config, channels_a)
        self.projector_b = build_projector(config, channels_b)
        dims = projected_dims(config, channels_a)
        self.contrast = PatchContrast(config, ("NCE1", "NCE2"), dims)
        networks = [n for n in (self.projector_a, self.projector_b) if n is not None]
        for network in networks:
            initialise(network, config.init_gain)
        if config.lambda_sim > 0:
            names = ("real_a", "fake_a", "real_b", "fake_b")
            self.heads = nn.ModuleDict({name: SimilarityHead(len(channels_a)) for name in names})
            if config.init_gain is not None:
                init_normal(self.heads, config.init_gain)
            networks.append(self.heads)
        if networks:
            self.optimizers["F"] = torch.optim.Adam(
                [parameter for network in networks for parameter in network.parameters()],
                lr=config.lr_f,
                betas=(config.beta1_f, config.beta2_f),
                fused=True,
            )

    def training_step(
        self,
        batch: Mapping[str, Tensor],
        *,
        patch_ids: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """One update of the discriminators, then one of the other networks.

        Args:
            batch: "A" and "B", (N, C, H, W) images in [-1, 1] on the device of the networks; their sizes may differ, unless
                `num_patches` is 0.
            patch_ids: positions for "NCE1", "NCE2" and, for SimDCL, "fake_A" and "fake_B", one (S,) int64 tensor per layer;
                by default drawn.

        Returns:
            Detached scalars, weights included: "D_A", "D_B", "G_A", "G_B", "G", and as far as they are part of the loss "NCE1",
            "NCE2", "idt_A", "idt_B", "sim_A", "sim_B".
        """
        real_a, real_b = batch["A"], batch["B"]
        translated_a, keys_a = self._translate(self.generators.a_to_b, real_a, real_b)
        translated_b, keys_b = self._translate(self.generators.b_to_a, real_b, real_a)
        fake_b, fake_a = translated_a[0], translated_b[0]
        losses = self._update_discriminators(real_a, real_b, fake_a.detach(), fake_b.detach())

        logits_a, logits_b = self._judge(fake_a, fake_b)
        terms = {"G_A": self._adversarial(logits_a), "G_B": self._adversarial(logits_b)}
        if self.config.lambda_idt > 0:
            terms["idt_A"] = self.config.lambda_idt * l1(translated_a[1], real_b)
            terms["idt_B"] = self.config.lambda_idt * l1(translated_b[1], real_a)
        similarity: dict[str, Tensor] = {}
        if self.config.lambda_nce > 0:
            contrastive, similarity = self._patch_losses(
                (keys_a, keys_b), fake_a, fake_b, dict(patch_ids or {})
            )
            terms |= contrastive
        total = 0.5 * sum(terms.values()) + sum(similarity.values())
        descend(total, *(o for name, o in self.optimizers.items() if name != "D"))
        losses |= {"G": total} | terms | similarity
        return {name: loss.detach() for name, loss in losses.items()}

    def _translate(
        self, generator: nn.Module, source: Tensor, target: Tensor
    ) -> tuple[tuple[Tensor, ...], Maps]:
        """The generator's translation of `source` (and, for the identity loss, of `target`), and `source`'s features."""
        config = self.config
        taps = config.nce_layers if config.lambda_nce > 0 else None
        with autocast(self):
            if config.lambda_idt == 0:
                outputs = [generator(source, taps)]
            elif source.shape == target.shape:
                # One batch for both: instance norm keeps the images apart.
                outputs = [generator(torch.cat([source, target]), taps)]
            else:
                outputs = [generator(source, taps), generator(target)]
        if taps is None:
            return tuple(part for x in outputs for part in x.split(len(source))), []
        translated, maps = outputs[0]
        keys = [x[: len(source)] for x in maps]
        if self.heads is None:
            keys = [key.detach() for key in keys]
        return (*translated.split(len(source)), *outputs[1:]), keys

    def _patch_losses(
        self,
        keys: tuple[Maps, Maps],
        fake_a: Tensor,
        fake_b: Tensor,
        patch_ids: dict[str, Sequence[Tensor]],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The contrastive terms, and SimDCL's."""
        config, (keys_a, keys_b) = self.config, keys
        similarity: dict[str, Tensor] = {}
        with autocast(self):
            queries_a = self.generators.a_to_b.encode(fake_a, config.nce_layers)
            queries_b = self.generators.b_to_a.encode(fake_b, config.nce_layers)
            if self.heads is not None:
                similarity, drawn = self._similarity(
                    keys_a, keys_b, queries_a, queries_b, patch_ids
                )
                patch_ids = patch_ids | drawn
            a, b = self.projector_a, self.projector_b
            comparisons = {
                "NCE1": Comparison(queries_b, [key.detach() for key in keys_a], b, a),
                "NCE2": Comparison(queries_a, [key.detach() for key in keys_b], a, b),
            }
            contrastive = self.contrast(comparisons, patch_ids)
        return {name: config.lambda_nce * x for name, x in contrastive.items()}, similarity

    def _similarity(
        self,
        real_a: Maps,
        real_b: Maps,
        fake_a: Maps,
        fake_b: Maps,
        patch_ids: Mapping[str, Sequence[Tensor]],
    ) -> tuple[dict[str, Tensor], dict[str, Sequence[Tensor]]]:
        """SimDCL's terms, and the positions in real images, which the contrastive loss shall use too."""
        vectors, ids = {}, {}
        for head, name, maps, projector in (
            ("real_a", "NCE1", real_a, self.projector_a),
            ("real_b", "NCE2", real_b, self.projector_b),
            ("fake_a", "fake_A", fake_a, self.projector_a),
            ("fake_b", "fake_B", fake_b, self.projector_b),
        ):
            patches, ids[name] = sample(self.config, maps, patch_ids.get(name))
            vectors[head] = self.heads[head](torch.stack(projector(patches), dim=1))
        weight = self.config.lambda_sim
        terms = {
            "sim_A": weight * l1(vectors["real_a"], vectors["fake_a"]),
            "sim_B": weight * l1(vectors["real_b"], vectors["fake_b"]),
        }
        return terms, {name: ids[name] for name in ("NCE1", "NCE2")}

    def _adversarial(self, logits: Tensor) -> Tensor:
        config = self.config
        if config.gan_mode == "hinge" and config.generator_hinge == "margin":
            return config.lambda_gan * F.relu(1 - at_least_fp32(logits)).mean()
        return config.lambda_gan * generator_loss(logits, config.gan_mode)


class DCLGANSystem(TwoWaySystem):
    """DCLGAN in the training loop."""

    config_class = DCLGANConfig
    model_class = DCLGAN
    variants = {
        "dclgan": {},
        "simdcl": {
            "lambda_sim": 10.0,
            "lr_f": 2e-4,
            "beta1_f": 0.5,
            "epochs": 100,
            "decay_epochs": 100,
        },
    }
    presets = {"digits": DIGITS_PHOTOS | DIGITS_PATCHES}
    panels = (
        ("G_A", "D_A"),
        ("G_B", "D_B"),
        ("NCE1", "NCE2"),
        ("idt_A", "idt_B", "sim_A", "sim_B"),
        ("G",),
    )
    published = TwoWaySystem.published | {"F1": "projector_a", "F2": "projector_b"}
    compared = (("a_to_b", "projector_a", "in_channels"), ("b_to_a", "projector_b", "out_channels"))

    def sizes(self, config: DCLGANConfig, model: DCLGAN) -> dict[str, str | None]:
        sizes = super().sizes(config, model)
        if config.lambda_nce > 0:
            sizes["compared"] = "AB"
            if config.num_patches == 0:
                sizes["one_size"] = "num_patches=0 compares all positions of A and B at once"
        return sizes
