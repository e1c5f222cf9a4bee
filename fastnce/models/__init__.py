"""The objective of each system: which losses, on what, in which order."""

from fastnce.models.contragan import ContraGAN
from fastnce.models.contragan_config import ContraGANConfig
from fastnce.models.cut import CUT
from fastnce.models.cut_config import CUTConfig
from fastnce.models.representation import Representation, RepresentationConfig

__all__ = [
    "CUT",
    "CUTConfig",
    "ContraGAN",
    "ContraGANConfig",
    "Representation",
    "RepresentationConfig",
]
