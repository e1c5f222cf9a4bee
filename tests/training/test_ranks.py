"""Training in several processes: gradients and buffers are averaged, weights stay the same, a run resumes exactly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from same_run import assert_identical, checkpoint

import fastnce
from fastnce.errors import UserError
from fastnce.training import train
from fastnce.training.config import to_dict
from fastnce.training.log import read_metrics
from fastnce.training.ranks import Ranks, _Share

WORKER = """
import sys
import torch
import torch.distributed as dist
from fastnce.training import build_config, train
from fastnce.training import loop
from fastnce.training.ranks import leave
torch.set_num_threads(1)
kept = {}
one_step = loop._Run._one_step
def recorded(self, batch):
    one_step(self, batch)
    kept["model"] = self.model
loop._Run._one_step = recorded
for file in sys.argv[2:]:
    train(build_config(sys.argv[1], config_file=file))
if kept:
    state = {k: v for k, v in kept["model"].state_dict().items() if torch.is_tensor(v) and v.is_floating_point()}
    flat = torch.cat([v.flatten() for v in state.values()])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    assert all(torch.equal(flat, other) for other in everyone), "the ranks' weights differ"
leave()
"""


def launch(variant, configs, tmp_path, ranks=2):
    """Starts trainings, one after the other, in `ranks` processes by torchrun."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(script), variant]
    for config in configs:
        file = tmp_path / f"{config.out.name}.json"
        file.write_text(json.dumps(to_dict(config)))
        command.append(str(file))
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # The script lies elsewhere; it is to find the package under test.
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fastnce.__file__).parents[1])},
    )


def run(variant, configs, tmp_path, ranks=2):
    process = launch(variant, configs, tmp_path, ranks)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


@pytest.mark.parametrize(
    ("variant", "options"),
    [("cut", {"negatives": "image+queue", "queue_size": 50}), ("restyle-e4e", {})],
)
def test_two_processes_train_and_resume_exactly(tiny, tmp_path, variant, options):
    """Stopped after 4 of 8 steps and continued, against the run that was not stopped: with a queue, and with pools."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for configs in (
        [tiny(variant, out=whole, **options), tiny(variant, out=parts, steps=4, **options)],
        [tiny(variant, out=parts, **options)],
    ):
        code, output = run(variant, configs, tmp_path)
        assert code == 0, output
    assert "going on after step 4 of 8" in output
    assert output.count("going on") == 1  # said once
    one, other = checkpoint(whole), checkpoint(parts)
    for key in ("model", "optimizers", "average", "rng", "apart", "metrics"):
        assert_identical(one[key], other[key], key)
    if variant == "cut":
        # The queue took in the 8 patches of either rank's image in each step.
        assert int(one["model"]["contrast.queues.NCE.0.queue_ptr"]) == 8 * 2 * 8 % 50
    else:
        own = [one["model"]["pools.real._extra_state"], one["apart"][1]["pools.real"]]
        assert all(len(latents) == 3 for latents in own)
        assert not any(torch.equal(x, y) for x in own[0] for y in own[1])
    assert len(one["rng"]) == 2
    assert not torch.equal(one["rng"][0]["cpu"], one["rng"][1]["cpu"])
    assert [line["step"] for line in read_metrics(whole / "metrics.jsonl")] == [3, 6]
    # One process may go on with it, and says what that means.
    assert train(tiny(variant, out=parts, steps=9, **options)) == parts


def test_a_process_that_dies_ends_the_run(tiny, tmp_path):
    process = launch("cut", [tiny(out=tmp_path / "run", steps=None, epochs=400)], tmp_path)
    deadline = time.monotonic() + 600
    log = tmp_path / "run" / "metrics.jsonl"
    while not read_metrics(log) and time.monotonic() < deadline:
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    assert "SIGKILL" in output or "exitcode: -9" in output.replace(" ", "").replace(":", ": ")


def test_batches_that_cannot_be_shared(tiny, monkeypatch):
    from fastnce.training import loop

    ranks = Ranks()
    ranks.size = 2
    monkeypatch.setattr(loop, "Ranks", lambda: ranks)
    message = "batch_size=3 is shared by 2 processes. Use a multiple of 2"
    with pytest.raises(UserError, match=message):
        train(tiny(batch_size=3))


@pytest.fixture
def pair(monkeypatch):
    """Ranks of two, without a second process: every message doubles what is sent, as if the other had sent the same."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *args, **kwargs: tensor.mul_(2))
    ranks = Ranks()
    ranks.size = 2
    return ranks


def test_the_mean_of_equal_gradients_is_the_gradient(pair):
    layer = torch.nn.Linear(2, 2).double()
    half = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*layer.parameters(), half], lr=0.0)
    pair.average_gradients_before([optimizer])
    layer(torch.ones(1, 2).double()).sum().backward()
    half.sum().backward()
    before = [p.grad.clone() for p in (*layer.parameters(), half)]
    optimizer.step()
    for parameter, grad in zip((*layer.parameters(), half), before, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_shares_of_a_stream():
    ranks = Ranks()
    assert ranks.share(range(3, 9), 3) == range(3, 9)
    shares = []
    for rank in range(2):
        ranks.size, ranks.rank = 2, rank
        share = ranks.share(range(4, 16), 4)
        assert isinstance(share, _Share) and len(share) == 6
        shares.append(list(share))
    assert shares == [[4, 6, 8, 10, 12, 14], [5, 7, 9, 11, 13, 15]]


def test_one_gpu_for_several_processes(monkeypatch):
    from fastnce.training.ranks import joined_from_environment

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device=cuda:1 is one GPU, but torchrun started several"):
        joined_from_environment(torch.device("cuda", 1))
