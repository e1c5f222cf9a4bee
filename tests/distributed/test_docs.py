"""What docs/distributed.md says is so."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

import fastnce
from fastnce import distributed

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "distributed.md").read_text()


def sent_bytes(group, *ids):
    sent, exchange = [], dist.batch_isend_irecv

    def counting(messages):
        sent.extend(m.tensor.nbytes for m in messages if m.op is dist.isend)
        return exchange(messages)

    x = torch.randn(2, 5, 16, requires_grad=True)
    with mock.patch.object(dist, "batch_isend_irecv", counting):
        masks = {"query_ids": ids[0]} if ids else {}
        distributed.info_nce(*x, strategy="ring", group=group, **masks).backward()
    return sum(sent)


def test_bytes_are_those_of_the_exchange(workers):
    """The bytes that the page counts, against what the ring really sends: fp32 keys and sums here."""
    keys = 5 * 16 * 4
    assert workers.results(sent_bytes) == [2 * 3 * keys + 4 * keys] * 4
    with_ids = keys + 5 * 8
    assert workers.results(sent_bytes, torch.arange(5)) == [2 * 3 * with_ids + 4 * keys] * 4


COUNTS = (3, 5)


def reduced_by_hand(group):
    """The gradients of one's own rows, of the script on the page, as DDP averages them."""
    script = re.search(r"```python\n(losses = .*?)```", DOCS, re.DOTALL).group(1)
    names = {"fastnce": fastnce, "dist": mock.Mock(wraps=dist)}
    names["dist"].all_reduce = lambda x: dist.all_reduce(x, group=group)
    names["dist"].get_world_size = lambda: dist.get_world_size(group)
    names |= dict(zip(("query", "key"), own_rows(dist.get_rank(group)), strict=True))
    info_nce = functools.partial(distributed.info_nce, group=group)
    with mock.patch.object(distributed, "info_nce", info_nce):
        exec(script, names)
    return names["query"].grad / 2, names["key"].grad / 2, names["loss"].item() / 2


def own_rows(*ranks):
    query, noise = torch.randn(2, sum(COUNTS), 4, generator=torch.Generator().manual_seed(0))
    rows = (query.double(), query.double() + 0.5 * noise)
    parts = [[x.split(COUNTS)[rank] for rank in ranks] for x in rows]
    return [torch.cat(x).requires_grad_() for x in parts]


def test_losses_reduced_by_hand_are_a_mean_over_all_ranks(workers):
    """Of the losses above 1, as the page has it, on ranks of different sizes."""
    *grads, shares = zip(*workers.results(reduced_by_hand, ranks=2), strict=True)
    query, key = own_rows(0, 1)
    losses = fastnce.info_nce(query, key, reduction="none")
    hard = losses[losses > 1]
    assert 0 < len(hard) < len(losses)
    hard.mean().backward()
    torch.testing.assert_close(sum(shares), hard.mean().item())
    for parts, x in zip(grads, (query, key), strict=True):
        torch.testing.assert_close(torch.cat(parts), x.grad)


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
