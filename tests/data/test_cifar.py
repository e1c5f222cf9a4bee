"""CIFAR as distributed, from files of the same form; and pickles that try to run something."""

import os
import pickle
import struct

import numpy as np
import pytest

from fastnce.data import LabelledImages
from fastnce.data.cifar import load_pickled_bytes, open_cifar
from fastnce.errors import UserError

VERSIONS = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")


def python2_pickle(entries: dict) -> bytes:
    """A dictionary with bytes for text and arrays of uint8, pickled as Python 2 did, and as CIFAR's files are."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def encoded(value) -> bytes:
        if isinstance(value, bytes):
            return text(value)
        if isinstance(value, int):
            return integer(value)
        if isinstance(value, list):
            return b"](" + b"".join(encoded(x) for x in value) + b"e"
        shape = b"(" + b"".join(integer(side) for side in value.shape) + b"t"
        dtype = b"cnumpy\ndtype\n(" + text(b"u1") + integer(0) + integer(1) + b"tR"
        dtype += b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t"
        array += text(b"b") + b"tR"
        return array + b"(" + integer(1) + shape + dtype + b"\x89" + text(value.tobytes()) + b"tb"

    items = b"".join(text(key) + encoded(value) for key, value in entries.items())
    return b"\x80\x02}(" + items + b"u."


def write_cifar(root, version, count=4):
    """`count` images in each file. Returns (N, 32, 32, 3) pixels and (N,) labels of train and of test."""
    rng = np.random.default_rng(0)
    folder = root / version
    folder.mkdir(parents=True)
    hundred, binary = "100" in version, "bin" in version
    classes = 100 if hundred else 10
    names = [f"class{number}" for number in range(classes)]
    train = ["train"] if hundred else [f"data_batch_{number}" for number in range(1, 6)]
    files = {"train": train, "test": ["test" if hundred else "test_batch"]}
    expected = {}
    for split, stems in files.items():
        images, labels = [], []
        for stem in stems:
            rows = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
            fine = rng.integers(0, classes, count)
            if binary:
                coarse = [np.full((count, 1), 7, np.uint8)] if hundred else []
                records = np.hstack([*coarse, fine[:, None].astype(np.uint8), rows])
                (folder / f"{stem}.bin").write_bytes(records.tobytes())
            else:
                key = b"fine_labels" if hundred else b"labels"
                entries = {b"batch_label": b"x", key: fine.tolist(), b"data": rows}
                (folder / stem).write_bytes(python2_pickle(entries))
            images.append(rows.reshape(count, 3, 32, 32).transpose(0, 2, 3, 1))
            labels.append(fine)
        expected[split] = np.concatenate(images), np.concatenate(labels)
    if binary:
        meta = "fine_label_names.txt" if hundred else "batches.meta.txt"
        (folder / meta).write_text("\n".join(names) + "\n\n")
    else:
        key = b"fine_label_names" if hundred else b"label_names"
        meta = "meta" if hundred else "batches.meta"
        (folder / meta).write_bytes(python2_pickle({key: [name.encode() for name in names]}))
    return expected


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version(tmp_path, version, inside):
    expected = write_cifar(tmp_path, version)
    for split, (pixels, labels) in expected.items():
        root = tmp_path / version if inside else tmp_path
        dataset = LabelledImages(root, split, image_size=32, flip=False)
        assert dataset.num_classes == (100 if "100" in version else 10)
        assert dataset.class_names[3] == "class3"
        assert dataset.labels.tolist() == labels.tolist()
        images, _ = dataset.all_images()
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
        assert dataset[9]["label"] == labels[dataset.image_index(9)]
        sizes = dataset.files()["train"]
        assert all(
            (tmp_path / version / name).stat().st_size == size for name, size in sizes.items()
        )
        two = LabelledImages(root, split, image_size=32, flip=False, classes=("class3", "class0"))
        assert two.labels.tolist() == [int(label == 0) for label in labels if label in (0, 3)]
        chosen = np.isin(labels, (0, 3))
        assert np.array_equal(two.all_images()[0].permute(0, 2, 3, 1).numpy(), pixels[chosen])
    assert LabelledImages(tmp_path, image_size=16, channels=1)[0]["image"].shape == (1, 16, 16)


class Runs:
    """Unpickled the usual way, it makes a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [os.system, eval, exec, open])
def test_a_pickle_that_runs_something_is_refused(tmp_path, function, protocol):
    mark = tmp_path / "mark"
    argument = {
        os.system: f"touch {mark}",
        eval: f"__import__('pathlib').Path({str(mark)!r}).touch()",
        exec: f"import pathlib; pathlib.Path({str(mark)!r}).touch()",
        open: str(mark),
    }[function]
    arguments = (argument, "w") if function is open else (argument,)
    attack = pickle.dumps({"data": Runs(function, *arguments)}, protocol)
    pickle.loads(attack)
    assert mark.exists()  # so it does run, if it is let
    mark.unlink()
    path = tmp_path / "data_batch_1"
    path.write_bytes(attack)
    with pytest.raises(UserError, match=r"data_batch_1: asks for .*Do not trust this file") as info:
        load_pickled_bytes(path)
    assert function.__name__ in str(info.value) and "\n" not in str(info.value)
    assert not mark.exists()


WHOLE = python2_pickle({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1]})
ARRAY = np.asarray(np.arange(6, dtype=np.uint8).reshape(2, 3), order="F")


@pytest.mark.parametrize(
    "content, message",
    [
        *((WHOLE[:length], "cannot be read") for length in (0, 1, 10, 100, 1000, len(WHOLE) - 1)),
        (b"no pickle", "cannot be read.*Download the archive again"),
        (b"\x80\x02]q\x00.", "not a dictionary"),
        (b"\x82\x01.", "cannot be read"),  # an extension code
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "cannot be read"),  # a persistent id
        (b"\x80\x02cnumpy\ndtype\n}b.", "cannot be read"),  # a state for a class
        (b"\x80\x02cnumpy\nndarray\n)\x81N.", "cannot be read"),
        *(
            (b"\x80\x02c" + name + b"\n.", "asks for")
            for name in (
                *(b"numpy\nload", b"numpy\nfromfile", b"numpy\ndtype.__class__"),
                *(b"builtins\ngetattr", b"numpy.core.multiarray\nfromfile"),
                *(b"numpy\nndarray.tofile", b"copyreg\n_reconstructor"),
            )
        ),
        *(
            (pickle.dumps({"data": array}, 4), "array of something else than bytes")
            for array in (np.zeros(3), np.array([None, 1]), np.zeros(2, "u2"))
        ),
        # Holds bytes as text that a codec turns into bytes: never so in CIFAR.
        (pickle.dumps({"data": ARRAY}, 2), r"asks for _codecs\.encode"),
    ],
)
def test_other_pickles_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=f"file: .*{message}") as info:
        load_pickled_bytes(tmp_path / "file")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_today_and_of_python_2_are_read(tmp_path, order):
    array = np.asarray(ARRAY, order=order)
    today = pickle.dumps({"data": array, "labels": [1]}, 4)
    old = python2_pickle({b"data": array, b"labels": [1]})
    assert np.array_equal(pickle.loads(old, encoding="bytes")[b"data"], array)
    for content in (today, old):
        (tmp_path / "file").write_bytes(content)
        read = load_pickled_bytes(tmp_path / "file")
        assert np.array_equal(read["data"], array) and read["labels"] == [1]


def rewrite(entries):
    return lambda folder: (folder / "test_batch").write_bytes(python2_pickle(entries))


ROWS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        (0, lambda folder: (folder / "test_batch").unlink(), "test_batch is missing"),
        (0, lambda folder: (folder / "batches.meta").unlink(), r"batches\.meta is missing"),
        (0, rewrite({b"data": ROWS, b"labels": [0, 10]}), "labels 0 to 10, but 10 classes"),
        (0, rewrite({b"data": ROWS, b"labels": [0]}), "2 images, but labels of shape"),
        (0, rewrite({b"data": ROWS, b"labels": [b"a", b"b"]}), "no whole numbers"),
        (0, rewrite({b"data": ROWS[:, :5], b"labels": [0, 1]}), r"shape \(2, 5\)"),
        (0, rewrite({b"data": ROWS[:0], b"labels": []}), r"shape \(0, 3072\)"),
        (0, rewrite({b"data": ROWS}), "labels"),
        (0, rewrite({b"labels": [1]}), '"data"'),
        (1, lambda f: (f / "test_batch.bin").write_bytes(b"\0" * 3074), "no multiple of 3073"),
        (1, lambda f: (f / "batches.meta.txt").write_text("a b"), "but 2 classes"),
        (3, lambda f: (f / "test.bin").write_bytes(b"\0\xff" + b"\0" * 3072), "255, but 100"),
    ],
)  # fmt: skip
def test_a_damaged_set_names_the_file_and_what_to_do(tmp_path, version, change, message):
    write_cifar(tmp_path, VERSIONS[version])
    change(tmp_path / VERSIONS[version])
    with pytest.raises(UserError, match=message) as info:
        open_cifar(tmp_path, "test")
    assert "Download the archive again" in str(info.value) and VERSIONS[version] in str(info.value)


def test_two_versions_and_other_splits_are_refused(tmp_path):
    write_cifar(tmp_path, VERSIONS[0])
    with pytest.raises(UserError, match='split="val": CIFAR has "train" and "test"'):
        open_cifar(tmp_path, "val")
    write_cifar(tmp_path, VERSIONS[1])
    with pytest.raises(UserError, match="holds cifar-10-batches-py and cifar-10-batches-bin"):
        open_cifar(tmp_path, "test")
    assert open_cifar(tmp_path / "nowhere", "test") is None
