"""The stream of labelled samples: pure in (seed, index), whatever reads it, with the right labels."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from fastnce.data import LabelledImages
from fastnce.data.labelled import to_square
from fastnce.errors import UserError

CLASSES = {"cat": 3, "dog": 4, "eel": 2}


def write_classes(folder, classes=CLASSES, size=(8, 8)):
    """Noise, but the upper left pixel tells the class and the number: (10 x class, 10 x number, 0)."""
    rng = np.random.default_rng(0)
    for label, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            pixels[0, 0] = 10 * label, 10 * number, 0
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


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


def equal(one, other) -> bool:
    return all(torch.equal(one[key], other[key]) for key in ("image", "label"))


def test_a_sample_depends_on_seed_and_index_only(root):
    first, again, other = make(root), make(root), make(root, seed=1)
    samples = {index: first[index] for index in range(40)}
    for index in np.random.default_rng(0).permutation(40).tolist():
        assert equal(samples[index], again[index])
    assert not all(equal(samples[index], other[index]) for index in samples)
    for sample in samples.values():
        assert sample["image"].shape == (3, 8, 8) and sample["image"].dtype == torch.float32
        assert sample["image"].min() >= -1 and sample["image"].max() <= 1
        assert sample["label"].shape == () and sample["label"].dtype == torch.int64


def test_workers_read_the_same_stream_from_the_middle_on(root):
    part = Subset(make(root), range(5, 29))
    batches = {n: list(DataLoader(part, batch_size=4, num_workers=n)) for n in (0, 2)}
    assert len(batches[0]) == 6 and batches[0][0]["label"].shape == (4,)
    for one, two in zip(batches[0], batches[2], strict=True):
        assert equal(one, two)


def test_global_generators_neither_matter_nor_move(root):
    dataset = make(root)
    torch.manual_seed(1)
    np.random.seed(1)
    expected_torch, expected_numpy = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    sample = dataset[7]
    assert torch.rand(1) == expected_torch and np.random.rand() == expected_numpy
    assert equal(sample, dataset[7])


def test_an_epoch_is_every_image_in_a_new_order(root):
    dataset = make(root, flip=False)
    expected = sorted(
        (label, n) for label, count in enumerate(CLASSES.values()) for n in range(count)
    )
    orders = [[corner(dataset[9 * epoch + k]) for k in range(9)] for epoch in range(6)]
    assert all(sorted(order) == expected for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert len(list(dataset)) == len(dataset) == 9  # a plain loop ends


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


def test_half_of_the_samples_are_mirrored(root):
    flipped, plain = make(root), make(root, flip=False)
    count = 0
    for index in range(400):
        one, other = flipped[index]["image"], plain[index]["image"]
        mirrored = torch.equal(one, other.flip(2))
        assert mirrored or torch.equal(one, other)
        count += mirrored
    assert abs(count - 200) < 50  # five standard deviations of a fair coin


def test_all_images_come_in_the_order_of_the_files(root):
    dataset = make(root)
    images, labels = dataset.all_images()
    assert images.shape == (9, 3, 8, 8) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    for index in range(9):
        path = (
            root
            / "train"
            / dataset.class_names[labels[index]]
            / f"{images[index, 1, 0, 0] // 10}.png"
        )
        assert np.array_equal(images[index].permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))
    labels += 1
    assert dataset.labels[0] == 0


@pytest.mark.parametrize("cache_bytes", [0, 3 * 8 * 8 * 2, 2**30])
def test_memory_does_not_change_the_samples(root, cache_bytes):
    small, large = make(root, cache_bytes=cache_bytes), make(root)
    for index in (0, 3, 7, 2, 11, 3):
        assert equal(small[index], large[index])
    assert sum(array.nbytes for array in small._cache.values()) <= cache_bytes


def test_images_are_cut_to_their_central_square_and_scaled(tmp_path):
    write_classes(tmp_path / "train", size=(20, 30))
    dataset = make(tmp_path, image_size=10)
    image = Image.open(tmp_path / "train" / "cat" / "0.png")
    expected = image.crop((5, 0, 25, 20)).resize((10, 10), Image.Resampling.BICUBIC)
    assert np.array_equal(dataset.pixels(0), np.asarray(expected))
    assert to_square(image, 20).tobytes() == image.crop((5, 0, 25, 20)).tobytes()
    assert make(tmp_path, image_size=10, channels=1)[0]["image"].shape == (1, 10, 10)


def test_images_of_the_right_size_are_untouched(root):
    with Image.open(root / "train" / "dog" / "2.png") as image:
        assert np.array_equal(make(root).pixels(5), np.asarray(image))


@pytest.mark.parametrize("name", ["valid", "val"])
def test_the_held_out_folder_may_have_other_names(root, tmp_path, name):
    (tmp_path / "train").symlink_to(root / "train")
    (tmp_path / name).symlink_to(root / "test")
    for split in ("test", "valid", "val"):
        assert len(make(tmp_path, split)) == 4
    with pytest.raises(UserError, match="holds no folder extra"):
        make(tmp_path, "extra")


def write_tiny_imagenet(root):
    for name in ("n01", "n02"):
        write_classes(root / "train" / name, {"images": 2})
        (root / "train" / name / f"{name}_boxes.txt").write_text("")
    write_classes(root / "val", {"images": 3})
    write_classes(root / "test", {"images": 2})
    lines = ["0.png\tn02\t0\t0\t5\t5", "1.png\tn01\t0\t0\t5\t5", "2.png\tn02\t0\t0\t5\t5"]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")


def test_tiny_imagenet_as_distributed(tmp_path):
    write_tiny_imagenet(tmp_path)
    train = make(tmp_path)
    assert train.class_names == ("n01", "n02") and train.labels.tolist() == [0, 0, 1, 1]
    for split in ("test", "valid", "val"):  # its own test images have no labels
        held_out = make(tmp_path, split, flip=False)
        assert held_out.labels.tolist() == [1, 0, 1]
        assert [corner({"image": held_out.image(k)})[1] for k in range(3)] == [0, 1, 2]


def test_tiny_imagenet_with_damaged_annotations(tmp_path):
    write_tiny_imagenet(tmp_path)
    for text, message in (
        ("0.png\tn07\t0\t0\t5\t5\n", "line 1: is of the class n07"),
        ("0.png n02\n", "line 1 is '0.png n02'"),
        ("", "is empty"),
    ):
        (tmp_path / "val" / "val_annotations.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            make(tmp_path, "test")


def broken(tmp_path, change) -> str:
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "test")
    change(tmp_path)
    with pytest.raises(UserError) as info:
        make(tmp_path, "test")
    message = str(info.value)
    assert "\n" not in message
    return message


def test_a_missing_split_is_named_with_what_was_found(tmp_path):
    message = broken(tmp_path, lambda root: (root / "test").rename(root / "held-out"))
    for part in ("test or valid or val", "train/CLASS/", "CIFAR-10", "found held-out, train"):
        assert part in message


def test_an_empty_class_is_named(tmp_path):
    message = broken(tmp_path, lambda root: (root / "test" / "fox").mkdir())
    assert "test/fox" in message
    (tmp_path / "train" / "fox").mkdir()
    with pytest.raises(UserError, match="fox: holds no image"):
        make(tmp_path)


def test_a_class_that_train_does_not_have_is_named(tmp_path):
    message = broken(tmp_path, lambda root: (root / "test" / "eel").rename(root / "test" / "fox"))
    assert "is of the class fox" in message and "train" in message


def test_one_class_only_is_refused(tmp_path):
    write_classes(tmp_path / "train", {"cat": 2})
    with pytest.raises(UserError, match="the one class folder cat. Expected two or more"):
        make(tmp_path)


def test_images_without_class_folders_are_explained(tmp_path):
    write_classes(tmp_path, {"train": 2})
    with pytest.raises(UserError, match=r"no folder for a class.*found 0\.png, 1\.png"):
        make(tmp_path)


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_a_broken_image_is_named(tmp_path, cache_bytes):
    write_classes(tmp_path / "train")
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"dog/1\.png: cannot be read as an image.*Replace or remove"
    ):
        list(make(tmp_path, cache_bytes=cache_bytes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"channels": 4}, "channels=4.*Use 1 or 3"),
    ],
)
def test_mistakes_stop_before_the_first_sample(root, arguments, message):
    with pytest.raises(UserError, match=message):
        make(root, **arguments)


def test_a_missing_folder_and_a_negative_sample(root, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder.*train/CLASS/"):
        make(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"0\.png: is a file"):
        make(root / "train" / "cat" / "0.png")
    with pytest.raises(IndexError, match="sample -1 does not exist"):
        make(root)[-1]
