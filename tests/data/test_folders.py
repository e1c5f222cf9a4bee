"""Finding image files, and the words on a folder of them at the start of a run."""

import numpy as np
import pytest
from pictures import write
from PIL import Image

from fastnce.data import AlignedImages, SingleImagePatches, UnpairedImages, list_images
from fastnce.data.folders import describe_folder, split_folder
from fastnce.errors import UserError


def ramp(height=8, width=8, last=255, dtype=np.uint8):
    return np.linspace(0, last, height * width).reshape(height, width).astype(dtype)


def test_images_are_found_at_any_depth_sorted_and_hidden_ones_left_out(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.tiff", "sub/deep/d.bmp", ".hidden.png", ".cache/e.png"):
        write(tmp_path / name, ramp())
    (tmp_path / "notes.txt").write_text("no image")
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == ["a.JPG", "b.png", "sub/c.tiff", "sub/deep/d.bmp"]


def test_a_missing_an_empty_and_a_wrong_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for name in ("a.heic", "b.heic", "c.txt"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(UserError, match=r"holds no image.*\.jpg .*found 2 \.heic, 1 \.txt"):
        list_images(tmp_path / "empty")
    write(tmp_path / "file.png", ramp())
    with pytest.raises(UserError, match=r"file\.png: is a file"):
        list_images(tmp_path / "file.png")


def test_the_expected_layout_is_told_with_what_was_found(tmp_path):
    write(tmp_path / "horses" / "1.png", ramp())
    with pytest.raises(UserError) as info:
        split_folder(tmp_path, "train", "A")
    message = str(info.value)
    assert "\n" not in message
    for part in (str(tmp_path), "trainA", "trainB", "testA", "found horses"):
        assert part in message
    with pytest.raises(UserError, match="no such folder.*trainA and trainB"):
        split_folder(tmp_path / "x", "train", "A")


def test_test_folders_fall_back_to_val(tmp_path):
    (tmp_path / "valA").mkdir()
    assert split_folder(tmp_path, "test", "A") == tmp_path / "valA"
    (tmp_path / "testA").mkdir()
    assert split_folder(tmp_path, "test", "A") == tmp_path / "testA"
    with pytest.raises(UserError, match="trainA"):
        split_folder(tmp_path, "train", "A")


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    elsewhere, data = tmp_path / "elsewhere", tmp_path / "data"
    write(elsewhere / "deep" / "a.png", ramp())
    write(data / "b.png", ramp())
    (data / "linked").symlink_to(elsewhere)
    (data / "linked again").symlink_to(elsewhere)
    (elsewhere / "deep" / "back").symlink_to(data)
    found = [path.relative_to(data).as_posix() for path in list_images(data)]
    assert found == ["b.png", "linked/deep/a.png"] or found == ["b.png", "linked again/deep/a.png"]
    # A folder that is there keeps its name, whatever links to it.
    (data / "a link").symlink_to(data / "real")
    write(data / "real" / "c.png", ramp())
    assert data / "real" / "c.png" in list_images(data)


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
    write(tmp_path / "trainA" / "1.png", ramp())
    write(tmp_path / "trainB" / "1.png", ramp(last=99))
    options = {} if dataset is SingleImagePatches else {"preprocess": "crop"}
    assert dataset(tmp_path, crop_size=4, **options).describe() == [
        f"{tmp_path}/trainA: 1 image, 8x8, grey, values 0 to 255",
        f"{tmp_path}/trainB: 1 image, 8x8, grey, values 0 to 99",
    ]


def test_pairs_in_one_file_are_one_line(tmp_path):
    write(tmp_path / "train" / "1.png", ramp(8, 16))
    (line,) = AlignedImages(tmp_path, preprocess="crop", crop_size=4).describe()
    assert "train: 1 image, 16x8" in line
