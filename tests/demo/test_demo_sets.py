"""The built-in sets: real, stratified, disjoint, the same each time, written whole or not at all."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from fastnce import cli
from fastnce.data import list_images
from fastnce.demo import (
    PHOTOS,
    read_labels,
    sets,
    write_digits,
    write_digits_photos,
    write_photo_crops,
    write_photos,
    write_single_photos,
)
from fastnce.errors import UserError


def small_crops(out, **settings):
    return write_photo_crops(out, train_count=30, test_count=10, **settings)


WRITERS = {"digits": write_digits, "digits-photos": write_digits_photos, "photo-crops": small_crops}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {name: write(folder / name) for name, write in WRITERS.items()}


def content(root) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.*")}


def pixels(root, name) -> np.ndarray:
    with Image.open(root / name) as image:
        return np.asarray(image)


@pytest.mark.parametrize("name", WRITERS)
def test_the_files_are_those_of_the_labels_and_depend_on_the_seed_alone(name, roots, tmp_path):
    root, images = roots[name], read_labels(roots[name])["images"]
    assert {path.relative_to(root).as_posix() for path in list_images(root)} == set(images)
    assert content(WRITERS[name](tmp_path / "again")) == content(root)
    assert read_labels(WRITERS[name](tmp_path / "other", seed=1))["images"] != images
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert WRITERS[name](root) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize("name", ["digits", "digits-photos"])
def test_every_digit_is_used_once_and_a_third_of_each_is_for_testing(name, roots):
    images = read_labels(roots[name])["images"]
    assert sorted(label["source"] for label in images.values()) == list(range(1797))
    target = sets.load_digits()[1]
    count = Counter()
    for file, label in images.items():
        assert label["digit"] == target[label["source"]]
        assert name == "digits-photos" or file.split("/")[1] == str(label["digit"])
        count[file.split("/")[0], label["digit"]] += 1
    for digit in range(10):
        folders = {folder: number for (folder, shown), number in count.items() if shown == digit}
        tested = sum(number for folder, number in folders.items() if folder.startswith("test"))
        assert abs(tested - sum(folders.values()) / 3) < 2
        for one, other in (("trainA", "trainB"), ("testA", "testB")):
            assert abs(folders.get(one, 0) - folders.get(other, 0)) <= 1


def test_the_order_tells_nothing_about_the_pairs(roots):
    images = read_labels(roots["digits-photos"])["images"]
    digits = [
        [images[f"train{domain}/{number:04d}.png"]["digit"] for number in range(500)]
        for domain in "AB"
    ]
    # One in ten by chance; 0.067 is five standard deviations of 500 draws.
    assert np.equal(*digits).mean() == pytest.approx(0.1, abs=0.067)


def test_b_is_the_photograph_inverted_under_the_ink(roots):
    root = roots["digits-photos"]
    strokes, photo = sets.load_digits()[0], sets.scaled_photo("coffee")
    for name in ("trainB/0000.png", "testB/0100.png"):
        label = read_labels(root)["images"][name]
        y, x = label["corner"]
        ground = photo[y : y + 32, x : x + 32] / 255
        expected = np.abs(ground - strokes[label["source"]][:, :, None]) * 255
        assert np.abs(pixels(root, name) - expected).max() <= 0.5 + 1e-4


def test_a_is_white_on_black_with_noise_of_sigma_0_2(roots):
    root = roots["digits-photos"]
    images = read_labels(root)["images"]
    names = [name for name in images if name.startswith("trainA")][:50]
    values = np.stack([pixels(root, name) for name in names]) / 255
    ink = sets.load_digits()[0][[images[name]["source"] for name in names]]
    middle = values[(ink > 0.45) & (ink < 0.55)]  # where clipping hardly matters
    assert middle.std() == pytest.approx(0.2, abs=0.01)
    # The positive half of a Gaussian of sigma 0.2: half are 0, the mean is 0.2 / sqrt(2 pi).
    assert values[ink == 0].mean() == pytest.approx(0.2 / np.sqrt(2 * np.pi), abs=0.002)
    assert values[ink > 0.99].mean() > 0.9


def test_digits_are_the_originals_enlarged(roots, tmp_path):
    images = read_labels(roots["digits"])["images"]
    large = write_digits(tmp_path / "large", size=32)
    assert read_labels(large)["images"] == images  # the same split
    from sklearn.datasets import load_digits

    originals = load_digits().images
    for name in ("train/3/0000.png", "test/8/0011.png"):
        for root, side in ((roots["digits"], 16), (large, 32)):
            # Each original pixel is about the mean of those that it became.
            blocks = pixels(root, name).reshape(8, side // 8, 8, side // 8).mean((1, 3))
            assert np.corrcoef(blocks.flat, originals[images[name]["source"]].flat)[0, 1] > 0.98


@pytest.mark.parametrize("look", ["thin", "bold", "fading"])
def test_looks_show_the_same_digits(roots, tmp_path, look):
    root = write_digits(tmp_path / look, look=look)
    assert read_labels(root)["images"] == read_labels(roots["digits"])["images"]
    plain, other = (pixels(x, "train/8/0000.png").astype(float) for x in (roots["digits"], root))
    assert (other[plain == 0] <= 1).all() and np.corrcoef(plain.flat, other.flat)[0, 1] > 0.8
    more = other.mean() > plain.mean()
    assert more == (look == "bold") and np.abs(plain - other).max() > 40
    if look == "fading":
        assert other[:8].sum() / plain[:8].sum() > 1.5 * other[8:].sum() / plain[8:].sum()


@pytest.mark.parametrize("size", [None, 128, 256])
def test_crops_for_training_and_testing_share_no_pixel(size, roots, tmp_path):
    """With a size those of `write_photos`, else those of the labelled set."""
    root, side = roots["photo-crops"], size or 32
    if size:
        root = write_photos(tmp_path / "photos", size, train_count=12, test_count=6)
    whole = {x: sets.load_photo(x) if size else sets.scaled_photo(x) for x in PHOTOS}
    columns, rows = defaultdict(list), set()
    for name, label in read_labels(root)["images"].items():
        photo, (y, x) = label["photo"], label["corner"]
        columns[photo, name.startswith("train")].append(x)
        rows.add(y)
        assert size or name.split("/")[1] == photo
        assert np.array_equal(pixels(root, name), whole[photo][y : y + side, x : x + side])
    photos = {photo for photo, _ in columns}
    assert photos == ({"coffee", "motorcycle"} if size else set(PHOTOS))
    for photo in photos:
        assert max(columns[photo, True]) + side <= min(columns[photo, False])
    assert len(rows) > 7


def test_single_photos_are_whole_photographs_scaled(tmp_path):
    root = write_single_photos(tmp_path / "single", 96)
    names = {"china": "trainA/china.png", "rocket": "trainB/rocket.png"}
    assert set(read_labels(root)["images"]) == set(names.values())
    for photo, name in names.items():
        assert pixels(root, name).shape == (96, round(640 * 96 / 427), 3)
        original = sets.load_photo(photo).mean(axis=(0, 1))
        assert pixels(root, name).mean(axis=(0, 1)) == pytest.approx(original, abs=1)


@pytest.mark.parametrize("name", PHOTOS)
def test_photographs_are_in_the_installed_packages(name):
    photo = sets.load_photo(name)
    assert photo.dtype == np.uint8 and photo.shape[2] == 3 and min(photo.shape[:2]) >= 300


def test_another_set_is_not_written_over_and_an_empty_folder_is_taken(roots, tmp_path):
    with pytest.raises(UserError, match="holds something else already"):
        write_digits_photos(roots["digits-photos"], seed=1)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds something else already"):
        write_photos(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    write_photos(tmp_path / "empty", 16, train_count=2, test_count=1)
    assert len(list_images(tmp_path / "empty" / "testB")) == 1


def test_a_stopped_run_leaves_nothing_and_is_redone(tmp_path, monkeypatch):
    saved, save = [], Image.Image.save

    def stopped(image, path):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(image, path)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            write_photos(tmp_path / "set", 16, train_count=4, test_count=2)
    assert list(tmp_path.iterdir()) == []
    # A power cut leaves these, which no `finally` can clean up.
    (tmp_path / ".set.partial" / "trainA").mkdir(parents=True)
    (tmp_path / ".set.partial" / "trainA" / "9999.png").write_text("half")
    write_photos(tmp_path / "set", 16, train_count=4, test_count=2)
    assert len(list_images(tmp_path / "set" / "trainA")) == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    "command, option, value",
    [("digits", "size", 32), ("photo-crops", "seed", 3), ("single-photos", "size", 64)],
)
def test_the_command_passes_its_options_on(command, option, value, tmp_path):
    out = str(tmp_path / "set")
    assert cli.main(["data", command, "--out", out, f"--{option}", str(value)]) == 0
    recipe = read_labels(out)["recipe"]
    assert recipe["kind"] == command and recipe[option] == value


@pytest.mark.parametrize(
    "write, settings, message",
    [
        (write_digits_photos, {"photo": "lena"}, 'photo="lena".*coffee, astronaut'),
        (write_digits_photos, {"photo": ["coffee", "coffee"]}, "photo=.*none of them twice"),
        (write_digits_photos, {"photo": []}, "photo=.*at least one"),
        (write_photos, {"size": 512}, "size=512.*600x400"),
        (write_photos, {"photo_b": "coffee"}, 'both "coffee"'),
        (write_single_photos, {"photo_b": "china"}, 'both "china"'),
        (write_single_photos, {"size": 7}, "size=7: .*640x427.*8 to 427"),
        (write_single_photos, {"size": 428}, "size=428: .*640x427.*8 to 427"),
        (write_digits, {"size": 20}, "size=20.*16 or 32"),
        (write_digits, {"look": "tin"}, "unknown look 'tin'. Did you mean 'thin'?"),
        (write_photo_crops, {"test_count": 0}, "test_count=0.*at least 1"),
    ],
)
def test_mistakes_are_explained_and_leave_nothing(write, settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "set", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"no labels\.json"),
        ("{", r"labels\.json: cannot be read"),
        (json.dumps({"recipe": {}}), "no images in it"),
    ],
)
def test_labels_that_cannot_be_read(text, message, tmp_path):
    if text is not None:
        (tmp_path / "labels.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_labels(tmp_path)


def test_missing_packages_are_explained(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"scikit-image, which is not installed.*pip install"):
        sets.load_photo("coffee")
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"scikit-learn, which is not installed.*pip install"):
        sets.load_digits()
