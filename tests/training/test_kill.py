"""SIGKILL, which nothing can catch, at any moment of a training: every resume goes on, and the result is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from same_run import assert_same_run, checkpoint

from fastnce.training.config import to_dict

KILLER = Path(__file__).with_name("killer.py")
STEPS = {"steps": 54, "checkpoint_every": 3, "sample_every": 27, "log_every": 2}


@pytest.fixture
def never_killed(whole, threads):
    threads(1)  # like the children: PyTorch's sums depend on the number
    return whole("cut", **STEPS)


def killed(config, kills):
    """Trains with these kills; returns [signal, while writing a checkpoint] of each child, the last one's being [0, False]."""
    done = subprocess.run(
        [sys.executable, KILLER, json.dumps(to_dict(config)), json.dumps(kills)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(ends) == len(kills) + 1 and ends[-1] == [0, False], done.stderr
    return ends[:-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_kills_at_random_moments_and_at_every_stage_of_writing_a_checkpoint(
    tiny, never_killed, workers
):
    """Stages: before the file is there, before it is on the disk, before it has its name; of the first checkpoint, then others."""
    config = tiny(workers=workers, **STEPS)
    stages = [("replace", 1), ("mkstemp", 1), ("fsync", 1), ("fsync", 2), ("link", 1)]
    stages += [("replace", 2)]
    ends = killed(config, [*stages, *range(8)])
    assert ends[: len(stages)] == [[9, True]] * len(stages)
    assert [number for number, _ in ends] == [9] * len(ends)  # none had finished before
    assert_same_run(config.out, never_killed)
    left = [path.name for path in config.out.rglob(".*")]
    assert left == [] and checkpoint(config.out)["step"] == STEPS["steps"]
