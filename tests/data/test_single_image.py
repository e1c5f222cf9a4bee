"""Patches of single images: pure in (seed, index), equal to the patches of a whole image that was shrunk."""

import shutil

import numpy as np
import pytest
import torch
from pictures import levels, write
from PIL import Image

from fastnce.data import SingleImagePatches, load_image
from fastnce.data.images import to_array, to_tensor
from fastnce.data.single_image import shrunk_patch
from fastnce.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One smooth image of A, 60x48, with x in red and y in green, and two of B: a black and a noisy one."""
    root = tmp_path_factory.mktemp("single")
    y, x = np.mgrid[:48, :60]
    gradient = np.stack([x * 4, y * 5, 0 * x], axis=2).astype(np.uint8)
    noisy = levels(40, 50, 3) // 2 + 128
    for name, pixels in (("A/a", gradient), ("B/black", 0 * noisy), ("B/noise", noisy)):
        write(root / f"train{name}.png", pixels)
    return root


def make(root, **arguments) -> SingleImagePatches:
    return SingleImagePatches(root, **({"crop_size": 16} | arguments))


@pytest.mark.parametrize("size", [(53, 31), (34, 47), (60, 48), (20, 16)])
def test_a_patch_is_that_of_the_shrunk_image(size):
    """To one level of 256, also at the patch's borders, where the kernel reads beyond it.

    The noise leaves room for the kernel's overshoot: where that is clipped, the order of the two passes matters.
    """
    pixels = np.random.default_rng(1).integers(80, 176, (48, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    whole = to_array(image.resize(size, Image.Resampling.BICUBIC)).astype(int)
    for left, top in ((0, 0), (size[0] - 16, size[1] - 16), (2, 0)):
        patch = to_array(shrunk_patch(image, size, (left, top), 16)).astype(int)
        expected = whole[top : top + 16, left : left + 16]
        assert np.abs(patch - expected).max() <= 1


def test_zooms_and_places_cover_the_image(root):
    """Red and green tell where in the image each pixel of a patch was: zoom and corner can be read off."""
    dataset = make(root, flip=False)
    zooms, places = [], []
    for index in range(300):
        red, green = ((dataset[index]["A"][channel] + 1) * 127.5 for channel in (0, 1))
        x, y = red[8] / 4, green[:, 8] / 5
        zooms.append([(x[12] - x[3]).item() / 9, (y[12] - y[3]).item() / 9])
        places.append([x[8].item(), y[8].item()])
    zooms, places = np.array(zooms), np.array(places)
    # 60 pixels are shrunk to 20... 60, 48 to 16... 48.
    assert zooms.min() == pytest.approx(1.0, abs=0.03)
    assert zooms.max() == pytest.approx(3.0, abs=0.15)
    # Width and height are shrunk independently; shares are uniform, so their mean is 2/3.
    assert abs(np.corrcoef(zooms.T)[0, 1]) < 0.2
    assert (1 / zooms).mean() == pytest.approx(2 / 3, abs=0.05)
    assert places.min(axis=0) == pytest.approx([8.5, 8.5], abs=2.5)
    assert places.max(axis=0) == pytest.approx([51.5, 39.5], abs=2.5)


def test_no_zoom(root):
    """With max_zoom_out=1 every patch is cut out of the image itself."""
    dataset = make(root, max_zoom_out=1.0, flip=False)
    image = load_image(root / "trainA" / "a.png")
    windows = image.unfold(1, 16, 1).unfold(2, 16, 1)  # (C, y, x, 16, 16)
    for index in range(5):
        patch = dataset[index]["A"][:, None, None]
        assert (windows == patch).all(dim=(0, 3, 4)).sum() == 1


def test_images_of_a_folder_are_drawn_equally_and_independently(root):
    dataset = make(root)
    noisy = [(dataset[index]["B"].max() > 0).item() for index in range(200)]
    assert sum(noisy) / 200 == pytest.approx(0.5, abs=0.12)


def test_direction(root):
    forth, back = make(root), make(root, direction="BtoA")
    assert back[3]["B"][2].max() == -1  # trainA has no blue
    assert forth[3]["A"][2].max() == -1


def test_an_image_as_large_as_the_patch(root):
    image = Image.open(root / "trainB" / "noise.png")
    whole = to_tensor(to_array(image.resize((40, 40), Image.Resampling.BICUBIC)))
    dataset = make(root, direction="BtoA", crop_size=40, flip=False)
    matches = [torch.allclose(dataset[i]["A"], whole, atol=2.1 / 127.5) for i in range(20)]
    assert any(matches) and not all(matches)  # where the width was shrunk to 40 too


def test_broken_files_are_left_out_if_they_are_to_be_skipped(root, tmp_path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    (tmp_path / "trainA" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"broken\.png: cannot be read as an image"):
        make(tmp_path)
    assert torch.equal(make(tmp_path, broken_files="skip")[3]["A"], make(root)[3]["A"])
