"""SIGKILL, which nothing can catch, at any moment of a training: every resume goes on, and the result is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from same_run import assert_same_run, checkpoint

from fastnce.training import train
from fastnce.training.config import to_dict

KILLER = Path(__file__).with_name("killer.py")
STEPS = {"steps": 120, "checkpoint_every": 3, "sample_every": 60, "log_every": 2}


@pytest.fixture(scope="module")
def never_killed(data, tmp_path_factory):
    from conftest import TINY

    from fastnce.training import build_config

    out = tmp_path_factory.mktemp("never-killed") / "run"
    return train(build_config("cut", overrides={"data": data, "out": out} | TINY | STEPS))


def killed(config, kills):
    """Trains with these kills; returns [signal, while writing a checkpoint] of each child, the last one's being [0, False]."""
    done = subprocess.run(
        [sys.executable, KILLER, json.dumps(to_dict(config)), json.dumps(kills)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(ends) == len(kills) + 1 and ends[-1] == [0, False], done.stderr
    return ends[:-1]


def assert_whole(run):
    """Nothing but what an uninterrupted run leaves; the checkpoint before the last one can be read, too."""
    left = [str(path) for path in run.rglob(".*")]
    assert left == []
    assert checkpoint(run)["step"] == STEPS["steps"]


@pytest.mark.parametrize("workers", [0, 2])
def test_ten_kills_at_random_moments(tiny, never_killed, workers):
    config = tiny(workers=workers, **STEPS)
    ends = killed(config, ["at random"] * 10)
    assert [number for number, _ in ends] == [9] * 10  # none had finished before
    assert_same_run(config.out, never_killed)
    assert_whole(config.out)


def test_kills_at_every_stage_of_writing_a_checkpoint(tiny, never_killed):
    """Before the file, between file and disk, around the renaming; of the first checkpoint and of later ones."""
    config = tiny(**STEPS)
    kills = [
        ["replace", 1],
        ["mkstemp", 1],
        ["fsync", 1],
        ["fsync", 2],
        ["mkstemp", 3],
        ["link", 2],
    ]
    kills += [["replace", 2], ["fsync", 5], ["fsync", 6]]
    assert killed(config, kills) == [[9, True]] * len(kills)
    assert_same_run(config.out, never_killed)
    assert_whole(config.out)
