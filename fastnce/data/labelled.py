"""Images with class labels, as an endless stream of samples: class folders, Tiny ImageNet, CIFAR, and images without classes."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from fastnce.data.broken import BrokenFiles, readable
from fastnce.data.cifar import LabelledSource, holds_cifar, open_cifar
from fastnce.data.domains import EAGER_BYTES
from fastnce.data.folders import contents, describe_folder, list_images
from fastnce.data.images import EXTENSIONS, UnfitFile, read_image, to_array, to_tensor
from fastnce.data.stream import Stream, counter_rng
from fastnce.errors import UserError
from fastnce.files import named_sizes

ANNOTATIONS = "val_annotations.txt"

NO_CLASSES = ("images",)
"""The class names of images without classes: they are one class, with nothing to tell apart."""

# A split's folder, in order of preference; any other split is the folder of its own name.
FOLDERS = {"test": ("test", "valid", "val"), "valid": ("valid", "val"), "val": ("val", "valid")}

_WITHOUT = "Images without classes are for simclr, moco, and contragan with conditioning=none."

_ORDER_STREAM, _FLIP_STREAM = 3, 4
# Of class-balanced drawing: the order of the classes, and that of a class's images.
_CLASS_STREAM, _IMAGE_STREAM = 6, 7

# Of larger sets the images are not looked at for `describe`, and `files` has the classes instead of the files.
_MANY_FILES = 50_000

_log = logging.getLogger("fastnce")

# What becomes of an image of another shape than the samples: see `fitted`.
Shapes = Literal["crop", "stretch", "error"]


class LabelledImages(Stream):
    """Class folders, Tiny ImageNet, CIFAR-10 or CIFAR-100, recognised by what is in the folder.

    Sample i, for any i >= 0, is a pure function of (seed, i) and the arguments: see `Stream`. Every `len(self)` samples are an
    epoch: all images, in an order drawn for it. An image that is not square is cut to its central square; one of another size
    is scaled (bicubic).

    With `class_balance` every class comes equally often: each K samples of K classes show one image of each, in random
    order, and a class shows all of its images before it repeats one.

    `image` and `all_images` give the images in the order of the files, never flipped, for evaluation.

    Args:
        root: Folder of one of these:
            `train/CLASS/*.png` and `test/CLASS/*.png` (or `valid`, or `val`; any format in `EXTENSIONS`, at any depth);
            Tiny ImageNet as distributed; `cifar-10-batches-py`, `cifar-10-batches-bin`, `cifar-100-python` or
            `cifar-100-binary` as distributed, or the folder that holds one of these.
        split: "train" or "test"; for class folders any other folder's name too.
        image_size: Side of the samples in pixels, or (height, width).
        channels: 3 for RGB, 1 for greyscale.
        flip: Mirrors each sample left to right with probability 0.5.
        seed: Seed of the stream.
        cache_bytes: Memory for decoded images, shared out among the workers.
        classes: Names of the classes to read, in the order of their labels; by default all, sorted. Images of others are
            left out, with a warning.
        needs_labels: False also takes images without class folders, in `train` or in `root` itself, as the one class
            "images".
        class_balance: Draws every class equally often.
        broken_files: "error" stops at the first file that cannot be read. "skip" names it in the log, once; of "train" the
            next one of its class takes its place, of other splits it is left out.
        shapes: What becomes of an image of another shape: see `fitted`.

    Attributes:
        class_names: the name of each class, by label; the same for every split.
        labels: (N,) int64, of the images in the order of the files.

    Raises:
        UserError: A folder or a class is missing or empty, a file cannot be read, or an argument is out of range. A
            damaged image of a set too large for decoding it all at once is found when it is first read.

    Examples:
        >>> import tempfile
        >>> from fastnce.demo import write_digits
        >>> folder = tempfile.TemporaryDirectory()
        >>> root = write_digits(folder.name)
        >>> images = LabelledImages(root, image_size=16, channels=1, flip=False)
        >>> images.num_classes, len(images)
        (10, 1195)
        >>> sample = images[5000]
        >>> sample["image"].shape, sample["label"].dtype
        (torch.Size([1, 16, 16]), torch.int64)
    """

    def __init__(
        self,
        root: Path | str,
        split: str = "train",
        *,
        image_size: int | tuple[int, int],
        channels: int = 3,
        flip: bool = True,
        seed: int = 0,
        cache_bytes: int = 2 * 2**30,
        classes: Sequence[str] = (),
        needs_labels: bool = True,
        class_balance: bool = False,
        broken_files: str = "error",
        shapes: Shapes = "crop",
    ) -> None:
        super().__init__(seed)
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(size) < 1:
            raise UserError(f"image_size={image_size}: expected a number of pixels, at least 1.")
        if channels not in (1, 3):
            raise UserError(
                f"channels={channels}: images have 1 (greyscale) or 3 (RGB). Use 1 or 3."
            )
        self.size, self.channels, self.flip, self.shapes = size, channels, flip, shapes
        self._root, self._skip = Path(root), broken_files == "skip"
        source = open_labelled(root, split, classes, needs_labels=needs_labels)
        if source.pixels is None and self._skip and split != "train":
            source = _readable(source, channels)
        self._source, self._sizes = source, None
        self._broken, self.cache_bytes = None, 0  # CIFAR's images are in memory already
        if source.pixels is None:
            self._broken = BrokenFiles(source.folder, source.paths, self._skip, source.labels)
            self.cache_bytes = cache_bytes
        self.class_names = source.class_names
        self.labels = torch.from_numpy(source.labels)
        self.class_balance = class_balance
        by_class = np.argsort(source.labels, kind="stable")
        counts = np.bincount(source.labels, minlength=self.num_classes)
        self._members = np.split(by_class, np.cumsum(counts)[:-1])
        if class_balance and split == "train" and counts.min() == 0:
            empty = self.class_names[int(counts.argmin())]
            raise UserError(f"class_balance: {root} has no training image of {empty}. Add some.")
        self._cache: dict[int, np.ndarray] = {}
        self._image_bytes = channels * size[0] * size[1]
        if len(self) * self._image_bytes <= min(EAGER_BYTES, self.cache_bytes):
            for index in range(len(self)):
                self.pixels(index)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        """Samples in an epoch: the number of images."""
        return len(self.labels)

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """{"image": (C, H, W) float32 in [-1, 1], "label": () int64}."""
        image = self.image_index(index)
        pixels = self.pixels(image)
        if self.flip and counter_rng(self.seed, _FLIP_STREAM, index).random() < 0.5:
            pixels = pixels[:, ::-1]
        return {"image": to_tensor(pixels), "label": torch.tensor(int(self.labels[image]))}

    def image_index(self, index: int, epoch_samples: int | None = None) -> int:
        """The image, in the order of the files, that sample `index` of the stream shows.

        With `epoch_samples`, of a stream whose epochs end after so many samples, before they have shown all images; with
        `class_balance` it does not matter.
        """
        if not self.class_balance:
            epoch, position = divmod(index, epoch_samples or len(self))
            return int(self.permutation(_ORDER_STREAM, epoch, len(self))[position])
        classes = self.num_classes
        turn, position = divmod(index, classes)
        label = int(self.permutation(_CLASS_STREAM, turn, classes)[position])
        images = self._members[label]
        cycle, position = divmod(turn, len(images))
        # A class's cycles are told from another's by their numbers.
        number = cycle * classes + label
        order = self.permutation(_IMAGE_STREAM, number, len(images), slot=label)
        return int(images[order[position]])

    def image(self, index: int) -> torch.Tensor:
        """The image at `index` in the order of the files: (C, H, W) float32 in [-1, 1]."""
        return to_tensor(self.pixels(index))

    def all_images(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All images (N, C, H, W) uint8 and labels (N,) int64 in the order of the files, for sets that fit in memory."""
        images = np.empty((len(self), *self.size, self.channels), np.uint8)
        for index in range(len(self)):
            images[index] = self.pixels(index)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), self.labels.clone()

    def pixels(self, index: int) -> np.ndarray:
        """The image at `index` in the order of the files: (H, W, C) uint8, not to be written to."""
        if self._broken is None:
            return self._pixels(index)
        return self._broken.read(index, self._pixels)

    def files(self) -> dict[str, dict[str, int | None]]:
        """The training files by their names, with their sizes in bytes: see `fastnce.files.changed_files`.

        Of many files only their classes, each with the size of all its files.
        """
        if self._sizes is None:  # once: of a large set it takes a while
            self._sizes = named_sizes(self._source.folder, self._source.paths)
        if self._broken is None:
            return {"train": self._sizes}
        sizes = self._broken.unsized(self._sizes)
        if len(sizes) > _MANY_FILES:
            known = [size or 0 for size in sizes.values()]
            totals = np.bincount(self._source.labels, known, self.num_classes)
            sizes = {k: int(size) for k, size in zip(self.class_names, totals, strict=True)}
        return {"train": sizes}

    def describe(self) -> list[str]:
        """A line on the classes and the images in each, and that of `describe_folder`, unless there are very many."""
        counts = self.labels.bincount(minlength=self.num_classes)
        least, greatest = int(counts.min()), int(counts.max())
        each = str(least) if least == greatest else f"{least} to {greatest}"
        lines = [f"{self._root}: {self.num_classes} classes, {each} images each"]
        if self.num_classes == 1:
            lines = [f"{self._root}: {greatest} images without classes"]
        if self._broken is not None and len(self) <= _MANY_FILES:
            folder, paths = self._source.folder, self._source.paths
            lines += describe_folder(folder, paths, self.channels, skip_broken=self._skip)
        return lines

    def _pixels(self, index: int) -> np.ndarray:
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        name = self._root if self._broken is None else self._source.paths[index]
        image = self._source.read(index, self.channels)
        array = to_array(fitted(image, self.size, self.shapes, name))
        worker = get_worker_info()
        room = self.cache_bytes // (worker.num_workers if worker else 1)
        if (len(self._cache) + 1) * self._image_bytes <= room:
            self._cache[index] = array
        return array


def open_labelled(
    root: Path | str, split: str, classes: Sequence[str] = (), *, needs_labels: bool = True
) -> LabelledSource:
    """The labelled set in `root`: CIFAR's images, or a list of files. UserError if there is none, or a class of `classes` is missing."""
    root = Path(root)
    if not root.is_dir():
        what = "is a file" if root.exists() else "no such folder"
        raise UserError(
            f"{root}: {what}. Expected a folder with train/CLASS/ and test/CLASS/, or with CIFAR-10, CIFAR-100 or "
            "Tiny ImageNet as distributed."
        )
    source = open_cifar(root, split) or open_class_folders(root, split, needs_labels=needs_labels)
    if not classes or tuple(classes) == source.class_names:
        return source
    return _of_classes(source, tuple(classes), root)


def _readable(source: LabelledSource, channels: int) -> LabelledSource:
    """Those of the files that can be read."""
    images = readable(source.paths, lambda path: read_image(path, channels), skip=True)
    good = {path for path, _ in images}
    kept = np.array([index for index, path in enumerate(source.paths) if path in good])
    return source.take(kept, source.class_names, source.labels[kept])


def _of_classes(source: LabelledSource, classes: tuple[str, ...], root: Path) -> LabelledSource:
    found = source.class_names
    missing = [name for name in classes if name not in found]
    if missing or len(set(classes)) < len(classes):
        why = f"{root} has no class {missing[0]}" if missing else "a class is named twice"
        raise UserError(
            f"class_names={_shown(classes)}: {why}. It has {_shown(found)}. Name classes of these, or other data."
        )
    left_out = [name for name in found if name not in classes]
    if left_out:
        message = "%s: images of %s are left out, the classes are %s"
        _log.warning(message, root, _shown(left_out), _shown(classes))
    label_of = np.array([classes.index(name) if name in classes else -1 for name in found])
    labels = label_of[source.labels]
    kept = np.flatnonzero(labels >= 0)
    return source.take(kept, classes, labels[kept])


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def folders_read(root: Path | str) -> list[Path]:
    """The folders in which a labelled set is looked for; `root` itself if it can only be one of images without classes."""
    folders = [Path(root, name) for name in ("train", "test", "valid", "val")]
    return folders if has_split(root, "train") else [*folders, Path(root)]


def has_split(root: Path | str, split: str) -> bool:
    """Whether a labelled set has this split: CIFAR always, folders if there is one of its name."""
    return holds_cifar(Path(root)) or _find_split(Path(root), split) is not None


def to_square(image: Image.Image, size: int) -> Image.Image:
    """The central square of an image, scaled (bicubic) to `size` pixels."""
    return fitted(image, (size, size))


def fitted(
    image: Image.Image, size: tuple[int, int], shapes: Shapes = "crop", name: object = "the image"
) -> Image.Image:
    """An image scaled (bicubic) to `size` (height, width).

    Of one of another shape crop takes its central part and stretch all of it; error raises `UserError`, which calls it `name`.
    """
    height, width = size
    if image.size == (width, height):
        return image
    part = (
        min(image.width, round(image.height * width / height)),
        min(image.height, round(image.width * height / width)),
    )
    if shapes == "error" and max(a - b for a, b in zip(image.size, part, strict=True)) > 1:
        raise UnfitFile(
            f"{name}: {image.width}x{image.height} has not the shape of {width}x{height}. Align and crop it as the generator's "
            "training images were (faces as FFHQ's), or use other_shapes=crop or stretch."
        )
    if shapes != "stretch":
        left, top = (image.width - part[0]) // 2, (image.height - part[1]) // 2
        image = image.crop((left, top, left + part[0], top + part[1]))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def open_class_folders(root: Path, split: str, *, needs_labels: bool = True) -> LabelledSource:
    """Finds `root/SPLIT/CLASS/*.png` and the like, at any depth below the class's folder.

    The classes are the folders of `root/train`, sorted, whatever the split: a label means the same in all. "test" is
    `root/test`, else `root/valid`, else `root/val`. Tiny ImageNet's validation images, whose classes are in a file and whose test
    images have none, are found as "test", "valid" and "val". Without `needs_labels`, a training folder without class folders, or
    with one, is a set of images without classes (`NO_CLASSES`), at any depth; and so is a `root` that holds images and no such
    folder. UserError if something is missing.
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
    return LabelledSource(names, np.array(labels, dtype=np.int64), paths, folder)


def _images_without_classes(root: Path, split: str) -> LabelledSource:
    if split == "train" and not (root / "train").is_dir():
        folder = root
        others = {root / name for names in FOLDERS.values() for name in names}
        paths = [path for path in list_images(root) if others.isdisjoint(path.parents)]
    else:
        folder = _split_folder(root, split)
        paths = list_images(folder)
    return LabelledSource(NO_CLASSES, np.zeros(len(paths), dtype=np.int64), paths, folder)


def _find_split(root: Path, split: str) -> Path | None:
    names = FOLDERS.get(split, (split,))
    return next((root / name for name in names if (root / name).is_dir()), None)


def _without_classes(root: Path) -> bool:
    """Whether the training folder holds no classes; without one, whether images lie in `root` itself."""
    train = root / "train"
    return len(_subfolders(train)) < 2 if train.is_dir() else any(map(_is_image, root.iterdir()))


def _is_image(entry: Path) -> bool:
    hidden = entry.name.startswith(".")
    return not hidden and entry.is_file() and entry.name.lower().endswith(EXTENSIONS)


def _split_folder(root: Path, split: str) -> Path:
    found = _find_split(root, split)
    if found is not None:
        return found
    raise UserError(
        f"{root}: holds no folder {' or '.join(FOLDERS.get(split, (split,)))}. Expected train/CLASS/ and test/CLASS/ (or valid, or val) "
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


def _tiny_imagenet_val(folder: Path, names: tuple[str, ...]) -> LabelledSource:
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
    return LabelledSource(names, np.array(labels, dtype=np.int64), paths, folder)


def _unknown_class(where: object, name: str, root: Path) -> UserError:
    return UserError(
        f"{where}: is of the class {name}, but {root / 'train'} holds no folder of this name. "
        "Add the class to train, or remove it here."
    )
