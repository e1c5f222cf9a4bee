"""The benchmark over ranks: its check of results, and what it makes of its ranks' answers."""

import json
import warnings

import torch.distributed as dist

from benchmarks import distributed
from benchmarks.__main__ import main


def gates(group):
    warnings.filterwarnings("ignore", category=FutureWarning)  # of PyTorch about its all_gather
    for name in distributed.PROVIDERS:
        for dtype in (distributed.FP32, distributed.BF16):
            distributed._gate(dist.get_rank(), name, dtype)


def local_only(query, key):
    """A plausible mistake: each rank's own negatives alone."""
    return distributed.cross_entropy(query @ key.T, distributed.torch.arange(len(query)))


def wrong_gate(group):
    distributed._CALLS["wrong"] = local_only
    distributed._gate(dist.get_rank(), "wrong", distributed.FP32)


def test_every_provider_is_checked_against_one_process(workers):
    workers.results(gates)
    assert all("wrong is wrong: off by" in str(answer) for answer in workers.run(wrong_gate))


def test_tables_of_a_run(tmp_path, monkeypatch, capsys):
    """With ranks whose answers are known."""

    def answers(job):
        if job.once:
            peak = {"eager": 9e8, "ring": 2e8, "gather": 4e8}[job.providers[0]]
            return [{"peak": peak - rank, "seconds": 4.0 - rank} for rank in range(4)]
        return [{name: [1.0 + at] * 3 for at, name in enumerate(job.providers)}] * 4

    monkeypatch.setattr(distributed, "_on_ranks", answers)
    assert main(["distributed", "--size", "full", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-distributed.json")
    entries = json.loads(path.read_text())["results"]
    assert [entry["shape"]["N"] for entry in entries] == [2048, 8192, 16384, 8192, 16384, 65536, 8]
    assert [row["status"] for row in entries[5]["providers"]] == ["skipped", "ok", "ok"]
    assert entries[5]["providers"][1]["seconds"]["median"] == 4.0, "the slowest rank's"
    assert entries[0]["providers"][0]["rank_peak_bytes"] == 9e8, "the largest of the ranks"
    text = path.with_suffix(".md").read_text()
    assert "peak per rank" in text and "| 900 MB" in text
    assert "its matrices of local x global alone need 52 GB" in text
    assert "check=False" in capsys.readouterr().out
