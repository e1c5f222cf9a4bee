"""Files that cannot be read, in training and measurement; the commands' own tests have theirs."""

import shutil

import numpy as np
import pytest
from pictures import cut_short, noise
from same_run import checkpoint

from fastnce.data.broken import BrokenFiles
from fastnce.errors import UserError
from fastnce.training import train
from fastnce.training.log import read_metrics


@pytest.fixture
def broken(data, tmp_path):
    """`data` with four images in each test folder, and in each of them a file that is cut short."""
    root = shutil.copytree(data, tmp_path / "broken")
    for folder in (root / "testA", root / "testB"):
        for name in ("cut", "x"):
            noise(folder / f"{name}.png")
        cut_short(folder / "cut.png")
    return root


def test_a_training_is_stopped_by_a_broken_file_or_leaves_it_out(tiny, broken, caplog):
    (broken / "trainA" / "2.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"2\.png: cannot be read"):
        train(tiny(data=broken, steps=2))
    run = train(tiny(data=broken, steps=2, broken_files="skip"))
    assert checkpoint(run)["step"] == 2
    assert sum("2.png" in record.getMessage() for record in caplog.records) == 1


def test_a_measurement_that_fails_loses_nothing(tiny, broken, extractor):
    changes = {"data": broken, "extractor": extractor, "measure_every": 2, "steps": 4}
    changes |= {"cache_gb": 0, "sample_count": 1}
    with pytest.raises(UserError, match=r"cut\.png: cannot be read as an image"):
        train(tiny(**changes))
    assert checkpoint(tiny().out)["step"] == 2
    train(tiny(broken_files="skip", **changes))
    assert [line["step"] for line in read_metrics(tiny().out / "measurements.jsonl")] == [4]


def test_only_a_file_of_the_same_group_takes_the_place_of_a_broken_one(tmp_path):
    paths = [tmp_path / name / "x.png" for name in ("cat", "dog", "cat", "dog")]
    files = BrokenFiles(tmp_path, paths, skip=True, groups=np.array([0, 1, 0, 1]))

    def read(index: int) -> int:
        if index in (1, 2):
            raise UserError(f"{paths[index]}: cannot be read as an image")
        return index

    assert [files.read(index, read) for index in range(4)] == [0, 3, 0, 3]
    assert files.count == 2 and 2 in files
    with pytest.raises(UserError, match="dog: none of its 2 files can be read"):
        files.note(3, UserError("broken"))
