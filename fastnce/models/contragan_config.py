"""What defines ContraGAN and its baselines, and the networks that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from fastnce.errors import UserError
from fastnce.models import options
from fastnce.models.gan import GANMode
from fastnce.networks import (
    BigGANDiscriminator,
    BigGANGenerator,
    DCGANDiscriminator,
    DCGANGenerator,
    SNGANDiscriminator,
    SNGANGenerator,
)

Backbone = Literal["biggan", "sngan", "dcgan"]
Conditioning = Literal["2C", "D2DCE", "AC", "PD", "none"]
ContrastSet = Literal["batch", "groups", "real"]


@dataclass(frozen=True, kw_only=True)
class ContraGANConfig:
    """What defines the networks, losses and optimisers. The defaults are the published ContraGAN on CIFAR-10."""

    backbone: Backbone = "biggan"
    """Networks: BigGAN's, SNGAN's residual ones, or SNDCGAN's small convolutional ones."""
    conditioning: Conditioning = "2C"
    """How D is told the class: 2C (ContraGAN), D2DCE (ReACGAN), AC (ACGAN), PD (projection), or none."""
    num_classes: int = 10
    """Classes of the data."""
    image_size: int = 32
    """Height and width of the images: 4, 5, 6 or 7 times a power of two, from 16 to 448."""
    image_channels: int = 3
    """3 for RGB, 1 for grey."""
    latent_dim: int = 80
    """Length of z."""
    gen_channels: int = 96
    """Generator: base number of channels."""
    disc_channels: int = 96
    """Discriminator: base number of channels."""
    shared_dim: int = 128
    """BigGAN generator: length of the class embedding that all its layers share."""
    gen_attention: int = 2
    """BigGAN generator: self-attention after this many blocks; 0: nowhere."""
    disc_attention: int = 1
    """BigGAN discriminator: self-attention after this many blocks; 0: nowhere."""
    gen_spectral_norm: bool = False
    """SNGAN generator: spectral norm on every layer; BigGAN's always has it, DCGAN's never."""
    disc_norm: Literal["spectral", "batch", "none"] = "spectral"
    """SNGAN and DCGAN discriminators: spectral norm, batch norm or none; BigGAN's always has spectral norm."""
    embed_dim: int = 512
    """Discriminator: length of the embeddings and proxies of 2C and D2DCE."""
    gan_mode: GANMode = "hinge"
    """Adversarial objective."""
    lambda_cond: float = 1.0
    """Weight of the class loss."""
    temperature: float = 1.0
    """Temperature of 2C and D2DCE."""
    margin: float = 0.98
    """Margin of D2DCE."""
    contrast_set: ContrastSet = "batch"
    """What 2C contrasts a sample with. batch, the published form: with all samples of its batch. Ours, which bind labels where
    that does not: groups, with those of its group of `group_size`; real, in G's step also with D's last real samples."""
    group_size: int = 8
    """Samples in a group of `contrast_set=groups`."""
    rank_gradients: Literal["mean", "published"] = "mean"
    """2C over several processes. mean: exactly the loss of the whole batch in one process. published: as StudioGAN has it, with
    1 / processes of its weight."""
    lambda_cr: float = 0.0
    """Consistency regularisation of D between real images and augmented ones (published: 10); 0 turns it off."""
    lambda_bcr: float = 0.0
    """ICR: the same for real and for generated images (published: 10); 0 turns it off."""
    lambda_zcr_d: float = 0.0
    """ICR: D on z and on z moved a little (published: 20); 0 turns it off."""
    lambda_zcr_g: float = 0.0
    """ICR: how much G is rewarded for images that change with z (published: 0.5); 0 turns it off."""
    zcr_radius: float = 0.05
    """ICR: standard deviation of the move of z."""
    diff_augment: bool = False
    """DiffAugment: colour, translation and cutout on all images that D sees."""
    lambda_r1: float = 0.0
    """R1: weight of half the squared gradient of D at real images; 0 turns it off."""
    d_steps: int = 5
    """Updates of D before each update of G."""
    micro_batches: int = 1
    """Parts in which a batch goes through the networks, to save memory; the class loss still sees the whole batch."""
    lr_g: float = 2e-4
    """Adam: learning rate of G."""
    lr_d: float = 2e-4
    """Adam: learning rate of D."""
    beta1: float = 0.5
    """Adam: decay of the mean gradient."""
    beta2: float = 0.999
    """Adam: decay of the squared gradient."""
    adam_eps: float = 1e-6
    """Adam: what is added to the root of the squared gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: networks run under autocast; parameters and losses stay fp32."""
    backend: str | None = None
    """Backend of the contrastive op; by default the fastest that runs here."""

    def __post_init__(self) -> None:
        options.at_least(self, 1, "num_classes", "image_channels", "latent_dim", "embed_dim")
        options.at_least(self, 1, "gen_channels", "disc_channels", "shared_dim", "group_size")
        options.at_least(self, 1, "d_steps", "micro_batches")
        options.at_least(self, 0, "gen_attention", "disc_attention")
        options.at_least(self, 0, "lambda_cond", "lambda_cr", "lambda_bcr", "lambda_zcr_d")
        options.at_least(self, 0, "lambda_zcr_g", "zcr_radius", "lambda_r1", "margin")
        options.above_zero(self, "temperature", "lr_g", "lr_d", "adam_eps")
        options.in_unit_interval(self, "beta1", "beta2")
        options.one_of(self, "backbone", get_args(Backbone))
        options.one_of(self, "conditioning", get_args(Conditioning))
        options.one_of(self, "disc_norm", ("spectral", "batch", "none"))
        options.one_of(self, "contrast_set", get_args(ContrastSet))
        options.one_of(self, "rank_gradients", ("mean", "published"))
        options.one_of(self, "gan_mode", get_args(GANMode))
        options.one_of(self, "precision", ("fp32", "bf16"))
        if self.conditioning in ("2C", "D2DCE", "AC") and self.num_classes < 2:
            raise UserError(
                f"num_classes={self.num_classes} leaves conditioning={self.conditioning} nothing to tell apart. "
                "Use conditioning=none."
            )


def build_generator(config: ContraGANConfig) -> nn.Module:
    """The generator that `config` describes, freshly initialised."""
    common = (config.image_size, config.latent_dim, config.num_classes, config.gen_channels)
    channels = {"image_channels": config.image_channels}
    if config.backbone == "biggan":
        return BigGANGenerator(
            *common,
            shared_dim=config.shared_dim,
            attention_after=config.gen_attention,
            **channels,
        )
    if config.backbone == "sngan":
        return SNGANGenerator(*common, spectral_norm=config.gen_spectral_norm, **channels)
    return DCGANGenerator(*common, **channels)


def build_discriminator(config: ContraGANConfig) -> nn.Module:
    """The discriminator that `config` describes, freshly initialised."""
    common = (config.image_size, config.num_classes, config.disc_channels)
    heads = {
        "conditioning": config.conditioning,
        "embed_dim": config.embed_dim,
        "image_channels": config.image_channels,
    }
    if config.backbone == "biggan":
        return BigGANDiscriminator(*common, attention_after=config.disc_attention, **heads)
    family = SNGANDiscriminator if config.backbone == "sngan" else DCGANDiscriminator
    return family(*common, norm=config.disc_norm, **heads)
