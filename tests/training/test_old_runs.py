"""Runs made by version 0.1.0 go on.

old_runs.zip holds a run of each system, stopped after 4 of its 8 steps, and the losses of all 8 as that version went on.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastnce.training import train
from fastnce.training.config import from_dict
from fastnce.training.log import read_metrics

RUNS = zipfile.ZipFile(Path(__file__).with_name("old_runs.zip"))


def _made_images(root):
    """The images that the runs were made with."""
    rng = np.random.default_rng(0)
    folders = [
        (f"data/{name}", n, (20, 20))
        for name, n in zip(("trainA", "trainB", "testA", "testB"), (5, 3, 2, 2), strict=True)
    ]
    folders += [(f"single/train{domain}", 1, (24, 24)) for domain in "AB"]
    folders += [("pairs/train", 4, (20, 40)), ("pairs/test", 2, (20, 40))]
    folders += [
        (f"classes/{split}/{name}", n, (16, 16))
        for split, n in (("train", 6), ("test", 2))
        for name in ("cat", "dog")
    ]
    for folder, count, size in folders:
        (root / folder).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{index}.png")


@pytest.mark.parametrize("name", ["cut", "dclgan", "cyclegan", "pix2pix", "contragan", "moco"])
def test_a_run_of_the_first_version_goes_on(name, tmp_path, monkeypatch):
    _made_images(tmp_path)
    monkeypatch.chdir(tmp_path)  # its folders are relative
    RUNS.extractall("runs", [n for n in RUNS.namelist() if n.startswith(f"{name}/")])
    run = Path("runs", name)
    train(from_dict(json.loads((run / "config.json").read_text())))
    found, expected = (
        read_metrics(run / file) for file in ("metrics.jsonl", "after_8_steps.jsonl")
    )
    assert [line["step"] for line in found] == [2, 4, 6, 8]
    for line, truth in zip(found, expected, strict=True):
        for key in truth.keys() - {"seconds"}:
            # Processors with other instructions round otherwise.
            assert line[key] == pytest.approx(truth[key], rel=2e-3, abs=1e-4), (line["step"], key)
