"""The labelled demo sets: real, stratified, with parts that share nothing, the same each time."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fastnce import cli
from fastnce.data import list_images, read_labels, samples, write_digits, write_photo_crops
from fastnce.errors import UserError


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("demo") / "digits")


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "crops"
    return write_photo_crops(out, train_count=30, test_count=10)


def content(root) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in list_images(root)}


def test_every_digit_is_written_once_into_its_class(digits):
    images = read_labels(digits)["images"]
    assert sorted(label["source"] for label in images.values()) == list(range(1797))
    assert set(content(digits)) == set(images)
    target = samples.load_digits()[1]
    for name, label in images.items():
        assert int(name.split("/")[1]) == label["digit"] == target[label["source"]]


def test_a_third_of_each_class_is_for_testing(digits):
    count = Counter(tuple(name.split("/")[:2]) for name in content(digits))
    for digit in "0123456789":
        total = count["train", digit] + count["test", digit]
        assert abs(count["test", digit] - total / 3) < 1


def test_digits_are_the_originals_enlarged(digits, tmp_path):
    images = read_labels(digits)["images"]
    large = write_digits(tmp_path / "large", size=32)
    assert read_labels(large)["images"] == images  # the same split
    from sklearn.datasets import load_digits

    originals = load_digits().images
    for name in ("train/3/0000.png", "test/8/0011.png"):
        for root, side in ((digits, 16), (large, 32)):
            with Image.open(root / name) as image:
                assert image.mode == "L" and image.size == (side, side)
                pixels = np.asarray(image) / 255
            # Each original pixel is about the mean of those that it became.
            blocks = pixels.reshape(8, side // 8, 8, side // 8).mean((1, 3))
            assert np.corrcoef(blocks.flat, originals[images[name]["source"]].flat)[0, 1] > 0.98


def test_the_split_is_drawn_from_the_seed(digits, tmp_path):
    assert content(write_digits(tmp_path / "again")) == content(digits)
    other = read_labels(write_digits(tmp_path / "other", seed=1))["images"]
    assert other != read_labels(digits)["images"]


def test_crops_for_training_and_testing_share_no_pixel(crops):
    images = read_labels(crops)["images"]
    assert set(content(crops)) == set(images)
    whole = {photo: samples.load_background(photo) for photo in samples.PHOTOS}
    edges = {}
    for name, label in images.items():
        split, photo, _ = name.split("/")
        assert label["photo"] == photo
        y, x = label["corner"]
        edges.setdefault((photo, split), []).append(x)
        with Image.open(crops / name) as image:
            expected = whole[photo][y : y + 32, x : x + 32]
            assert np.array_equal(np.asarray(image), expected)
    for photo in samples.PHOTOS:
        assert len(edges[photo, "train"]) == 30 and len(edges[photo, "test"]) == 10
        assert max(edges[photo, "train"]) + 32 <= min(edges[photo, "test"])


def test_crops_are_drawn_from_the_seed_and_for_each_photograph(crops, tmp_path):
    again = write_photo_crops(tmp_path / "again", train_count=30, test_count=10)
    assert content(again) == content(crops)
    other = write_photo_crops(tmp_path / "other", train_count=30, test_count=10, seed=1)
    assert read_labels(other)["images"] != read_labels(crops)["images"]
    rows = {
        label["corner"][0] for name, label in read_labels(crops)["images"].items() if "0000" in name
    }
    assert len(rows) > 7  # of 14


def test_the_command_writes_both(tmp_path):
    assert cli.main(["data", "digits", "--out", str(tmp_path / "digits"), "--size", "32"]) == 0
    assert read_labels(tmp_path / "digits")["recipe"]["size"] == 32
    assert cli.main(["data", "photo-crops", "--out", str(tmp_path / "crops"), "--seed", "3"]) == 0
    assert read_labels(tmp_path / "crops")["recipe"]["seed"] == 3


def test_mistakes_are_explained(digits, tmp_path):
    with pytest.raises(UserError, match="size=20.*16 or 32"):
        write_digits(tmp_path / "a", size=20)
    with pytest.raises(UserError, match="test_count=0.*at least 1"):
        write_photo_crops(tmp_path / "b", test_count=0)
    with pytest.raises(UserError, match="holds something else already, not the digits set"):
        write_digits(digits, size=32)
    assert list(tmp_path.iterdir()) == []
