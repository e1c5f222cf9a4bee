"""Whether two runs are the same, bit for bit."""

import torch

from fastnce.training.checkpoint import load_checkpoint
from fastnce.training.log import read_metrics


def checkpoint(run):
    return load_checkpoint(run / "checkpoints" / "last.pt")


def assert_identical(one, other, where="state"):
    """Equality of nested containers, tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_identical(*pair, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def assert_same_run(one, other, free=()):
    """Checkpoint, metrics and sample grids are the same; only the time taken, the folder and options in `free` differ."""
    states = [checkpoint(run) for run in (one, other)]
    for state in states:
        state.pop("seconds")
        state["config"] = {
            name: value
            for name, value in state["config"].items()
            if name not in ("out", "steps", "workers", "epochs", *free)
        }
    assert_identical(*states)
    logs = [read_metrics(run / "metrics.jsonl") for run in (one, other)]
    for line in [*logs[0], *logs[1]]:
        line.pop("seconds")
    assert logs[0] == logs[1]
    grids = [sorted((run / "samples").iterdir()) for run in (one, other)]
    assert [grid.name for grid in grids[0]] == [grid.name for grid in grids[1]]
    for a, b in zip(*grids, strict=True):
        assert a.read_bytes() == b.read_bytes()
