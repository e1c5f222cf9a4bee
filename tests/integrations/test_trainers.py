"""The recipes of docs/trainers.md for other libraries' trainers, each in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import recipes
import torch

# What this process did for torchvision, the ranks need too.
FIRST = "import against; against.imported('torch')\n"
RESULT = """
torch.save([{}.state_dict(), loaded.state_dict()], f"result-{{__import__('os').environ['RANK']}}.pt")
"""


@pytest.mark.parametrize(
    ("name", "needed", "model"),
    [
        ("train_accelerate.py", "accelerate", "model"),
        ("train_lightning.py", "pytorch_lightning", "learner.model"),
        ("train_transformers.py", "transformers", "model"),
    ],
)
def test_a_recipe_trains_and_loads_as_one_process(library, name, needed, model, tmp_path):
    library(needed)
    for file, code in recipes.SCRIPTS.items():
        (tmp_path / file).write_text(code)
    (tmp_path / name).write_text(FIRST + recipes.SCRIPTS[name] + RESULT.format(model))
    paths = [str(recipes.ROOT), str(Path(__file__).parent)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    results = sorted(tmp_path.glob("result-*.pt"))
    assert len(results) == 2, done.stderr  # gloo sometimes ends a process when it leaves
    first = torch.load(results[0])[0]
    for trained, loaded in map(torch.load, results):
        recipes.assert_trained(trained, rows=32)
        recipes.assert_same_state(trained, first)
        recipes.assert_same_state(loaded, trained)
