"""The stream of unpaired samples: pure in (seed, index), whatever reads it."""

import shutil

import numpy as np
import pytest
import torch
from pictures import equal, folders, write
from torch.utils.data import DataLoader, Subset

from fastnce.data import UnpairedImages, load_image
from fastnce.errors import UserError

COUNT_A, COUNT_B = 5, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return folders(
        tmp_path_factory.mktemp("set"), {"trainA": COUNT_A, "trainB": COUNT_B}, size=(28, 24)
    )


def make(root, **arguments) -> UnpairedImages:
    return UnpairedImages(root, **({"load_size": 20, "crop_size": 16} | arguments))


def plain(root, **arguments) -> UnpairedImages:
    """Without any change to the images, so that a sample can be recognised."""
    return make(root, preprocess="none", flip=False, **arguments)


def names(dataset: UnpairedImages, index: int) -> tuple[int, int]:
    """Which file of A and which of B a sample of `plain` comes from."""
    sample = dataset[index]
    found = []
    for key, domain in (("A", dataset.a), ("B", dataset.b)):
        matches = [torch.equal(sample[key], load_image(path)) for path in domain.paths]
        assert sum(matches) == 1
        found.append(matches.index(True))
    return tuple(found)


def test_b_is_drawn_for_each_sample(root):
    dataset = plain(root)
    drawn = [names(dataset, index)[1] for index in range(60)]
    assert set(drawn) == set(range(COUNT_B))
    # Drawn, not in step with A's position.
    assert len({tuple(drawn[start : start + COUNT_A]) for start in range(0, 60, COUNT_A)}) > 4


def test_the_smaller_domain_is_repeated(root):
    dataset = plain(root, direction="BtoA")
    assert len(dataset) == COUNT_A
    order = [names(dataset, position)[0] for position in range(COUNT_A)]
    # Positions modulo 3 of a permutation of 5: two files come twice.
    assert sorted(order) == [0, 0, 1, 1, 2]


def test_serial_takes_both_in_order(root):
    dataset = plain(root, serial=True)
    assert [names(dataset, index) for index in range(7)] == [
        (0, 0), (1, 1), (2, 2), (3, 0), (4, 1), (0, 2), (1, 0),
    ]  # fmt: skip


def test_crop_jitter_ends_at_the_given_sample(root):
    jittered, settled = make(root), make(root, load_size=16)
    mixed = make(root, jitter_samples=10)
    for index in (0, 9):
        assert equal(mixed[index], jittered[index])
    for index in (10, 25, 9, 10):
        assert equal(mixed[index], (settled if index >= 10 else jittered)[index])
    assert not equal(jittered[10], settled[10])


def test_only_a_is_warped(root):
    warped, still = plain(root, augment_a="affine", serial=True), plain(root, serial=True)
    assert not torch.equal(warped[0]["A"], still[0]["A"])
    assert torch.equal(warped[0]["B"], still[0]["B"])


@pytest.fixture
def broken_root(root, tmp_path):
    """`root` with a file of A cut off after its header, and one that is no image at all."""
    shutil.copytree(root, tmp_path / "broken")
    folder = tmp_path / "broken" / "trainA"
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:200])
    (folder / "3.png").write_bytes(b"nothing")
    return tmp_path / "broken"


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_broken_files_are_skipped_named_once_and_change_no_other_sample(
    root, broken_root, cache_bytes, caplog
):
    whole = plain(root, serial=True)
    part = plain(broken_root, serial=True, broken_files="skip", cache_bytes=cache_bytes)
    assert len(part) == len(whole)
    for index in range(2 * COUNT_A):
        # In the place of file 1 comes 2, in the place of 3 comes 4.
        stand_in = {1: 2, 3: 4}.get(index % COUNT_A, index % COUNT_A)
        assert torch.equal(part[index]["A"], whole[stand_in]["A"])
        assert torch.equal(part[index]["B"], whole[index]["B"])
    assert part.broken_count == 2
    for name in ("1.png", "3.png"):
        assert sum(name in record.getMessage() for record in caplog.records) == 1


def test_workers_share_what_they_find_broken(broken_root):
    dataset = plain(broken_root, broken_files="skip", cache_bytes=0)
    list(DataLoader(Subset(dataset, range(20)), batch_size=2, num_workers=2))
    assert dataset.broken_count == 2


def test_broken_files_stop_unless_they_are_to_be_skipped(broken_root, root):
    with pytest.raises(UserError, match=r"3\.png: cannot be read as an image"):
        plain(broken_root, cache_bytes=0)
    shutil.copy(root / "trainA" / "3.png", broken_root / "trainA" / "3.png")
    dataset = plain(broken_root, serial=True, cache_bytes=0)
    with pytest.raises(UserError, match=r"1\.png: cannot be read as an image"):
        dataset[1]


@pytest.mark.parametrize("kept", [0, 200])
def test_a_folder_of_broken_files_is_a_mistake(broken_root, kept):
    """Also of files whose headers are whole, which are found when they are decoded."""
    for path in (broken_root / "trainB").iterdir():
        path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="trainB: none of its 3 files can be read"):
        plain(broken_root, broken_files="skip", cache_bytes=0)[0]


@pytest.fixture
def other_a(root, tmp_path):
    """`root` with other files, which the test writes, in the place of A's."""
    (tmp_path / "trainB").symlink_to(root / "trainB")
    return tmp_path


def test_fixsize_takes_the_size_of_each_folders_first_image(other_a):
    for name, shape in (("x.png", (16, 32, 3)), ("y.png", (50, 64, 3))):
        write(other_a / "trainA" / name, np.zeros(shape, np.uint8))
    dataset = make(other_a, preprocess="fixsize", serial=True)
    dataset.expect_one_size()
    for index in (0, 1):
        assert dataset[index]["A"].shape == (3, 16, 32)
        assert dataset[index]["B"].shape == (3, 24, 28)


def test_sizes_that_cannot_be_batched_are_named(root, other_a):
    for name, shape in (("x.png", (32, 32, 3)), ("y.png", (32, 64, 3))):
        write(other_a / "trainA" / name, np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match=r"y\.png: gives 64x32, but .*x\.png 32x32.*batch_size=1"):
        plain(other_a).expect_one_size()
    make(other_a).expect_one_size()
    with pytest.raises(UserError, match="random sizes.*_and_crop"):
        make(root, preprocess="zoom").expect_one_size()
    make(root, preprocess="zoom_and_crop").expect_one_size()
