"""CUT and FastCUT: unpaired image translation with an adversarial and a patchwise contrastive loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

import fastnce
from fastnce.errors import UserError
from fastnce.models import options
from fastnce.models.gan import GANMode, discriminator_losses, generator_loss
from fastnce.networks import PatchDiscriminator, PatchProjector, ResnetGenerator
from fastnce.networks.layers import init_default, init_xavier


@dataclass(frozen=True, kw_only=True)
class CUTConfig:
    """What defines CUT's networks, losses and optimisers. The defaults are the published CUT."""

    channels: int = 3
    """Channels of the images of both domains: 3 for RGB, 1 for grey."""
    base_channels: int = 64
    """Generator: channels after the first layer."""
    num_blocks: int = 9
    """Generator: residual blocks."""
    antialias: bool = True
    """Generator: blur before downsampling."""
    disc_antialias: bool = True
    """Discriminator: blur before downsampling; with it off, strided convolutions."""
    disc_channels: int = 64
    """Discriminator: channels of the first layer."""
    disc_layers: int = 3
    """Discriminator: downsampling layers."""
    disc_norm: Literal["instance", "none"] = "instance"
    """Discriminator: normalisation."""
    init_gain: float | None = 0.02
    """Gain of the Xavier initialisation of all networks; None: PyTorch's own initialisation, with which short runs start faster."""
    gan_mode: GANMode = "lsgan"
    """Adversarial objective."""
    lambda_gan: float = 1.0
    """Weight of the generator's adversarial loss."""
    lambda_nce: float = 1.0
    """Weight of the contrastive loss; 0 turns it off, together with everything it needs."""
    nce_idt: bool = True
    """Add the contrastive loss between images of B and their translation (the identity loss of CUT)."""
    nce_layers: tuple[int, ...] = (0, 4, 8, 12, 16)
    """Generator layers whose features are compared; 0 is the padded image itself."""
    num_patches: int = 256
    """Patches per image and layer."""
    temperature: float = 0.07
    """Temperature of the contrastive loss."""
    negatives: Literal["image", "batch"] = "image"
    """Negatives from the same image only, or from all images of the batch."""
    projection_dim: int = 256
    """Width of the projected patches."""
    flip_equivariance: bool = False
    """FastCUT: mirror the generator's input in half of the steps and its features back."""
    lr: float = 2e-4
    """Adam: learning rate of all networks."""
    beta1: float = 0.5
    """Adam: decay of the mean gradient."""
    beta2: float = 0.999
    """Adam: decay of the squared gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: networks run under autocast; parameters and losses stay fp32."""
    backend: str | None = None
    """Backend of the contrastive ops; by default the fastest that runs here."""
    reuse_features: bool = True
    """Take the keys from the generator's own forward pass (exact) instead of encoding the input again."""

    def __post_init__(self) -> None:
        options.at_least(self, 1, "channels", "base_channels", "num_blocks", "disc_channels")
        options.at_least(self, 1, "disc_layers", "num_patches", "projection_dim")
        options.at_least(self, 0, "lambda_gan", "lambda_nce")
        options.above_zero(self, "temperature", "lr")
        if self.init_gain is not None:
            options.above_zero(self, "init_gain")
        options.in_unit_interval(self, "beta1", "beta2")
        options.one_of(self, "gan_mode", get_args(GANMode))
        options.one_of(self, "disc_norm", ("instance", "none"))
        options.one_of(self, "negatives", ("image", "batch"))
        options.one_of(self, "precision", ("fp32", "bf16"))


def build_generator(config: CUTConfig) -> ResnetGenerator:
    """The generator that `config` describes, freshly initialised."""
    return ResnetGenerator(
        config.channels, config.channels, config.base_channels, config.num_blocks, config.antialias
    )


class CUT(nn.Module):
    """The networks `generator`, `discriminator` and `projector`, their Adam `optimizers`, and one training step.

    With G the generator, D the discriminator, F the projector and E the generator's encoder:

        D loss = (l(D(B), real) + l(D(G(A)), fake)) / 2
        G loss = lambda_gan l(D(G(A)), real) + NCE(A, G(A))                               without `nce_idt`
        G loss = lambda_gan l(D(G(A)), real) + (NCE(A, G(A)) + NCE_Y(B, G(B))) / 2        with `nce_idt`
        NCE(x, y) = lambda_nce * mean over layers of patch_nce(F(E(y)), F(E(x)) without gradient)

    The features E(x) come from the forward pass that made y = G(x): E is the first part of G, and G does not change in
    between, so they are the same numbers as those of a second pass. Only in FastCUT's mirrored steps, where G saw the
    mirrored x, they are computed anew.

    The published code divides a patch by its norm plus 1e-7; `patch_nce` divides by the norm. The difference is largest
    at the start, when projected patches are short, and vanishes as they grow.

    Source: Park et al., "Contrastive Learning for Unpaired Image-to-Image Translation", ECCV 2020.

    Args:
        config: see `CUTConfig`.
        image_size: (height, width) of the training images. If given, `num_patches` is checked against the smallest map.

    Attributes:
        optimizers: by the letter of the network: "G", "D" and, unless `lambda_nce` is 0, "F".

    Raises:
        UserError: `nce_layers` that this generator does not have, more patches than a map has positions, or a backend that
            is not there.
    """

    def __init__(self, config: CUTConfig, image_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        options.backend_is_there(config.backend)
        self.config = config
        self.uses_nce = config.lambda_nce > 0
        self.uses_identity = self.uses_nce and config.nce_idt
        self.generator = build_generator(config)
        self.discriminator = PatchDiscriminator(
            config.channels,
            config.disc_channels,
            config.disc_layers,
            antialias=config.disc_antialias,
            norm=config.disc_norm,
        )
        self.projector = None
        if self.uses_nce:
            shapes = _tap_shapes(config, image_size or (256, 256))
            if image_size is not None:
                _check_num_patches(config, shapes)
            self.projector = PatchProjector([shape[0] for shape in shapes], config.projection_dim)
        networks = {"G": self.generator, "D": self.discriminator}
        if self.uses_nce:
            networks["F"] = self.projector
        for network in networks.values():
            if config.init_gain is None:
                init_default(network)
            else:
                init_xavier(network, config.init_gain)
        self.optimizers = {
            letter: torch.optim.Adam(
                network.parameters(),
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                fused=True,
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
            batch: "A" and "B", (N, C, H, W) images in [-1, 1] on the device of the networks.
            flip: whether this step mirrors G's input; by default drawn with probability 1/2 if `flip_equivariance`.
            patch_ids: positions for "NCE" (and "NCE_Y"), one (S,) int64 tensor per layer; by default drawn.

        Returns:
            Detached scalars: "G_GAN", "D_real", "D_fake", "G", and "NCE" and "NCE_Y" where they are part of the loss. The
            weights `lambda_gan` and `lambda_nce` are included.

        Raises:
            UserError: A and B differ in shape.
        """
        if flip is None:
            flip = self.config.flip_equivariance and torch.rand(()).item() < 0.5
        real_a, real_b = batch["A"], batch["B"]
        if real_a.shape != real_b.shape:
            raise UserError(
                f"the images of A and B differ in shape, {tuple(real_a.shape)} and {tuple(real_b.shape)}. "
                "Use preprocess=resize_and_crop, or another that makes them the same size."
            )
        source = torch.cat([real_a, real_b]) if self.uses_identity else real_a
        generated, keys = self._generate(source, flip)
        fake_b = generated[: len(real_a)]

        real_loss, fake_loss = self._update_discriminator(real_b, fake_b.detach())
        losses = {"D_real": real_loss, "D_fake": fake_loss}

        losses |= self._update_generator(generated, fake_b, keys, flip, patch_ids or {})
        return {name: loss.detach() for name, loss in losses.items()}

    def _generate(self, source: Tensor, flip: bool) -> tuple[Tensor, list[Tensor]]:
        """G(source), mirrored first if `flip`, and the features of the unmirrored source, without gradient."""
        taps = self.config.nce_layers
        model_input = source.flip(3) if flip else source
        with self._autocast():
            if not self.uses_nce:
                return self.generator(model_input), []
            if self.config.reuse_features and not flip:
                generated, keys = self.generator(model_input, taps)
                return generated, [key.detach() for key in keys]
            generated = self.generator(model_input)
        with self._autocast(), torch.no_grad():
            return generated, self.generator.encode(source, taps)

    def _update_discriminator(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        self.discriminator.requires_grad_(True)
        with self._autocast():
            # One batch for both: instance norm keeps the images apart.
            real_logits, fake_logits = self.discriminator(torch.cat([real, fake])).chunk(2)
        real_loss, fake_loss = discriminator_losses(real_logits, fake_logits, self.config.gan_mode)
        self._descend(0.5 * (real_loss + fake_loss), "D")
        return real_loss, fake_loss

    def _update_generator(
        self,
        generated: Tensor,
        fake_b: Tensor,
        keys: list[Tensor],
        flip: bool,
        patch_ids: Mapping[str, Sequence[Tensor]],
    ) -> dict[str, Tensor]:
        self.discriminator.requires_grad_(False)
        with self._autocast():
            logits = self.discriminator(fake_b)
        losses = {"G_GAN": self.config.lambda_gan * generator_loss(logits, self.config.gan_mode)}
        total = losses["G_GAN"]
        if self.uses_nce:
            contrastive = self._contrastive_losses(generated, keys, flip, patch_ids)
            losses |= contrastive
            total = total + sum(contrastive.values()) / len(contrastive)
        self._descend(total, *("GF" if self.uses_nce else "G"))
        return {"G": total, **losses}

    def _contrastive_losses(
        self,
        generated: Tensor,
        keys: list[Tensor],
        flip: bool,
        patch_ids: Mapping[str, Sequence[Tensor]],
    ) -> dict[str, Tensor]:
        config = self.config
        names = ("NCE", "NCE_Y") if self.uses_identity else ("NCE",)
        with self._autocast():
            queries = self.generator.encode(generated, config.nce_layers)
        if flip:
            queries = [query.flip(3) for query in queries]

        query_patches, key_patches = [], []
        for name, query_maps, key_maps in zip(
            names, _split(queries, len(names)), _split(keys, len(names)), strict=True
        ):
            # Keys first: their positions are drawn, unless given, and the queries are taken at the same ones.
            patches, ids = fastnce.sample_patches(
                key_maps, config.num_patches, patch_ids=patch_ids.get(name), backend=config.backend
            )
            key_patches.append(patches)
            patches, _ = fastnce.sample_patches(query_maps, patch_ids=ids, backend=config.backend)
            query_patches.append(patches)

        projected_queries = self._project(query_patches)
        with torch.no_grad():
            projected_keys = self._project(key_patches)
        return {
            name: config.lambda_nce
            * fastnce.patch_nce(
                query,
                key,
                temperature=config.temperature,
                negatives=config.negatives,
                backend=config.backend,
            )
            for name, query, key in zip(names, projected_queries, projected_keys, strict=True)
        }

    def _project(self, patches: list[list[Tensor]]) -> list[list[Tensor]]:
        """F on the patches of all losses at once: `patches[loss][layer]` (N, S, C) -> (N, S, projection_dim)."""
        stacked = [torch.cat(layers) for layers in zip(*patches, strict=True)]
        with self._autocast():
            return _split(self.projector(stacked), len(patches))

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


def _split(maps: list[Tensor], parts: int) -> list[list[Tensor]]:
    """Cuts every map's batch into `parts` equal parts: `result[part][layer]`."""
    return [list(layers) for layers in zip(*(x.chunk(parts) for x in maps), strict=True)]


def _tap_shapes(config: CUTConfig, image_size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """(C, H, W) of the feature maps that `nce_layers` name, found without computing anything."""
    with torch.device("meta"):
        generator = build_generator(config)
        image = torch.empty(1, config.channels, *image_size)
    try:
        return [tuple(feature.shape[1:]) for feature in generator.encode(image, config.nce_layers)]
    except ValueError as error:
        raise UserError(
            f"nce_layers={config.nce_layers} must be ascending, distinct layers of the generator, from 0 to "
            f"{len(generator.model) - 1}; its {config.num_blocks} residual blocks are the layers "
            f"{generator.first_block} to {generator.first_block + config.num_blocks - 1}."
        ) from error


def _check_num_patches(config: CUTConfig, shapes: Sequence[tuple[int, int, int]]) -> None:
    for index, (layer, (_, height, width)) in enumerate(
        zip(config.nce_layers, shapes, strict=True)
    ):
        if config.num_patches > height * width:
            raise UserError(
                f"num_patches={config.num_patches} exceeds the {height}x{width} = {height * width} positions of feature "
                f"map {index} (layer {layer}). Use num_patches <= {height * width}, or drop that layer from nce_layers."
            )
