"""Files that cannot be read, in training, measurement and translation."""

import shutil

import numpy as np
import pytest
from PIL import Image
from same_run import checkpoint

from fastnce.data.broken import BrokenFiles
from fastnce.errors import UserError
from fastnce.training import load_generator, train, translate_folder
from fastnce.training.log import read_metrics


@pytest.fixture
def broken(data, tmp_path):
    """`data` with four images in each test folder, and in each a file that is cut off and one that is no image."""
    root = tmp_path / "broken"
    shutil.copytree(data, root)
    rng = np.random.default_rng(1)
    for folder in (root / "testA", root / "testB"):
        for name in ("cut", "x", "y"):
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(
                folder / f"{name}.png"
            )
        (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:200])
        (folder / "0.png").write_bytes(b"nothing")
    return root


def test_a_measurement_that_fails_loses_nothing(tiny, broken, extractor):
    for folder in (broken / "testA", broken / "testB"):
        (folder / "0.png").unlink()
    changes = {"data": broken, "extractor": extractor, "measure_every": 2, "steps": 4}
    changes |= {"cache_gb": 0, "sample_count": 1}
    with pytest.raises(UserError, match=r"cut\.png: cannot be read as an image"):
        train(tiny(**changes))
    assert checkpoint(tiny().out)["step"] == 2
    train(tiny(broken_files="skip", **changes))
    assert [line["step"] for line in read_metrics(tiny().out / "measurements.jsonl")] == [4]


@pytest.mark.parametrize("preprocess", ["none", "fixsize"])
def test_translation_leaves_broken_files_out_if_asked_to(
    tiny, broken, tmp_path, caplog, preprocess
):
    generator, config = load_generator(train(tiny(steps=1)))
    folder, out = broken / "testA", tmp_path / "out"
    with pytest.raises(UserError, match=r"0\.png: cannot be read as an image"):
        translate_folder(generator, config, folder, out, preprocess=preprocess)
    options = {"preprocess": preprocess, "broken_files": "skip"}
    assert translate_folder(generator, config, folder, out, **options) == 3
    assert sorted(path.name for path in out.iterdir()) == ["1.png", "x.png", "y.png"]
    assert sum("cut.png" in record.getMessage() for record in caplog.records) == 1


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
