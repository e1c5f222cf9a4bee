"""CIFAR-10 and CIFAR-100 as distributed, in the Python and in the binary version.

The format is described at https://www.cs.toronto.edu/~kriz/cifar.html. The Python version is
pickled, so it is read by `safe_pickle`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from fastnce.data.folders import to_image
from fastnce.data.safe_pickle import load_pickled_bytes
from fastnce.errors import UserError

SIDE = 32
PIXEL_BYTES = 3 * SIDE * SIDE

AGAIN = "Download the archive again and unpack it here"


@dataclass(frozen=True)
class ImageArrays:
    """Images in memory with labels.

    Attributes:
        class_names: the name of each class, by label.
        labels: (N,) int64.
        pixels: (N, H, W, 3) uint8.
        paths: the files that hold them.
        folder: the folder of these files.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    pixels: np.ndarray
    paths: list[Path]
    folder: Path

    def read(self, index: int, channels: int) -> Image.Image:
        """Image `index`, RGB or greyscale."""
        return to_image(self.pixels[index]).convert("L" if channels == 1 else "RGB")

    def take(self, indices: np.ndarray, class_names: tuple[str, ...], labels: np.ndarray) -> Self:
        """These images, with other labels."""
        pixels = self.pixels[indices]
        return replace(self, class_names=class_names, labels=labels, pixels=pixels)


@dataclass(frozen=True)
class _Version:
    """One of the four archives: the folder in it, its files, and how a file of either kind is read."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    read_batch: Callable[[Path], tuple[np.ndarray, np.ndarray]]  # (N, 3072) uint8, (N,)
    read_names: Callable[[Path], list[str]]

    def is_in(self, folder: Path) -> bool:
        return any((folder / name).is_file() for name in (*self.train, *self.test, self.names))


def open_cifar(root: Path, split: str) -> ImageArrays | None:
    """Reads the training or the test images of CIFAR-10 or CIFAR-100.

    Args:
        root: The folder with the files of one of the archives, or with the folder that it unpacks to.
        split: "train" or "test".

    Returns:
        The images, or None if there is no file of CIFAR. Of CIFAR-100, the 100 fine classes.

    Raises:
        UserError: If a file is missing or damaged, or tries to run something; if there are several versions, or
            `split` is another one.
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
    files = version.train if split == "train" else version.test
    for name in (*files, version.names):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing. {AGAIN}.")
    names = tuple(version.read_names(folder / version.names))
    batches = [_checked_batch(folder / name, version, len(names)) for name in files]
    pixels = np.concatenate([rows.reshape(-1, 3, SIDE, SIDE) for rows, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    return ImageArrays(names, labels, pixels, [folder / name for name in files], folder)


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


def _binary_reader(label_bytes: int) -> Callable[[Path], tuple[np.ndarray, np.ndarray]]:
    """Records of the label's bytes, of which the last is the (fine) label, and the pixels."""

    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        content, record = np.fromfile(path, dtype=np.uint8), label_bytes + PIXEL_BYTES
        if len(content) % record:
            raise _damaged(path, f"{len(content)} bytes are no multiple of {record}")
        records = content.reshape(-1, record)
        return records[:, label_bytes:], records[:, label_bytes - 1]

    return read


def _read_text_names(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").split()


def _pickle_reader(labels_key: str) -> Callable[[Path], tuple[np.ndarray, np.ndarray]]:
    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        content = load_pickled_bytes(path)
        rows, labels = content.get("data"), content.get(labels_key)
        if not isinstance(rows, np.ndarray):
            raise _damaged(path, 'no pixels under "data"')
        if not isinstance(labels, list) or not all(type(label) is int for label in labels):
            raise _damaged(path, f'no whole numbers under "{labels_key}"')
        return rows, np.array(labels)

    return read


def _pickled_names(key: str) -> Callable[[Path], list[str]]:
    def read(path: Path) -> list[str]:
        names = load_pickled_bytes(path).get(key)
        if not isinstance(names, list) or not all(isinstance(x, str | bytes) for x in names):
            raise _damaged(path, f'no names under "{key}"')
        return [x.decode(errors="replace") if isinstance(x, bytes) else x for x in names]

    return read


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: is damaged ({reason}). {AGAIN}.")


_VERSIONS = (
    _Version(
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        _pickle_reader("labels"),
        _pickled_names("label_names"),
    ),
    _Version(
        "cifar-10-batches-bin",
        tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        ("test_batch.bin",),
        "batches.meta.txt",
        _binary_reader(label_bytes=1),
        _read_text_names,
    ),
    _Version(
        "cifar-100-python",
        ("train",),
        ("test",),
        "meta",
        _pickle_reader("fine_labels"),
        _pickled_names("fine_label_names"),
    ),
    _Version(
        "cifar-100-binary",
        ("train.bin",),
        ("test.bin",),
        "fine_label_names.txt",
        _binary_reader(label_bytes=2),
        _read_text_names,
    ),
)
