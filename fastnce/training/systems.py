"""The systems that the training loop knows; a new one is a new row."""

from __future__ import annotations

from fastnce.training.generation import CONTRAGAN_SYSTEM
from fastnce.training.paired import PIX2PIX_SYSTEM
from fastnce.training.representation import REPRESENTATION_SYSTEM
from fastnce.training.system import System
from fastnce.training.translation import CUT_SYSTEM
from fastnce.training.two_way import CYCLEGAN_SYSTEM, DCLGAN_SYSTEM

SYSTEMS: dict[str, System] = {
    "cut": CUT_SYSTEM,
    "dclgan": DCLGAN_SYSTEM,
    "cyclegan": CYCLEGAN_SYSTEM,
    "pix2pix": PIX2PIX_SYSTEM,
    "contragan": CONTRAGAN_SYSTEM,
    "representation": REPRESENTATION_SYSTEM,
}
