"""Network families."""

from fastnce.networks.conditional_gans import (
    BigGANDiscriminator,
    BigGANGenerator,
    DCGANDiscriminator,
    DCGANGenerator,
    DiscriminatorOutput,
    SNGANDiscriminator,
    SNGANGenerator,
)
from fastnce.networks.heads import PatchProjector, ProjectionHead, SimilarityHead
from fastnce.networks.patch_discriminator import PatchDiscriminator
from fastnce.networks.resnet_encoder import RESNETS, ResNetEncoder
from fastnce.networks.resnet_generator import ResnetGenerator
from fastnce.networks.studiogan import load_studiogan
from fastnce.networks.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from fastnce.networks.unet_generator import UNetGenerator

__all__ = [
    "RESNETS",
    "BigGANDiscriminator",
    "BigGANGenerator",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DiscriminatorOutput",
    "PatchDiscriminator",
    "PatchProjector",
    "ProjectionHead",
    "ResNetEncoder",
    "ResnetGenerator",
    "SNGANDiscriminator",
    "SNGANGenerator",
    "SimilarityHead",
    "StyleGAN2Discriminator",
    "StyleGAN2Generator",
    "UNetGenerator",
    "load_studiogan",
]
