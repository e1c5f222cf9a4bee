"""Trains in one child process after the other and kills each, data workers and all; one process for all, as importing takes longer.

`python killer.py CONFIG KILLS`, both JSON. A kill is ["link", 2], when that function is called for the second time to write a
checkpoint; or a number, the seed of a random moment. The last child is left to finish. Prints for each child the signal that
ended it, and whether it was writing a checkpoint.
"""

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure  # noqa: F401  before the forks, for it takes half a second
import torch

from fastnce.models import CUT
from fastnce.training import loop
from fastnce.training.config import from_dict

# The steps of writing a checkpoint.
STAGES = {"mkstemp": tempfile, "fsync": os, "link": os, "replace": os}


def slowed(function: Callable, seconds: float) -> Callable:
    def slow(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


def deadly(function: Callable, call: int, marker: Path) -> Callable:
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += marker.exists()
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return counted


def deadly_soon(step: Callable, seed: int) -> Callable:
    """In one of the first steps a clock is set that kills: within three steps, or while a checkpoint is written."""
    random_number = random.Random(seed)
    first, calls = random_number.randint(1, 4), 0

    def die() -> None:
        time.sleep(0.03 * random_number.random())
        os.killpg(0, signal.SIGKILL)

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == first:
            threading.Thread(target=die).start()
        if calls == first + 3:  # a slow clock must not let the run be finished
            signal.pause()
        return step(*args, **kwargs)

    return counted


def marked(save: Callable, marker: Path) -> Callable:
    """While a checkpoint is written, `marker` is there."""

    def marking(*args, **kwargs):
        marker.touch()
        save(*args, **kwargs)
        marker.unlink()

    return marking


def child(config: loop.TrainConfig, kill: int | list | None, marker: Path) -> None:
    loop.save_checkpoint = marked(loop.save_checkpoint, marker)
    if isinstance(kill, int):
        # So that about half of the time goes into writing checkpoints.
        CUT.training_step = slowed(deadly_soon(CUT.training_step, kill), 0.004)
        for name, module in STAGES.items():
            setattr(module, name, slowed(getattr(module, name), 0.008))
    elif kill is not None:
        name, call = kill
        setattr(STAGES[name], name, deadly(getattr(STAGES[name], name), call, marker))
    loop.train(config)


def main() -> None:
    torch.set_num_threads(1)
    config, kills = from_dict(json.loads(sys.argv[1])), json.loads(sys.argv[2])
    marker = config.out.with_name("writing")
    for kill in [*kills, None]:
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            try:
                child(config, kill, marker)
            finally:
                sys.stdout.flush()
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        print(json.dumps([ended_by, marker.exists()]), flush=True)
        marker.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
