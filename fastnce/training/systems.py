"""The systems that the training loop knows; a new one is a new row."""

from __future__ import annotations

from fastnce.training.generation import CONTRAGAN_SYSTEM
from fastnce.training.representation import REPRESENTATION_SYSTEM
from fastnce.training.system import System
from fastnce.training.translation import CUT_SYSTEM

SYSTEMS: dict[str, System] = {
    "cut": CUT_SYSTEM,
    "contragan": CONTRAGAN_SYSTEM,
    "representation": REPRESENTATION_SYSTEM,
}
