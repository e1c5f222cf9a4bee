"""Label maps and photographs: which files belong together, what happens to both alike, and what is said of unfit files."""

import shutil

import numpy as np
import pytest
import torch
from pictures import equal, levels, noise, write
from PIL import Image

from fastnce.data.label_maps import LabelMaps, find_label_maps, instance_edges, one_hot
from fastnce.errors import UserError

CLASSES, COUNT = 5, 4


def put(folders, number, labels, suffix=".png"):
    """A label map, a photograph whose grey level tells the label, and instances that do too."""
    label, image, instances = folders
    write(label, labels)
    write(image, np.repeat((labels * 40)[:, :, None], 3, axis=2))
    if instances is not None:
        write(instances, labels.astype(np.uint16) * 1000 + number)


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for number in range(COUNT):
            labels = levels(24, 28, high=CLASSES, seed=number)
            paths = [
                tmp_path / f"{split}_{part}" / f"{number}.png" for part in ("label", "img", "inst")
            ]
            put(paths, number, labels)
    return tmp_path


def make(root, *args, **arguments) -> LabelMaps:
    defaults = {"label_classes": CLASSES, "load_size": 20, "crop_size": 16, "instances": True}
    return LabelMaps(root, *args, **(defaults | arguments))


@pytest.mark.parametrize("preprocess", ["crop", "scale_width", "none"])
def test_all_of_a_sample_is_changed_alike(root, preprocess):
    """The photograph's level tells the label where nothing is scaled; scaled, the edges still are those of the label map."""
    dataset = make(root, preprocess=preprocess, load_size=28, seed=1)
    seen = set()
    for index in range(40):
        sample = dataset[index]
        label = sample["label"]
        assert label.dtype == torch.int64
        assert sample["B"].shape[1:] == label.shape == sample["edges"].shape[1:]
        assert torch.equal(sample["edges"][0], instance_edges(label))
        if preprocess != "none":
            torch.testing.assert_close(sample["B"][0], label * 40 / 127.5 - 1, rtol=0, atol=1e-5)
        seen.add(label.numpy().tobytes())
    assert len(seen) > 2 * COUNT if preprocess == "crop" else len(seen) == 2 * COUNT


@pytest.mark.parametrize(
    ("preprocess", "size"),
    [
        ("fixed", (8, 16)),
        ("resize_and_crop", (16, 16)),
        ("scale_width", (17, 20)),
        ("none", (32, 32)),
    ],
)
def test_the_sizes_of_the_modes(root, preprocess, size):
    dataset = make(root, preprocess=preprocess, aspect_ratio=2.0)
    assert {tuple(dataset[i]["B"].shape[1:]) for i in range(COUNT)} == {size}
    assert list(dataset.output_sizes()[0]) == [size[::-1]]


def test_a_sample_depends_on_its_number_alone(root):
    one, other = make(root), make(root)
    later = [one[index] for index in range(9, -1, -1)]
    assert all(equal(other[index], later[9 - index]) for index in range(10))
    folders = {f"train_{part}": root / f"train_{part}" for part in ("label", "img", "inst")}
    assert equal(make(folders)[3], one[3])


def test_without_photographs_and_in_order(root):
    dataset = make(
        root,
        "test",
        images=False,
        instances=False,
        serial=True,
        flip=False,
        preprocess="crop",
        crop_size=24,
    )
    assert dataset[1].keys() == {"label"}
    assert [path.name for path in dataset.parts["label"].paths] == [
        f"{i}.png" for i in range(COUNT)
    ]


def test_edges_and_classes():
    """The sheet's golden value 10."""
    instances = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 3, 2]])
    edges = instance_edges(instances)
    assert edges.tolist() == [[0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    hot = one_hot(instances[None], 4, edges[None, None])
    assert hot.shape == (1, 5, 3, 4)
    assert torch.equal(hot[:, :4].argmax(1)[0], instances)
    assert hot[:, :4].sum() == 12
    assert torch.equal(hot[0, 4], edges)


def test_labels_are_the_files_numbers_and_255_is_one_more(tmp_path):
    """The sheet's golden value 12 of ADE20K: 0 to 150 as they are, 255 becomes 150. And so in palette and 16-bit files."""
    numbers = np.array([[0, 1, 149, 150], [255, 3, 2, 1]], np.uint8).repeat(2, 0)
    palette = Image.fromarray(numbers, "P")
    palette.putpalette(levels(768).tolist())
    for name in ("_train_1", "_val_2"):
        write(tmp_path / "images" / f"ADE{name}.jpg", levels(4, 4, 3))
    (tmp_path / "annotations").mkdir()
    palette.save(tmp_path / "annotations" / "ADE_train_1.png")
    write(tmp_path / "annotations" / "ADE_val_2.png", numbers.astype(np.uint16))
    how = {"layout": "ade20k", "label_classes": 150, "dont_care": True, "instances": False}
    for split in ("train", "test"):
        dataset = make(tmp_path, split, preprocess="crop", crop_size=4, flip=False, **how)
        assert len(dataset) == 1
        assert dataset.channels == 151
        assert dataset[0]["label"].tolist() == np.where(numbers == 255, 150, numbers).tolist()


def test_cityscapes_and_coco(tmp_path):
    for split in ("train", "val"):
        for scene in ("ulm_000001_000019", "bonn_000000_000019"):
            city = scene.partition("_")[0]
            base = tmp_path / "gtFine" / split / city
            noise(base / f"{scene}_gtFine_color.png")
            put(
                (
                    base / f"{scene}_gtFine_labelIds.png",
                    tmp_path / "leftImg8bit" / split / city / f"{scene}_leftImg8bit.png",
                    base / f"{scene}_gtFine_instanceIds.png",
                ),
                1,
                levels(24, 28, high=CLASSES),
            )
    for split in ("train", "test"):
        assert set(make(tmp_path, split, layout="cityscapes")[0]) == {"label", "B", "edges"}
        names = [p.name for p in make(tmp_path, split, layout="cityscapes").parts["B"].paths]
        assert names == ["bonn_000000_000019_leftImg8bit.png", "ulm_000001_000019_leftImg8bit.png"]
    for part in ("label", "img", "inst"):
        for folder in ("train_{}", "train_{}_portrait", "val_{}"):
            noise(tmp_path / folder.format(part) / "1.png", channels=1)
    assert len(find_label_maps(tmp_path, "train", "coco")["label"].paths) == 2
    assert len(find_label_maps(tmp_path, "test", "coco")["img"].paths) == 1


def label(array):
    return lambda root: write(root / "train_label" / "2.png", array)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (label(np.zeros((24, 30), np.uint8)), r"img.2\.png: is 28x24, but its partner .*label.2\.png 30x24"),
        (label(np.zeros((24, 28, 3), np.uint8)), r"label.2\.png: is no label map \(RGB\)"),
        (label(np.full((24, 28), 7, np.uint8)), r"label.2\.png: holds the label 7, and with label_classes=5 labels are 0 to 4\. Use label_classes=8"),
        (label(np.full((24, 28), 255, np.uint8)), r'label.2\.png: holds the label 255.*"no class" use dont_care'),
        (lambda root: (root / "train_inst" / "2.png").unlink(), "train_inst: holds no 2, but"),
        (lambda root: shutil.rmtree(root / "train_img"), "train_img: no such folder"),
        (lambda root: shutil.rmtree(root / "train_label"), "holds no folder train_label. .*found train_img"),
        (lambda root: (root / "train_label" / "2.png").write_bytes(b"none"), r"2\.png: cannot be read"),
    ],
)  # fmt: skip
def test_what_is_said_of_unfit_files(root, spoil, message):
    spoil(root)
    with pytest.raises(UserError, match=message):
        make(root)


def test_a_file_that_loses_numbers(root):
    for part in ("label", "img", "inst"):
        noise(root / f"test_{part}" / "1.jpg", (28, 24), 3 if part == "img" else 1)
    with pytest.raises(UserError, match=r"1\.jpg: is no label map \(compressed"):
        make(root, "test")


def test_a_broken_pair_is_passed_over(root):
    (root / "train_img" / "2.png").write_bytes(b"none")
    dataset = make(root, broken_files="skip", preprocess="crop")
    for sample in dataset:
        torch.testing.assert_close(
            sample["B"][0], sample["label"] * 40 / 127.5 - 1, rtol=0, atol=1e-5
        )
    assert dataset.broken_count == 1


def test_what_is_found_is_described(root):
    lines = make(root).describe()
    assert [line.removeprefix(f"{root}/") for line in lines] == [
        "train_label: 4 images, 28x24, grey, values 0 to 4",
        "train_img: 4 images, 28x24, RGB, values 0 to 160",
        "train_inst: 4 images, 28x24, 16-bit grey, values 0 to 4003",
    ]
