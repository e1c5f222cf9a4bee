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
from fastnce.networks.heads import (
    CriticProjector,
    PatchProjector,
    ProjectionHead,
    SimilarityHead,
)
from fastnce.networks.multiscale_discriminator import MultiscaleDiscriminator
from fastnce.networks.patch_discriminator import PatchDiscriminator
from fastnce.networks.resnet_encoder import RESNETS, ResNetEncoder
from fastnce.networks.resnet_generator import ResnetGenerator
from fastnce.networks.spade_generator import SPADEGenerator
from fastnce.networks.studiogan import load_studiogan
from fastnce.networks.style_generator import StyleDiscriminator, StyleGenerator
from fastnce.networks.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from fastnce.networks.unet_generator import UNetGenerator

__all__ = [
    "RESNETS",
    "BigGANDiscriminator",
    "BigGANGenerator",
    "CriticProjector",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "DiscriminatorOutput",
    "MultiscaleDiscriminator",
    "PatchDiscriminator",
    "PatchProjector",
    "ProjectionHead",
    "ResNetEncoder",
    "ResnetGenerator",
    "SNGANDiscriminator",
    "SNGANGenerator",
    "SPADEGenerator",
    "SimilarityHead",
    "StyleGAN2Discriminator",
    "StyleGAN2Generator",
    "StyleDiscriminator",
    "StyleGenerator",
    "UNetGenerator",
    "load_studiogan",
]
