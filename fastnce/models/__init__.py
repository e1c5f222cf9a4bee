"""The objective of each system: which losses, on what, in which order."""

from fastnce.models.contragan import ContraGAN
from fastnce.models.contragan_config import ContraGANConfig
from fastnce.models.cut import CUT
from fastnce.models.cut_config import CUTConfig
from fastnce.models.cyclegan import CycleGAN, CycleGANConfig
from fastnce.models.dclgan import DCLGAN
from fastnce.models.dclgan_config import DCLGANConfig
from fastnce.models.pix2pix import Pix2Pix, Pix2PixConfig
from fastnce.models.representation import Representation, RepresentationConfig

__all__ = [
    "CUT",
    "CUTConfig",
    "ContraGAN",
    "ContraGANConfig",
    "CycleGAN",
    "CycleGANConfig",
    "DCLGAN",
    "DCLGANConfig",
    "Pix2Pix",
    "Pix2PixConfig",
    "Representation",
    "RepresentationConfig",
]
