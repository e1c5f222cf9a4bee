"""CIFAR-10 and CIFAR-100 as distributed, in the Python and in the binary version.

The format is described at https://www.cs.toronto.edu/~kriz/cifar.html. The Python version is pickled, and a pickle is a program:
it names functions of any module and has them called. Reading here lets it name the parts of NumPy that an array is pickled with,
gives it stand-ins for these that only keep what they are handed, and refuses every other name.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from fastnce.data.images import read_image, to_image
from fastnce.errors import UserError

SIDE = 32
PIXEL_BYTES = 3 * SIDE * SIDE

AGAIN = "Download the archive again and unpack it here"


@dataclass(frozen=True)
class LabelledSource:
    """Images with labels: in N files, none of which is decoded before it is read, or in memory.

    `class_names` by label, `labels` (N,) int64, the `paths` of the files and the `folder` that holds them; of images in memory
    their `pixels` (N, H, W, 3) uint8.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    paths: list[Path]
    folder: Path
    pixels: np.ndarray | None = None

    def read(self, index: int, channels: int) -> Image.Image:
        """Image `index`, RGB or greyscale; UserError, naming the file, if it cannot be read."""
        if self.pixels is None:
            return read_image(self.paths[index], channels)
        return to_image(self.pixels[index]).convert("L" if channels == 1 else "RGB")

    def take(self, indices: np.ndarray, class_names: tuple[str, ...], labels: np.ndarray) -> Self:
        """These images, with other labels."""
        named = replace(self, class_names=class_names, labels=labels)
        if self.pixels is None:
            return replace(named, paths=[self.paths[index] for index in indices])
        return replace(named, pixels=self.pixels[indices])


ReadBatch = Callable[[Path], tuple[np.ndarray, np.ndarray]]  # (N, 3072) uint8, (N,)
ReadNames = Callable[[Path], list[str]]


class _Version(NamedTuple):
    """One of the four archives: the folder in it, its files, and how a file of either kind is read."""

    folder: str
    train: list[str]
    test: str
    names: str
    read_batch: ReadBatch
    read_names: ReadNames

    def is_in(self, folder: Path) -> bool:
        return any((folder / name).is_file() for name in (*self.train, self.test, self.names))


def open_cifar(root: Path, split: str) -> LabelledSource | None:
    """The training or the test images of CIFAR-10 or CIFAR-100 (its 100 fine classes); None if there is no file of CIFAR.

    `root` is the folder with the files of one of the archives, or with the folder that it unpacks to.

    Raises:
        UserError: If a file is missing or damaged, or tries to run something; if there are several versions, or
            `split` is not "train" or "test".
    """
    places = _places(root)
    if not places:
        return None
    if len(places) > 1:
        found = " and ".join(version.folder for _, version in places)
        raise UserError(f"{root}: holds {found}. Name the folder of one of them.")
    folder, version = places[0]
    if split not in ("train", "test"):
        raise UserError(
            f'{folder}: split="{split}": CIFAR has "train" and "test". Use one of them.'
        )
    files = version.train if split == "train" else [version.test]
    for name in (*files, version.names):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing. {AGAIN}.")
    names = tuple(version.read_names(folder / version.names))
    batches = [_checked_batch(folder / name, version, len(names)) for name in files]
    pixels = np.concatenate([rows.reshape(-1, 3, SIDE, SIDE) for rows, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    return LabelledSource(names, labels, [folder / name for name in files], folder, pixels)


def holds_cifar(root: Path) -> bool:
    """Whether there is a file of CIFAR."""
    return bool(_places(root))


def _places(root: Path) -> list[tuple[Path, "_Version"]]:
    return [(folder, v) for v in _VERSIONS for folder in (root, root / v.folder) if v.is_in(folder)]


def _checked_batch(path: Path, version: _Version, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rows, labels = version.read_batch(path)
    if rows.ndim != 2 or rows.shape[1] != PIXEL_BYTES or not len(rows):
        raise _damaged(path, f"pixels of shape {rows.shape}, expected (N, {PIXEL_BYTES})")
    if labels.shape != rows.shape[:1]:
        raise _damaged(path, f"{len(rows)} images, but labels of shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= classes:
        raise _damaged(path, f"labels {labels.min()} to {labels.max()}, but {classes} classes")
    return rows, labels.astype(np.int64)


def _binary(label_bytes: int) -> tuple[ReadBatch, ReadNames]:
    """Readers of records of the label's bytes, of which the last is the (fine) label, and the pixels; and of lines of names."""

    def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
        content, record = np.fromfile(path, dtype=np.uint8), label_bytes + PIXEL_BYTES
        if len(content) % record:
            raise _damaged(path, f"{len(content)} bytes are no multiple of {record}")
        records = content.reshape(-1, record)
        return records[:, label_bytes:], records[:, label_bytes - 1]

    return read_batch, lambda path: path.read_text(encoding="utf-8", errors="replace").split()


def _pickled(labels_key: str, names_key: str) -> tuple[ReadBatch, ReadNames]:
    def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
        content = load_pickled_bytes(path)
        rows, labels = content.get("data"), content.get(labels_key)
        if not isinstance(rows, np.ndarray):
            raise _damaged(path, 'no pixels under "data"')
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise _damaged(path, f'no whole numbers under "{labels_key}"')
        return rows, np.array(labels)

    def read_names(path: Path) -> list[str]:
        names = load_pickled_bytes(path).get(names_key)
        if not isinstance(names, list) or not all(isinstance(x, str | bytes) for x in names):
            raise _damaged(path, f'no names under "{names_key}"')
        return [x.decode(errors="replace") if isinstance(x, bytes) else x for x in names]

    return read_batch, read_names


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: is damaged ({reason}). {AGAIN}.")


_FIVE = [f"data_batch_{number}" for number in range(1, 6)]
_BINARY_FIVE = [f"{name}.bin" for name in _FIVE]
_VERSIONS = (
    _Version(
        "cifar-10-batches-py",
        _FIVE,
        "test_batch",
        "batches.meta",
        *_pickled("labels", "label_names"),
    ),
    _Version(
        "cifar-10-batches-bin", _BINARY_FIVE, "test_batch.bin", "batches.meta.txt", *_binary(1)
    ),
    _Version(
        "cifar-100-python", ["train"], "test", "meta", *_pickled("fine_labels", "fine_label_names")
    ),
    _Version("cifar-100-binary", ["train.bin"], "test.bin", "fine_label_names.txt", *_binary(2)),
)


def load_pickled_bytes(path: Path) -> dict[str, Any]:
    """Reads a pickled dictionary of plain values and arrays of uint8, written by Python 2 or 3.

    Text of Python 2 is bytes, except for the keys.

    Raises:
        UserError: If the file cannot be read, holds something else, or names something that such a dictionary
            does not need; that is not imported, let alone called.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dictionary")
        return {
            key.decode() if isinstance(key, bytes) else key: x.values
            if isinstance(x, _Array)
            else x
            for key, x in content.items()
        }
    except _Refused as error:
        raise UserError(
            f"{path}: asks for {error}, which a file of images has no use for and which could run any program. "
            "It was not loaded. Do not trust this file: delete it and download the archive again."
        ) from error
    # Damaged bytes are instructions like any others: there is no exception that they could not raise.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: cannot be read ({reason}). {AGAIN}.") from error


class _Refused(Exception):
    pass


class _DType:
    """Stands in for numpy.dtype: keeps the name, such as "u1"."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: tuple) -> None:
        """Byte order and alignment, which say nothing about single bytes."""


class _Array:
    """Stands in for numpy.ndarray, and for the function that makes an empty one to be filled by its state."""

    def __init__(self, *_: object) -> None:
        self.values = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, content = state
        if not isinstance(dtype, _DType) or dtype.name != "u1":
            raise ValueError("it holds an array of something else than bytes")
        flat = np.frombuffer(content, dtype=np.uint8)
        self.values = flat.reshape(shape, order="F" if fortran_order else "C")


class _Unpickler(pickle.Unpickler):
    STAND_INS = {
        ("numpy", "dtype"): _DType,
        ("numpy", "ndarray"): _Array,
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in self.STAND_INS:
            raise _Refused(f"{module}.{name}")
        return self.STAND_INS[module, name]
