"""The objective of each system: which losses, on what, in which order. They lie with their systems, in `fastnce.systems`."""

from fastnce.systems.cfl import CFL, CFLConfig
from fastnce.systems.contragan import ContraGAN, ContraGANConfig
from fastnce.systems.cut import CUT, CUTConfig
from fastnce.systems.cyclegan import CycleGAN, CycleGANConfig
from fastnce.systems.dclgan import DCLGAN, DCLGANConfig
from fastnce.systems.pix2pix import Pix2Pix, Pix2PixConfig
from fastnce.systems.representation import Representation, RepresentationConfig
from fastnce.systems.restyle import ReStyle, ReStyleConfig
from fastnce.systems.stylegan2 import StyleGAN2, StyleGAN2Config

__all__ = [
    "CFL",
    "CFLConfig",
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
    "ReStyle",
    "ReStyleConfig",
    "Representation",
    "RepresentationConfig",
    "StyleGAN2",
    "StyleGAN2Config",
]
