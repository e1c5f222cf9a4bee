"""The measurements of representation learning, on runs of three steps."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks is not installed

from benchmarks import representation
from benchmarks.representation import EXPERIMENTS, MEASURES, Row, main, table

TINY = {"encoder_channels": 2, "batch_size": 8, "warmup_epochs": 0, "norm_splits": 1}


def test_negatives(tmp_path, monkeypatch):
    rows = [Row("digits", name, "moco", TINY | {"queue_size": int(name)}) for name in ("4", "64")]
    monkeypatch.setitem(representation.EXPERIMENTS, "negatives", rows)
    args = ["negatives", "--steps", "3", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    main(args)
    written = json.loads((tmp_path / "representation-negatives.json").read_text())
    names = ["4", "random encoder", "raw pixels", "64", "random encoder", "raw pixels"]
    assert [entry["name"] for entry in written["rows"]] == names
    assert [entry.get("steps") for entry in written["rows"]] == [3, None, None] * 2
    text = (tmp_path / "representation-negatives.md").read_text()
    for name in set(names):
        assert f"| {name}" in text
    assert (tmp_path / "representation-negatives.png").stat().st_size > 1000
    # Interrupted or finished, the same command makes no step twice.
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("last.pt")}
    main(args)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("last.pt")} == before
    assert len(before) == 2


def test_the_table_gives_means_and_ranges_over_the_seeds():
    def entry(dataset, name, value, **more):
        return {"dataset": dataset, "name": name} | dict.fromkeys(MEASURES, value) | more

    lines = table(
        [
            entry("photo-crops", "raw pixels", 0.5),
            entry("photo-crops", "MoCo v2", 0.25, seconds=10),
            entry("photo-crops", "raw pixels", 0.5),
            entry("photo-crops", "MoCo v2", 0.75, seconds=20),
            entry("digits", "SimCLR", 1.0, seconds=1),
        ]
    ).splitlines()
    assert "| SimCLR" in lines[2] and "1.000" in lines[2]
    assert "0.500 (0.250 to 0.750)" in lines[3] and "15 s" in lines[3]
    assert "| raw pixels" in lines[4] and "0.500  " in lines[4]


@pytest.mark.parametrize(("name", "rows"), EXPERIMENTS.items())
def test_every_row_is_a_valid_configuration(name, rows):
    for row in rows:
        paths = {"data": "d", "out": "o"}
        config = representation.build_config(
            row.variant, preset=row.dataset, overrides=paths | row.options
        )
        assert all(getattr(config, key) == value for key, value in row.options.items())
    assert len({(row.dataset, row.name) for row in rows}) == len(rows)
