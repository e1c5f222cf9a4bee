"""Checkpoint files: atomic, safe to read, and clear about damage and full disks."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from fastnce.errors import UserError
from fastnce.training.checkpoint import load_checkpoint, previous_path, save_checkpoint


def state(value: float) -> dict:
    return {"step": 3, "model": {"w": torch.full((1000,), value)}, "list": [1, 2.5, "x", None]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoints" / "last.pt"


def files(path):
    return sorted(entry.name for entry in path.parent.iterdir())


def test_round_trip(path):
    save_checkpoint(state(1.0), path)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"]["w"], torch.ones(1000))
    assert (loaded["step"], loaded["list"]) == (3, [1, 2.5, "x", None])
    assert files(path) == ["last.pt"]


def test_the_previous_checkpoint_is_kept(path):
    for value in (1.0, 2.0, 3.0):
        save_checkpoint(state(value), path)
    assert load_checkpoint(path)["model"]["w"][0] == 3
    assert load_checkpoint(previous_path(path))["model"]["w"][0] == 2
    assert files(path) == ["last.prev.pt", "last.pt"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_cut_short(path, share):
    save_checkpoint(state(1.0), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"last\.pt: is damaged .* Delete it to start again\.$"):
        load_checkpoint(path)


def test_a_damaged_file_names_the_one_before(path):
    save_checkpoint(state(1.0), path)
    save_checkpoint(state(2.0), path)
    path.write_bytes(b"garbage")
    assert load_checkpoint(previous_path(path))["model"]["w"][0] == 1
    with pytest.raises(UserError, match=r"move last\.prev\.pt over last\.pt"):
        load_checkpoint(path)


def test_code_in_a_file_is_not_run(path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "was-run"),)

    path.parent.mkdir()
    torch.save({"format": 1, "step": Malicious()}, path)
    with pytest.raises(UserError, match="is damaged or no checkpoint"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(UserError, match="is damaged or no checkpoint"):
        load_checkpoint(path)
    assert not (path.parent / "was-run").exists()


def test_missing_and_foreign_files(path):
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(path)
    path.parent.mkdir()
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="is no checkpoint of fastnce training"):
        load_checkpoint(path)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the file size")
def test_a_write_that_really_fails_half_way(path):
    save_checkpoint(state(1.0), path)
    script = f"""
import resource, signal, torch
from pathlib import Path
from fastnce.errors import UserError
from fastnce.training.checkpoint import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    save_checkpoint({{"step": 4, "w": torch.zeros(1000)}}, Path({str(path)!r}))
except UserError as error:
    print(error)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for part in ("cannot be written (File too large)", "Free some space", "is untouched"):
        assert part in done.stdout, done.stderr
    assert load_checkpoint(path)["model"]["w"][0] == 1
    assert files(path) == ["last.pt"]
