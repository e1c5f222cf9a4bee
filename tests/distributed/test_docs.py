"""What docs/distributed.md says is so."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from fastnce import distributed

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "distributed.md").read_text()


def sent_bytes(group):
    sent, exchange = [], dist.batch_isend_irecv

    def counting(messages):
        sent.extend(m.tensor.nbytes for m in messages if m.op is dist.isend)
        return exchange(messages)

    x = torch.randn(2, 5, 16, requires_grad=True)
    with mock.patch.object(dist, "batch_isend_irecv", counting):
        distributed.info_nce(*x, strategy="ring", group=group).backward()
    return sum(sent)


def test_bytes_are_those_of_the_exchange(workers):
    """The bytes that the page counts, against what the ring really sends: fp32 keys and sums here."""
    keys = 5 * 16 * 4
    assert workers.results(sent_bytes) == [2 * 3 * keys + 4 * keys] * 4


def test_the_training_script_runs_under_torchrun(tmp_path):
    script = re.search(r"```python\n(.*?)```", DOCS, re.DOTALL).group(1)
    (tmp_path / "train.py").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for _ in range(3):
        done = subprocess.run(
            [*torchrun, "--nproc-per-node", "2", str(tmp_path / "train.py")],
            capture_output=True,
            text=True,
            timeout=600,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        # Gloo sometimes ends a process so when it leaves, also without this package.
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+) of all 128 images", done.stdout)]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.2, "the encoder learns"
