"""The stream of labelled samples: pure in (seed, index), whatever reads it, with the right labels."""

from collections import Counter

import numpy as np
import pytest
import torch
from pictures import equal, levels, write
from PIL import Image

from fastnce.data import LabelledImages, labelled
from fastnce.errors import UserError

CLASSES = {"cat": 3, "dog": 4, "eel": 2}


def write_classes(folder, classes=CLASSES, size=(8, 8)):
    """Noise, but the upper left pixel tells the class and the number: (10 x class, 10 x number, 0)."""
    for label, (name, count) in enumerate(classes.items()):
        for number, pixels in enumerate(levels(count, *size, 3)):
            pixels[0, 0] = 10 * label, 10 * number, 0
            write(folder / name / f"{number}.png", pixels)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    write_classes(root / "train")
    write_classes(root / "test", {"cat": 1, "dog": 2, "eel": 1})
    return root


def make(root, split="train", **arguments) -> LabelledImages:
    return LabelledImages(root, split, **({"image_size": 8} | arguments))


def corner(sample) -> tuple[int, int]:
    """Class and number of an image that was not flipped."""
    red, green, _ = ((sample["image"][:, 0, 0] + 1) / 2 * 255).round().int().tolist()
    return red // 10, green // 10


def test_labels_belong_to_their_images(root):
    for split in ("train", "test"):
        dataset = make(root, split, flip=False)
        assert dataset.class_names == ("cat", "dog", "eel") and dataset.num_classes == 3
        for index in range(30):
            assert corner(dataset[index])[0] == dataset[index]["label"]
            image = dataset.image_index(index)
            assert torch.equal(dataset.image(image), dataset[index]["image"])
            assert dataset.labels[image] == dataset[index]["label"]
    assert dataset.labels.tolist() == [0, 1, 1, 2]


def test_all_images_come_in_the_order_of_the_files(root):
    dataset = make(root)
    images, labels = dataset.all_images()
    assert images.shape == (9, 3, 8, 8) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    for image, label in zip(images, labels, strict=True):
        path = root / "train" / dataset.class_names[label] / f"{image[1, 0, 0] // 10}.png"
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))
    labels += 1
    assert dataset.labels[0] == 0


def test_images_are_cut_to_their_central_square_and_scaled(tmp_path):
    write_classes(tmp_path / "train", size=(20, 30))
    dataset = make(tmp_path, image_size=10)
    image = Image.open(tmp_path / "train" / "cat" / "0.png")
    whole = image.crop((5, 0, 25, 20))
    expected = whole.resize((10, 10), Image.Resampling.BICUBIC)
    assert np.array_equal(dataset.pixels(0), np.asarray(expected))
    assert np.array_equal(make(tmp_path, image_size=20).pixels(0), np.asarray(whole))
    assert make(tmp_path, image_size=10, channels=1)[0]["image"].shape == (1, 10, 10)


@pytest.mark.parametrize("name", ["valid", "val"])
def test_the_held_out_folder_may_have_other_names(root, tmp_path, name):
    (tmp_path / "train").symlink_to(root / "train")
    (tmp_path / name).symlink_to(root / "test")
    for split in ("test", "valid", "val"):
        assert len(make(tmp_path, split)) == 4
    with pytest.raises(UserError, match="holds no folder extra"):
        make(tmp_path, "extra")


@pytest.fixture
def tiny_imagenet(tmp_path):
    for name in ("n01", "n02"):
        write_classes(tmp_path / "train" / name, {"images": 2})
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("")
    write_classes(tmp_path / "val", {"images": 3})
    write_classes(tmp_path / "test", {"images": 2})
    lines = [f"{k}.png\t{name}\t0\t0\t5\t5\n" for k, name in enumerate(("n02", "n01", "n02"))]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


def test_tiny_imagenet_as_distributed(tiny_imagenet):
    train = make(tiny_imagenet)
    assert train.class_names == ("n01", "n02") and train.labels.tolist() == [0, 0, 1, 1]
    for split in ("test", "valid", "val"):  # its own test images have no labels
        held_out = make(tiny_imagenet, split, flip=False)
        assert held_out.labels.tolist() == [1, 0, 1]
        assert [corner({"image": held_out.image(k)})[1] for k in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    "text, message",
    [
        ("0.png\tn07\t0\t0\t5\t5\n", "line 1: is of the class n07"),
        ("0.png n02\n", "line 1 is '0.png n02'"),
        ("", "is empty"),
    ],
)
def test_tiny_imagenet_with_damaged_annotations(text, message, tiny_imagenet):
    (tiny_imagenet / "val" / "val_annotations.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        make(tiny_imagenet, "test")


@pytest.mark.parametrize(
    "change, split, message",
    [
        (lambda root: (root / "test").rename(root / "held"), "test", "test or valid or val.*found held, t"),
        (lambda root: (root / "test" / "fox").mkdir(), "test", "test/fox"),
        (lambda root: (root / "test" / "eel").rename(root / "test" / "fox"), "test", "is of the class fox.*train"),
        (lambda root: (root / "train" / "fox").mkdir(), "train", "fox: holds no i"),
    ],
)  # fmt: skip
def test_mistakes_stop_before_the_first_sample(change, split, message, tmp_path):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "test")
    change(tmp_path)
    with pytest.raises(UserError, match=message) as info:
        make(tmp_path, split)
    assert "\n" not in str(info.value)


def test_classes_that_are_no_two(tmp_path):
    write_classes(tmp_path / "train", {"cat": 2})
    with pytest.raises(UserError, match="the one class folder cat. Expected two or more"):
        make(tmp_path)
    write_classes(tmp_path / "other", {"train": 2})
    with pytest.raises(UserError, match=r"no folder for a class.*found 0\.png, 1\.png"):
        make(tmp_path / "other")


def test_classes_may_be_chosen_and_others_are_left_out_with_a_word(root, caplog):
    dataset = make(root, classes=("eel", "cat"), flip=False)
    assert dataset.class_names == ("eel", "cat") and dataset.labels.tolist() == [1, 1, 1, 0, 0]
    for index in range(10):  # the pixels tell the class among all three
        assert corner(dataset[index])[0] == {0: 2, 1: 0}[int(dataset[index]["label"])]
    assert "images of dog are left out" in caplog.text
    same = make(root, classes=("cat", "dog", "eel"))
    assert all(equal(same[index], make(root)[index]) for index in range(20))
    with pytest.raises(UserError, match="class_names=cat, fox: .* has no class fox. It has cat, d"):
        make(root, classes=("cat", "fox"))
    with pytest.raises(UserError, match="class_names=cat, cat: a class is named twice"):
        make(root, classes=("cat", "cat"))


@pytest.mark.parametrize("folder", ["train", "train/all", "."])
def test_images_without_classes(tmp_path, folder):
    folder = tmp_path / folder
    write_classes(folder.parent, {folder.name: 3})
    write_classes(tmp_path, {"test": 2})
    for split, count in (("train", 3), ("test", 2)):
        images = make(tmp_path, split, needs_labels=False, flip=False)
        assert images.class_names == ("images",) and images.labels.tolist() == [0] * count
        assert sorted(corner(images[k])[1] for k in range(count)) == list(range(count))
    assert "3 images without classes" in make(tmp_path, needs_labels=False).describe()[0]
    with pytest.raises(UserError, match="Images without classes are for simclr, moco"):
        make(tmp_path)


def test_labels_are_used_where_they_are_even_if_they_are_not_needed(root):
    assert all(equal(make(root, needs_labels=False)[k], make(root)[k]) for k in range(20))


def test_class_balance(root):
    """Each three samples show three classes; a class of n images shows each once in n of these."""
    dataset, again = make(root, class_balance=True, flip=False), make(root, class_balance=True)
    assert len(dataset) == 9
    labels = [int(dataset[index]["label"]) for index in range(72)]
    turns = [tuple(labels[k : k + 3]) for k in range(0, 72, 3)]
    assert all(sorted(turn) == [0, 1, 2] for turn in turns) and len(set(turns)) == 6
    for label, count in enumerate(CLASSES.values()):
        shown = [dataset.image_index(index) for index in range(72) if labels[index] == label]
        cycles = [tuple(shown[k : k + count]) for k in range(0, 24, count)]
        assert all(len(set(cycle)) == count for cycle in cycles) and len(set(cycles)) > 1
    for index in (50, 3, 71, 4):
        assert again.image_index(index) == dataset.image_index(index)
        assert corner(dataset[index])[0] == labels[index]
    assert [make(root, class_balance=True, seed=1)[k]["label"] for k in range(72)] != labels


def test_a_broken_file_is_replaced_by_one_of_its_class_and_left_out_of_the_test(tmp_path, caplog):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "test")
    for split in ("train", "test"):
        (tmp_path / split / "dog" / "3.png").write_bytes(b"nothing")
        for cache in (0, 2**30):
            with pytest.raises(UserError, match=r"dog/3\.png: cannot be read .*Replace or"):
                make(tmp_path, split, cache_bytes=cache).all_images()
    train = make(tmp_path, flip=False, broken_files="skip")
    samples = [train[index] for index in range(30)]
    assert all(corner(sample)[0] == sample["label"] for sample in samples)
    assert corner({"image": train.image(6)}) == (1, 0)  # the class's last, so its first
    assert len(train) == 9 and train.files()["train"]["dog/3.png"] is None
    assert len(caplog.records) == 1 and "train/dog/3.png" in caplog.text
    test = make(tmp_path, "test", broken_files="skip")
    assert test.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [corner({"image": test.image(k)}) for k in (5, 6)] == [(1, 2), (2, 0)]
    assert "1 unreadable" in "".join(train.describe())


def test_what_was_found(root, monkeypatch):
    first, second = make(root).describe()
    assert first == f"{root}: 3 classes, 2 to 4 images each"
    assert second.startswith(f"{root / 'train'}: 9 images, 8x8, RGB, values 0 to")
    sizes = {
        f"{path.parent.name}/{path.name}": path.stat().st_size
        for path in (root / "train").rglob("*.png")
    }
    assert make(root).files() == {"train": sizes}
    monkeypatch.setattr(labelled, "_MANY_FILES", 8)
    many = make(root)
    assert many.describe() == [first]
    totals = Counter()
    for name, size in sizes.items():
        totals[name.split("/")[0]] += size
    assert many.files() == {"train": totals}


def test_a_folder_that_is_none(root, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder.*train/CLASS/"):
        make(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"0\.png: is a file"):
        make(root / "train" / "cat" / "0.png")
