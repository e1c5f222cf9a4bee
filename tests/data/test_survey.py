"""The words on a folder of images at the start of a run."""

import numpy as np
import pytest
from PIL import Image

from fastnce.data import AlignedImages, SingleImagePatches, UnpairedImages, list_images
from fastnce.data.folders import describe_folder
from fastnce.errors import UserError


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def ramp(height=8, width=8, last=255, dtype=np.uint8):
    return np.linspace(0, last, height * width).reshape(height, width).astype(dtype)


def test_a_folder_in_a_line_with_all_that_is_left_out(tmp_path):
    write(tmp_path / "a.png", ramp(8, 12))
    write(tmp_path / "b.jpg", np.stack([ramp(6, 20)] * 3, axis=2))
    pages = [Image.fromarray(ramp()) for _ in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    for name in ("c.heic", "d.txt", "e.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "broken.png").write_bytes(b"no image")
    paths = list_images(tmp_path)
    (line,) = describe_folder(tmp_path, paths, 1, skip_broken=True)
    for part in (
        f"{tmp_path}: 3 images, 8x6 to 20x8, 2 grey, 1 RGB, values 0 to 255",
        "; left out: 2 .txt, 1 .heic, 1 hidden, 1 unreadable",
        "only the first of 3 pages of pages.tif is read",
    ):
        assert part in line
    with pytest.raises(UserError, match=r"broken\.png"):
        describe_folder(tmp_path, paths, 1)


def test_plain_colours_are_no_images_to_learn_from(tmp_path):
    for level in (0, 9):
        write(tmp_path / f"{level}.png", np.full((8, 8), level, np.uint8))
    with pytest.raises(UserError, match=r"plain colour \(values 0 to 9\)"):
        describe_folder(tmp_path, list_images(tmp_path), 1)


def test_twelve_bits_in_sixteen_are_warned_of(tmp_path):
    write(tmp_path / "a.png", ramp(last=4000, dtype=np.uint16))
    line, warning = describe_folder(tmp_path, list_images(tmp_path), 1, 16)
    assert line.endswith("8x8, 16-bit grey, values 0 to 4000")
    assert warning.startswith("warning") and "--value-range 0 4095" in warning
    assert len(describe_folder(tmp_path, list_images(tmp_path), 1, 16, (0, 4095))) == 1


def test_of_a_large_folder_some_values_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("fastnce.data.folders.MAX_PIXELS", 3 * 64)
    for number in range(6):
        write(tmp_path / f"{number}.png", ramp(last=50 * number))
    (line,) = describe_folder(tmp_path, list_images(tmp_path), 1)
    assert line.endswith("6 images, 8x8, grey, values 0 to 200 in 3 of them")


@pytest.mark.parametrize("dataset", [UnpairedImages, AlignedImages, SingleImagePatches])
def test_every_dataset_for_translation_describes_its_folders(tmp_path, dataset):
    for domain, last in (("A", 255), ("B", 99)):
        write(tmp_path / f"train{domain}" / "1.png", ramp(last=last))
    options = {} if dataset is SingleImagePatches else {"preprocess": "crop"}
    lines = dataset(tmp_path, crop_size=4, **options).describe()
    expected = [
        f"{tmp_path}/train{domain}: 1 image, 8x8, grey, values 0 to {last}"
        for domain, last in (("A", 255), ("B", 99))
    ]
    assert lines == expected


def test_pairs_in_one_file_are_one_line(tmp_path):
    write(tmp_path / "train" / "1.png", ramp(8, 16))
    (line,) = AlignedImages(tmp_path, preprocess="crop", crop_size=4).describe()
    assert "train: 1 image, 16x8" in line
