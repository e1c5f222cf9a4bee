"""The recipes of docs/trainers.md that need PyTorch alone."""

import contextlib
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import recipes
import torch.distributed as dist


def run(group, folder: Path, name: str):
    """The state dicts of the trained model and of the one that is loaded, if any."""
    # These ranks have met, and stay.
    meeting = {"init_process_group": mock.DEFAULT, "destroy_process_group": mock.DEFAULT}
    path = mock.patch.object(sys, "path", [str(folder), *sys.path])
    with mock.patch.multiple(dist, **meeting), path, contextlib.chdir(folder):
        names = runpy.run_path(name)
    del sys.modules["model"]  # that of another folder next
    return [
        {key: whole(x) for key, x in names[model].state_dict().items()}
        for model in ("model", "loaded")
        if model in names
    ]


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


@pytest.mark.parametrize(
    ("name", "batch_size", "accumulation"),
    [("train_ddp.py", 16, 2), ("train_fsdp2.py", 16, 2), ("train_grad_cache.py", 32, 1)],
)
def test_a_recipe_trains_and_loads_as_one_process(
    name, batch_size, accumulation, workers, tmp_path
):
    for file, code in recipes.SCRIPTS.items():
        (tmp_path / file).write_text(code)
    answers = workers.results(run, tmp_path, name)
    for trained, *loaded in answers:
        recipes.assert_trained(trained, batch_size * len(answers), accumulation)
        recipes.assert_same_state(trained, answers[0][0])
        assert bool(loaded) == ("loaded" in recipes.SCRIPTS[name])
        for state in loaded:
            recipes.assert_same_state(state, trained)
