"""The stream of pairs: which files belong together, and what happens to both alike."""

import numpy as np
import pytest
import torch
from pictures import equal, levels, write

from fastnce.data import AlignedImages
from fastnce.errors import UserError

COUNT = 6
IMAGES = levels(COUNT, 24, 28, 3)


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory):
    """Pairs: B is the negative of A."""
    root = tmp_path_factory.mktemp("side_by_side")
    for number, image in enumerate(IMAGES):
        write(root / "train" / f"{number}.png", np.concatenate([image, 255 - image], axis=1))
    return root


@pytest.fixture
def two_folders(tmp_path):
    for number, image in enumerate(IMAGES):
        write(tmp_path / "trainA" / f"{number}.png", image)
        write(tmp_path / "trainB" / f"{number}.bmp", 255 - image)
    return tmp_path


def make(root, **arguments) -> AlignedImages:
    return AlignedImages(root, **({"load_size": 20, "crop_size": 16} | arguments))


def test_both_images_of_a_pair_are_changed_alike(side_by_side):
    """As B is A's negative, their sum shows any difference in pair, crop or mirroring."""
    dataset = make(side_by_side, preprocess="crop")
    seen = set()
    for index in range(40):
        sample = dataset[index]
        assert sample["A"].shape == (3, 16, 16)
        torch.testing.assert_close(sample["A"], -sample["B"], rtol=0, atol=1e-6)
        seen.add(sample["A"].numpy().tobytes())
    assert len(seen) == 40  # crops and mirroring are random
    scaled = make(side_by_side)[0]
    torch.testing.assert_close(scaled["A"], -scaled["B"], rtol=0, atol=0.02)  # rounded to 8 bits


def test_the_layouts_give_the_same_stream(side_by_side, two_folders):
    one, other = make(side_by_side), make(two_folders)
    assert len(one) == len(other) == COUNT
    assert all(equal(one[index], other[index]) for index in range(2 * COUNT))


def test_serial_takes_them_in_order(side_by_side):
    in_order = make(side_by_side, preprocess="none", flip=False, serial=True)
    first = torch.from_numpy(IMAGES[0]).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(in_order[0]["A"], first, rtol=0, atol=1e-5)


def test_val_stands_in_for_test(side_by_side, tmp_path):
    (tmp_path / "val").symlink_to(side_by_side / "train")
    assert len(make(tmp_path, split="test")) == COUNT
    with pytest.raises(UserError, match="no folder train. Expected .* Found val"):
        make(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        make(tmp_path / "nowhere")


def test_a_file_without_partner(two_folders):
    (two_folders / "trainB" / "3.bmp").unlink()
    with pytest.raises(UserError, match="trainB: holds no 3, but its partner folder does"):
        make(two_folders)


def test_a_pair_of_different_sizes(two_folders):
    write(two_folders / "trainB" / "2.bmp", np.zeros((24, 30, 3), np.uint8))
    with pytest.raises(UserError, match=r"2\.bmp: is 30x24, but its partner .*2\.png 28x24"):
        make(two_folders)


@pytest.mark.parametrize("where", ["trainA/2.png", "trainB/2.bmp"])
@pytest.mark.parametrize("kept", [0, 300])
def test_broken_files_are_skipped_as_pairs(two_folders, caplog, where, kept):
    """Also one whose header is whole, which is found only when it is decoded."""
    path = two_folders / where
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=path.name):
        list(make(two_folders))
    caplog.clear()
    dataset = make(two_folders, broken_files="skip", preprocess="crop", cache_bytes=0)
    for index in range(2 * COUNT):
        sample = dataset[index]
        torch.testing.assert_close(sample["A"], -sample["B"], rtol=0, atol=1e-6)
    assert dataset.broken_count == 1
    assert len([record for record in caplog.records if path.name in record.message]) == 1
