"""The systems that can be trained. One system is one file; this is the only list of them.

Everything else, the training loop, the command line, its presets and its help, asks here.
"""

from __future__ import annotations

from fastnce.errors import UserError, known
from fastnce.systems.cfl import CFLSystem
from fastnce.systems.contragan import ContraGANSystem
from fastnce.systems.cut import CUTSystem
from fastnce.systems.cyclegan import CycleGANSystem
from fastnce.systems.dclgan import DCLGANSystem
from fastnce.systems.pix2pix import Pix2PixSystem
from fastnce.systems.representation import RepresentationSystem
from fastnce.systems.restyle import ReStyleSystem
from fastnce.systems.stylegan2 import StyleGAN2System
from fastnce.systems.system import System, TrainConfig

__all__ = ["SYSTEMS", "System", "TrainConfig", "of_variant", "register", "system_named", "variants"]

SYSTEMS: dict[str, System] = {}


def register(system: System) -> System:
    """Adds a system, which is then known to all commands by the names of its variants.

    Raises:
        ValueError: another system has its name or the name of a variant.
    """
    taken = {system.name} & SYSTEMS.keys() | system.variants.keys() & set(variants())
    if taken:
        raise ValueError(f"register: {', '.join(sorted(taken))} is taken. Use another name.")
    SYSTEMS[system.name] = system
    return system


def variants() -> dict[str, System]:
    """The system of each name that `fastnce train` takes."""
    return {name: system for system in SYSTEMS.values() for name in system.variants}


def of_variant(name: str) -> System:
    """The system that a variant trains."""
    return variants()[known(name, variants(), "model")]


def system_named(name: object) -> System:
    """The system of a configuration."""
    if name not in SYSTEMS:
        raise UserError(f"system={name} is unknown. Use one of: {', '.join(SYSTEMS)}.")
    return SYSTEMS[name]


for _system in (
    CUTSystem(),
    DCLGANSystem(),
    CycleGANSystem(),
    Pix2PixSystem(),
    CFLSystem(),
    ContraGANSystem(),
    StyleGAN2System(),
    ReStyleSystem(),
    RepresentationSystem(),
):
    register(_system)
