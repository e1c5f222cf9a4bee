"""The demo sets: real, disjoint, the same each time, written whole or not at all."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fastnce.data import (
    demo,
    list_images,
    read_labels,
    samples,
    write_digits_photos,
    write_photos,
    write_single_photos,
)
from fastnce.errors import UserError

FOLDERS = ("trainA", "trainB", "testA", "testB")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits_photos(tmp_path_factory.mktemp("demo") / "digits")


def content(root) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_all_digits_are_used_once(digits):
    images = read_labels(digits)["images"]
    assert sorted(label["source"] for label in images.values()) == list(range(1797))
    on_disk = {
        path.relative_to(digits).as_posix()
        for folder in FOLDERS
        for path in list_images(digits / folder)
    }
    assert on_disk == set(images)


def test_folders_hold_the_same_share_of_every_digit(digits):
    images = read_labels(digits)["images"]
    count = Counter((name.split("/")[0], label["digit"]) for name, label in images.items())
    for digit in range(10):
        for one, other in (("trainA", "trainB"), ("testA", "testB")):
            assert abs(count[one, digit] - count[other, digit]) <= 1
    sizes = [sum(count[folder, digit] for digit in range(10)) for folder in FOLDERS]
    assert sizes[2] / (sizes[0] + sizes[2]) == pytest.approx(1 / 3, abs=0.01)


def test_the_order_tells_nothing_about_the_pairs(digits):
    images = read_labels(digits)["images"]
    same = [
        images[f"trainA/{number:04d}.png"]["digit"] == images[f"trainB/{number:04d}.png"]["digit"]
        for number in range(500)
    ]
    # One in ten by chance; 0.067 is five standard deviations of 500 draws.
    assert np.mean(same) == pytest.approx(0.1, abs=0.067)


def test_labels_are_scikit_learns(digits):
    target = samples.load_digits()[1]
    for label in read_labels(digits)["images"].values():
        assert label["digit"] == target[label["source"]]


def test_b_is_the_photograph_inverted_under_the_ink(digits):
    strokes, photo = samples.load_digits()[0], samples.load_background("coffee")
    images = read_labels(digits)["images"]
    for name in ("trainB/0000.png", "testB/0100.png"):
        label = images[name]
        y, x = label["corner"]
        ground = photo[y : y + 32, x : x + 32] / 255
        expected = np.abs(ground - strokes[label["source"]][:, :, None]) * 255
        assert np.abs(np.asarray(Image.open(digits / name)) - expected).max() <= 0.5 + 1e-4


def test_a_is_white_on_black_with_noise_of_sigma_0_2(digits):
    strokes = samples.load_digits()[0]
    images = read_labels(digits)["images"]
    names = [name for name in images if name.startswith("trainA")][:50]
    values = np.stack([np.asarray(Image.open(digits / name)) for name in names]) / 255
    ink = np.stack([strokes[images[name]["source"]] for name in names])
    middle = values[(ink > 0.45) & (ink < 0.55)]  # where clipping hardly matters
    assert middle.std() == pytest.approx(0.2, abs=0.01)
    black = values[ink == 0]
    # The positive half of a Gaussian of sigma 0.2: half are 0, the mean is 0.2 / sqrt(2 pi).
    assert black.mean() == pytest.approx(0.2 / np.sqrt(2 * np.pi), abs=0.002)
    assert values[ink > 0.99].mean() > 0.9


def test_a_second_call_with_the_same_arguments_writes_nothing(digits):
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    assert write_digits_photos(digits) == digits
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*")} == before


def test_the_same_seed_gives_the_same_bytes_and_another_another_set(digits, tmp_path):
    assert content(write_digits_photos(tmp_path / "again")) == content(digits)
    other = read_labels(write_digits_photos(tmp_path / "other", seed=1, photo="china"))
    assert other["images"] != read_labels(digits)["images"]


def test_another_set_is_not_written_over(digits, tmp_path):
    with pytest.raises(UserError, match="holds something else already"):
        write_digits_photos(digits, seed=1)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds something else already"):
        write_photos(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_a_stopped_run_leaves_nothing_and_is_redone(tmp_path, monkeypatch):
    whole = demo._photos
    out = tmp_path / "set"

    def stopped(*arguments):
        for number, image in enumerate(whole(*arguments)):
            if number == 3:
                raise KeyboardInterrupt
            yield image

    monkeypatch.setattr(demo, "_photos", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_photos(out, 16, train_count=4, test_count=2)
    assert list(tmp_path.iterdir()) == []
    # What a power cut leaves, which no `finally` can clean up.
    (tmp_path / ".set.partial" / "trainA").mkdir(parents=True)
    (tmp_path / ".set.partial" / "trainA" / "9999.png").write_text("half")
    monkeypatch.setattr(demo, "_photos", whole)
    write_photos(out, 16, train_count=4, test_count=2)
    assert len(list_images(out / "trainA")) == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    write_photos(tmp_path / "empty", 16, train_count=2, test_count=1)
    assert len(list_images(tmp_path / "empty" / "testB")) == 1


@pytest.mark.parametrize("size", [128, 256])
def test_crops_for_training_and_testing_share_no_pixel(tmp_path, size):
    root = write_photos(tmp_path / "photos", size, train_count=12, test_count=6)
    images = read_labels(root)["images"]
    for domain in "AB":
        edges = {"train": [], "test": []}
        for name, label in images.items():
            if name.split("/")[0][-1] == domain:
                y, x = label["corner"]
                edges[name[: name.index(domain)]].append(x)
                pixels = samples.load_photo(label["photo"])[y : y + size, x : x + size]
                assert np.array_equal(np.asarray(Image.open(root / name)), pixels)
        assert max(edges["train"]) + size <= min(edges["test"])
    assert {label["photo"] for label in images.values()} == {"coffee", "motorcycle"}


def test_single_photos_are_whole_photographs_scaled(tmp_path):
    root = write_single_photos(tmp_path / "single", 96)
    assert set(read_labels(root)["images"]) == {"trainA/china.png", "trainB/rocket.png"}
    for path, photo in (
        (root / "trainA/china.png", "china"),
        (root / "trainB/rocket.png", "rocket"),
    ):
        image = Image.open(path)
        assert image.size == (round(640 * 96 / 427), 96)
        original = samples.load_photo(photo).mean(axis=(0, 1))
        assert np.asarray(image).mean(axis=(0, 1)) == pytest.approx(original, abs=1)
    assert write_single_photos(root, 96) == root


@pytest.mark.parametrize("name", samples.PHOTOS)
def test_photographs_are_in_the_installed_packages(name):
    photo = samples.load_photo(name)
    assert photo.dtype == np.uint8 and photo.shape[2] == 3 and min(photo.shape[:2]) >= 300


def test_mistakes_are_explained(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='photo="lena".*coffee, astronaut'):
        write_digits_photos(tmp_path / "a", photo="lena")
    with pytest.raises(UserError, match="size=512.*600x400"):
        write_photos(tmp_path / "b", 512)
    with pytest.raises(UserError, match='both "coffee"'):
        write_photos(tmp_path / "c", photo_b="coffee")
    with pytest.raises(UserError, match='both "coffee"'):
        write_single_photos(tmp_path / "c", photo_a="coffee", photo_b="coffee")
    for size in (7, 428):
        with pytest.raises(UserError, match=f'size={size}: .*"china" has 640x427.*8 to 427'):
            write_single_photos(tmp_path / "d", size)
    with pytest.raises(UserError, match=r"no labels\.json"):
        read_labels(tmp_path)
    (tmp_path / "labels.json").write_text("{")
    with pytest.raises(UserError, match=r"labels\.json: cannot be read"):
        read_labels(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps({"recipe": {}}))
    with pytest.raises(UserError, match="no images in it"):
        read_labels(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["labels.json"]
    monkeypatch.setattr(samples.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"scikit-image, which is not installed.*pip install"):
        samples.load_photo("coffee")


def test_scikit_learn_missing_is_explained(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"scikit-learn, which is not installed.*pip install"):
        samples.load_digits()
