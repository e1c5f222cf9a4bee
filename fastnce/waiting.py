"""How the threads of OpenMP wait for work, in the processes of the command line.

Between two parallel loops a thread spins for a while before it sleeps. Where another process wants the core, that time is taken
from whoever has the work, and a step of many small loops becomes many times slower. So the commands
let their threads spin briefly; docs/speed.md has the measurements. torch's loops and this package's kernels share these threads.

GNU's OpenMP reads its settings as it is loaded, so this must run before torch is imported. A program that imports fastnce keeps its own.
"""

import itertools
import os
import sys
from pathlib import Path

SPINS = 1000
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def set_for_commands() -> None:
    """Sets the waiting in a process that runs ``fastnce ...`` or ``python -m fastnce ...``, unless the user has."""
    words = sys.orig_argv
    is_command = ("-m", "fastnce") in itertools.pairwise(words) or any(
        Path(word).stem == "fastnce" for word in words[:2]
    )
    if is_command and "torch" not in sys.modules and not _chosen():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def shown() -> str:
    """The settings of this process, such as ``GOMP_SPINCOUNT=1000``, for ``fastnce doctor``."""
    chosen = [f"{name}={os.environ[name]}" for name in _chosen()]
    return ", ".join(chosen) or "OpenMP's default"


def _chosen() -> list[str]:
    return [name for name in VARIABLES if os.environ.get(name)]
