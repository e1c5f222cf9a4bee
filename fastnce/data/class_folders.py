"""Labelled images in one folder for each class, Tiny ImageNet as distributed, and images without classes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from fastnce.data.folders import EXTENSIONS, contents, list_images, read_image
from fastnce.errors import UserError

ANNOTATIONS = "val_annotations.txt"

# A split's folder, in order of preference; any other split is the folder of its own name.
NO_CLASSES = ("images",)
"""The class names of images without classes: they are one class, with nothing to tell apart."""

_WITHOUT = "Images without classes are for simclr, moco, and contragan with conditioning=none."

FOLDERS = {"test": ("test", "valid", "val"), "valid": ("valid", "val"), "val": ("val", "valid")}


@dataclass(frozen=True)
class ImageFiles:
    """Image files with labels; nothing is decoded before it is read.

    Attributes:
        class_names: the name of each class, by label.
        labels: (N,) int64.
        paths: the N files.
        folder: the split's folder, which holds them.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    paths: list[Path]
    folder: Path

    def read(self, index: int, channels: int) -> Image.Image:
        """Image `index`, RGB or greyscale; UserError, naming the file, if it cannot be read."""
        return read_image(self.paths[index], channels)

    def take(self, indices: np.ndarray, class_names: tuple[str, ...], labels: np.ndarray) -> Self:
        """These images, with other labels."""
        paths = [self.paths[index] for index in indices]
        return replace(self, class_names=class_names, labels=labels, paths=paths)


def open_class_folders(root: Path, split: str, *, needs_labels: bool = True) -> ImageFiles:
    """Finds `root/SPLIT/CLASS/*.png` and the like, at any depth below the class's folder.

    The classes are the folders of `root/train`, sorted, whatever the split: a label means the same in all.
    "test" is `root/test`, else `root/valid`, else `root/val`. Tiny ImageNet's validation images, whose classes are
    in a file and whose test images have none, are found as "test", "valid" and "val".

    Without `needs_labels`, a training folder without class folders, or with one, is a set of images without classes
    (`NO_CLASSES`), at any depth; and so is a `root` that holds images and no such folder.

    Raises:
        UserError: If a folder is missing, a class has no image, the split has a class that train does not have, or there are
            no two classes though labels are needed.
    """
    if not needs_labels and _without_classes(root):
        return _images_without_classes(root, split)
    names = tuple(folder.name for folder in _class_folders(_split_folder(root, "train")))
    if len(names) < 2:
        raise UserError(
            f"{root / 'train'}: holds the one class folder {names[0]}. "
            f"Expected two or more: the label is what there is to learn. {_WITHOUT}"
        )
    if split in FOLDERS and (root / "val" / ANNOTATIONS).is_file():
        return _tiny_imagenet_val(root / "val", names)
    label_of = {name: label for label, name in enumerate(names)}
    paths, labels = [], []
    folder = _split_folder(root, split)
    for subfolder in _class_folders(folder):
        if subfolder.name not in label_of:
            raise _unknown_class(subfolder, subfolder.name, root)
        found = list_images(subfolder)
        paths += found
        labels += [label_of[subfolder.name]] * len(found)
    return ImageFiles(names, np.array(labels, dtype=np.int64), paths, folder)


def _images_without_classes(root: Path, split: str) -> ImageFiles:
    if split == "train" and not (root / "train").is_dir():
        folder = root
        others = {root / name for names in FOLDERS.values() for name in names}
        paths = [path for path in list_images(root) if others.isdisjoint(path.parents)]
    else:
        folder = _split_folder(root, split)
        paths = list_images(folder)
    return ImageFiles(NO_CLASSES, np.zeros(len(paths), dtype=np.int64), paths, folder)


def has_folder(root: Path, split: str) -> bool:
    """Whether there is a folder of this split."""
    return any((root / name).is_dir() for name in FOLDERS.get(split, (split,)))


def holds_images(root: Path) -> bool:
    """Whether the images to train on lie in the folder `root` itself: it holds some, and no folder train."""
    if not root.is_dir() or (root / "train").is_dir():
        return False
    return any(_is_image(entry) for entry in root.iterdir())


def _without_classes(root: Path) -> bool:
    train = root / "train"
    return len(_subfolders(train)) < 2 if train.is_dir() else holds_images(root)


def _is_image(entry: Path) -> bool:
    hidden = entry.name.startswith(".")
    return not hidden and entry.is_file() and entry.name.lower().endswith(EXTENSIONS)


def _split_folder(root: Path, split: str) -> Path:
    names = FOLDERS.get(split, (split,))
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UserError(
        f"{root}: holds no folder {' or '.join(names)}. Expected train/CLASS/ and test/CLASS/ (or valid, or val) "
        f"with the images of each class, or CIFAR-10, CIFAR-100 or Tiny ImageNet as distributed; found {contents(root)}. {_WITHOUT}"
    )


def _class_folders(folder: Path) -> list[Path]:
    found = _subfolders(folder)
    if not found:
        raise UserError(
            f"{folder}: holds no folder for a class. Expected one for each class, with its images; "
            f"found {contents(folder)}. {_WITHOUT}"
        )
    return found


def _subfolders(folder: Path) -> list[Path]:
    return sorted(x for x in folder.iterdir() if x.is_dir() and not x.name.startswith("."))


def _tiny_imagenet_val(folder: Path, names: tuple[str, ...]) -> ImageFiles:
    """Each line of the annotations: file name, class, and four numbers of a box, divided by tabs."""
    label_of = {name: label for label, name in enumerate(names)}
    annotations = folder / ANNOTATIONS
    lines = annotations.read_text(encoding="utf-8", errors="replace").splitlines()
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise UserError(
                f"{annotations}: line {number} is {line!r}, not a file name and a class with a tab between. "
                "Unpack the archive again."
            )
        if fields[1] not in label_of:
            raise _unknown_class(f"{annotations}, line {number}", fields[1], folder.parent)
        paths.append(folder / "images" / fields[0])
        labels.append(label_of[fields[1]])
    if not paths:
        raise UserError(f"{annotations}: is empty. Unpack the archive again.")
    return ImageFiles(names, np.array(labels, dtype=np.int64), paths, folder)


def _unknown_class(where: object, name: str, root: Path) -> UserError:
    return UserError(
        f"{where}: is of the class {name}, but {root / 'train'} holds no folder of this name. "
        "Add the class to train, or remove it here."
    )
