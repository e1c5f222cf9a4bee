"""CIFAR as distributed, from files of the same form; and pickles that try to run something."""

import io
import os
import pickle
import struct

import numpy as np
import pytest

from fastnce.data import LabelledImages
from fastnce.data.cifar import load_pickled_bytes, open_cifar
from fastnce.errors import UserError

VERSIONS = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")


class Python2Pickler(pickle._Pickler):
    """Text and bytes are what Python 2's strings were, as in CIFAR's files."""

    def save_string(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch = pickle._Pickler.dispatch | {bytes: save_string, str: save_string}


def python2_pickle(entries: dict) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, 2).dump(entries)
    return stream.getvalue().replace(b"numpy._core", b"numpy.core")


def write_cifar(root, version, count=4):
    """`count` images in each file. Returns (N, 32, 32, 3) pixels and (N,) labels of train and of test."""
    rng = np.random.default_rng(0)
    folder = root / version
    folder.mkdir(parents=True)
    hundred, binary = "100" in version, "bin" in version
    classes, fine = (100, "fine_") if hundred else (10, "")
    train = ["train"] if hundred else [f"data_batch_{number}" for number in range(1, 6)]
    expected = {}
    for split, stems in (("train", train), ("test", ["test" if hundred else "test_batch"])):
        rows = rng.integers(0, 256, (len(stems), count, 3072), dtype=np.uint8)
        labels = rng.integers(0, classes, (len(stems), count, 1), dtype=np.uint8)
        for stem, images, numbers in zip(stems, rows, labels, strict=True):
            if binary:
                coarse = [np.full_like(numbers, 7)] if hundred else []
                records = np.hstack([*coarse, numbers, images])
                (folder / f"{stem}.bin").write_bytes(records.tobytes())
            else:
                entries = {"batch_label": "x", f"{fine}labels": numbers[:, 0].tolist()}
                (folder / stem).write_bytes(python2_pickle(entries | {"data": images}))
        pixels = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        expected[split] = pixels, labels.flatten()
    names = [f"class{number}" for number in range(classes)]
    if binary:
        meta = "fine_label_names.txt" if hundred else "batches.meta.txt"
        (folder / meta).write_text("\n".join(names) + "\n\n")
    else:
        meta = folder / ("meta" if hundred else "batches.meta")
        meta.write_bytes(python2_pickle({f"{fine}label_names": names}))
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
        for name, size in dataset.files()["train"].items():
            assert (tmp_path / version / name).stat().st_size == size
        two = LabelledImages(root, split, image_size=32, flip=False, classes=("class3", "class0"))
        assert two.labels.tolist() == [int(label == 0) for label in labels if label in (0, 3)]
        chosen = np.isin(labels, (0, 3))
        assert np.array_equal(two.all_images()[0].permute(0, 2, 3, 1).numpy(), pixels[chosen])
    assert LabelledImages(tmp_path, image_size=16, channels=1)[0]["image"].shape == (1, 16, 16)


class Runs:
    """Unpickled the usual way, it calls a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [os.system, eval, exec, open])
def test_a_pickle_that_runs_something_is_refused(tmp_path, function, protocol):
    path, mark = tmp_path / "data_batch_1", tmp_path / "mark"
    arguments = {
        os.system: (f"touch {mark}",),
        eval: (f"__import__('pathlib').Path({str(mark)!r}).touch()",),
        exec: (f"import pathlib; pathlib.Path({str(mark)!r}).touch()",),
        open: (str(mark), "w"),
    }[function]
    path.write_bytes(pickle.dumps({"data": Runs(function, arguments)}, protocol))
    pickle.loads(path.read_bytes())
    assert mark.exists()  # so it does run, if it is let
    mark.unlink()
    with pytest.raises(UserError, match=r"data_batch_1: asks for .*Do not trust this file") as info:
        load_pickled_bytes(path)
    assert function.__name__ in str(info.value) and "\n" not in str(info.value)
    assert not mark.exists()


WHOLE = python2_pickle({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1]})
NAMES = (
    *(b"numpy\nload", b"numpy\nfromfile", b"numpy\ndtype.__class__", b"numpy\nndarray.tofile"),
    *(b"builtins\ngetattr", b"numpy.core.multiarray\nfromfile", b"copyreg\n_reconstructor"),
)
ARRAYS = np.zeros(3), np.array([None, 1]), np.zeros(2, "u2")
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
        *((b"\x80\x02c" + name + b"\n.", "asks for") for name in NAMES),
        *((pickle.dumps({"data": x}, 4), "array of something else than bytes") for x in ARRAYS),
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
