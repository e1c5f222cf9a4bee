"""CUT and FastCUT: unpaired image translation with an adversarial and a patchwise contrastive loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.models import options, regularisers
from fastnce.models.channels import convert_channels
from fastnce.models.cut_config import CUTConfig
from fastnce.models.cut_networks import (
    build_discriminator,
    build_generator,
    feature_shapes,
    initialise,
)
from fastnce.models.gan import at_least_fp32, discriminator_losses, generator_loss
from fastnce.models.patch_contrast import (
    Comparison,
    PatchContrast,
    build_projector,
    check_num_patches,
    projected_dims,
)
from fastnce.models.translation import images_of_one_size, together


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
            shapes = feature_shapes(config, image_size)
            if image_size is not None:
                check_num_patches(config, shapes)
            channels = [shape[0] for shape in shapes]
            self.projector = build_projector(config, channels)
            self.contrast = PatchContrast(config, self.nce_names, projected_dims(config, channels))
        if self.projector is not None:
            networks["F"] = self.projector
        for network in networks.values():
            initialise(network, config.init_gain)
        self.optimizers = {
            letter: torch.optim.Adam(
                network.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), fused=True
            )
            for letter, network in networks.items()
        }

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
            with self._autocast():
                images, keys = self.generator(seen, taps)
            return _Translated(images, seen, count, flip, [key.detach()[:compared] for key in keys])
        with self._autocast():
            images = self.generator(seen)
        if not self.nce_names:
            return _Translated(images, seen, count, flip, [])
        with self._autocast(), torch.no_grad():
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
            penalties["D_r1"] = 0.5 * config.lambda_r1 * regularisers.r1(real_logits, real)
        if config.gan_mode == "wgangp":
            penalty = regularisers.gradient_penalty(self._judge, real, fake)
            penalties["D_gp"] = 0.5 * config.lambda_gp * penalty
        self._descend(sum(penalties.values(), 0.5 * (real_loss + fake_loss)), "D")
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
        self._descend(total, *("G" if self.projector is None else "GF"))
        return {"G": total, **losses}

    def _contrastive_losses(
        self, translated: _Translated, patch_ids: Mapping[str, Sequence[Tensor]]
    ) -> dict[str, Tensor]:
        config, names = self.config, self.nce_names
        compared = translated.images[: translated.count * len(names)]
        with self._autocast():
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
        with self._autocast():
            return self.discriminator(images)

    def _descend(self, loss: Tensor, *letters: str) -> None:
        for letter in letters:
            self.optimizers[letter].zero_grad(set_to_none=True)
        loss.backward()
        for letter in letters:
            self.optimizers[letter].step()

    def _autocast(self) -> AbstractContextManager:
        # A new context each time: autocast caches the weights it casts, and a copy that was made under no_grad, or while the
        # discriminator was frozen, must not serve a pass that needs gradients.
        device = next(self.generator.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bf16")


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
