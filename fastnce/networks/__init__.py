"""Network families, one file each."""

from fastnce.networks.biggan import BigGANDiscriminator, BigGANGenerator
from fastnce.networks.conditional import DiscriminatorOutput
from fastnce.networks.patch_discriminator import PatchDiscriminator
from fastnce.networks.patch_projector import PatchProjector
from fastnce.networks.resnet_generator import ResnetGenerator

__all__ = [
    "BigGANDiscriminator",
    "BigGANGenerator",
    "DiscriminatorOutput",
    "PatchDiscriminator",
    "PatchProjector",
    "ResnetGenerator",
]
