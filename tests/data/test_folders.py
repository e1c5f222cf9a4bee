"""Finding, reading and writing image files, and what is said when that fails."""

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.data import files
from fastnce.data.folders import list_images, split_folder
from fastnce.data.images import load_image, save_image
from fastnce.errors import UserError


def write(path, size=(8, 8), colour=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_images_are_found_at_any_depth_sorted_and_hidden_ones_left_out(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.tiff", "sub/deep/d.bmp", ".hidden.png", ".cache/e.png"):
        write(tmp_path / name)
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
    write(tmp_path / "file.png")
    with pytest.raises(UserError, match=r"file\.png: is a file"):
        list_images(tmp_path / "file.png")


def test_the_expected_layout_is_told_with_what_was_found(tmp_path):
    write(tmp_path / "horses" / "1.png")
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


@pytest.mark.parametrize("content", [b"", b"no image at all", "truncated"])
def test_a_broken_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content == "truncated":
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        content = path.read_bytes()[:3000]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.png: cannot be read as an image") as info:
        load_image(path)
    assert "\n" not in str(info.value)


def test_sixteen_bits_survive_reading_and_writing(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", channels=1, bits=16)
    assert image.shape == (1, 256, 256) and image.dtype == torch.float32
    assert image.min() == -1 and image.max() == 1
    assert len(image.unique()) == 65536
    for name in ("b.png", "b.tif"):
        save_image(image, tmp_path / name, bits=16)
        with Image.open(tmp_path / name) as again:
            assert again.mode == "I;16"
            assert np.array_equal(np.asarray(again), levels)
    # Read as 8 bits they are scaled and not clipped; and 8 bits read as 16 keep their brightness.
    narrow = load_image(tmp_path / "a.png", channels=1)
    torch.testing.assert_close(narrow, image, rtol=0, atol=2 / 255)
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "c.png")
    wide, narrow = (load_image(tmp_path / "c.png", channels=1, bits=bits) for bits in (16, 8))
    torch.testing.assert_close(wide, narrow, rtol=0, atol=1e-6)


def test_sixteen_bits_are_for_greyscale(tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(UserError, match="bits=16 is for greyscale, got channels=3"):
        load_image(tmp_path / "a.png", channels=3, bits=16)
    with pytest.raises(UserError, match="bits=16 is for greyscale"):
        save_image(torch.zeros(3, 4, 4), tmp_path / "b.png", bits=16)
    with pytest.raises(UserError, match="bits=12: images have 8 or 16"):
        load_image(tmp_path / "a.png", channels=1, bits=12)
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match=r"f\.tif: holds 32-bit floating-point"):
        load_image(tmp_path / "f.tif", channels=1, bits=16)
    with pytest.raises(UserError, match=r"c\.jpg: cannot be written"):
        save_image(torch.zeros(1, 4, 4), tmp_path / "c.jpg", bits=16)
    with pytest.raises(UserError, match="cannot be written"):  # a file in the way of its folder
        save_image(torch.ones(3, 4, 4), tmp_path / "a.png" / "b.png")
    with pytest.raises(ValueError, match=r"\(C, H, W\).*got \(2, 3, 4, 4\)"):
        save_image(torch.zeros(2, 3, 4, 4), tmp_path / "b.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_saved_is_what_is_loaded(tmp_path, channels):
    levels = torch.arange(256).repeat(channels).view(channels, 16, 16)
    # Half a level up, so that truncation gives each level back.
    image = (levels + 0.5) / 255 * 2 - 1
    save_image(image, tmp_path / "new" / "a.png")
    loaded = load_image(tmp_path / "new" / "a.png", channels)
    assert torch.equal(((loaded + 1) / 2 * 255).round().long(), levels)


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_image(torch.ones(3, 4, 4), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match=r"a\.png: cannot be written \(No space left"):
        save_image(-torch.ones(3, 4, 4), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_saved_files_follow_the_umask(tmp_path):
    save_image(torch.ones(3, 4, 4), tmp_path / "a.png")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode
