"""Label maps and the photographs that they stand for: pairs as semantic image synthesis reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastnce.data.broken import BrokenFiles
from fastnce.data.domains import CachedImages, FileStream, Side, by_name, expect_one_of, match
from fastnce.data.folders import contents, describe_folder, expect_folder, list_images
from fastnce.data.images import UnfitFile, read_indices
from fastnce.data.transforms import Preprocess
from fastnce.errors import UserError

# The name of each mode and the steps of `Preprocess` that it is.
PREPROCESS = {
    "fixed": "fixsize",
    "resize_and_crop": "resize_and_crop",
    "crop": "crop",
    "scale_width": "scale_width",
    "scale_width_and_crop": "scale_width_and_crop",
    "scale_shortside": "scale_shortside",
    "scale_shortside_and_crop": "scale_shortside_and_crop",
    "none": "none",
}

# Of whole images each side becomes a multiple of this.
WHOLE_MULTIPLE = 32

# The number of "don't care" in files; the second one where the first is a class.
_DONT_CARE, _DONT_CARE_16 = 255, 65535

_CITYSCAPES = {
    "label": ("gtFine", "_labelIds"),
    "img": ("leftImg8bit", "_leftImg8bit"),
    "inst": ("gtFine", "_instanceIds"),
}


class _Part(NamedTuple):
    """A folder and its files by the names that partners have in common."""

    folder: Path
    named: dict[Path, Path]


def one_hot(label: Tensor, channels: int, edges: Tensor | None = None) -> Tensor:
    """One channel for each class, 1 where a pixel is of it, and one more for the edges of instances.

    Args:
        label: (N, H, W) int64, 0 to `channels` - 1.
        channels: of the classes, the one of "don't care" among them.
        edges: (N, 1, H, W), or None.

    Returns:
        (N, channels, H, W) float32; with edges (N, channels + 1, H, W), theirs the last.

    Raises:
        ValueError: a shape or a type is another one.

    Examples:
        >>> one_hot(torch.tensor([[[0, 2]]]), 3)[0, :, 0].tolist()
        [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    """
    if label.ndim != 3 or label.dtype != torch.int64:
        raise ValueError(
            f"one_hot: label: expected (N, H, W) int64, got {tuple(label.shape)} {label.dtype}. Stack the maps of a batch."
        )
    n, h, w = label.shape
    if edges is not None and edges.shape != (n, 1, h, w):
        raise ValueError(
            f"one_hot: edges: expected {(n, 1, h, w)}, one channel beside label, got {tuple(edges.shape)}."
        )
    total = channels + (edges is not None)
    result = torch.zeros(n, total, h, w, dtype=torch.float32, device=label.device)
    result.scatter_(1, label[:, None], 1)
    if edges is not None:
        result[:, channels:] = edges
    return result


def instance_edges(instances: Tensor) -> Tensor:
    """Where a pixel differs from any of its four neighbours: both sides of a border between two instances.

    Args:
        instances: (..., H, W) integers.

    Returns:
        The same shape, float32: 1 at an edge, else 0.

    Examples:
        >>> instance_edges(torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 3, 2]])).int().tolist()
        [[0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """
    edges = torch.zeros(instances.shape, dtype=torch.bool, device=instances.device)
    across = instances[..., 1:] != instances[..., :-1]
    down = instances[..., 1:, :] != instances[..., :-1, :]
    edges[..., 1:] |= across
    edges[..., :-1] |= across
    edges[..., 1:, :] |= down
    edges[..., :-1, :] |= down
    return edges.float()


class CachedIndices(CachedImages):
    """The files of one kind of maps, label maps or instances, scaled to the nearest pixel, and kept in memory as far as they fit.

    Args:
        label_classes: C: the files hold 0 to C - 1. None takes any number, as instances have.
        dont_care: also C, and 255, which becomes C, for pixels without a class (65535 in the place of 255 if C is above 255).
    """

    def __init__(
        self,
        side: Side,
        broken: BrokenFiles,
        preprocess: Preprocess,
        cache_bytes: int,
        label_classes: int | None = None,
        dont_care: bool = False,
    ) -> None:
        self.label_classes, self.dont_care = label_classes, dont_care
        super().__init__(side, broken, [preprocess], (1, 8, None), cache_bytes)

    def sample(self, index: int, phase: int, rng: np.random.Generator) -> Tensor:
        """Map `index`, augmented: (H, W) int64."""
        array = self.phases[phase].augment(self._prepared(index, phase), rng)
        return torch.from_numpy(array[:, :, 0].astype(np.int64))

    def describe(self) -> list[str]:
        return describe_folder(
            self.folder,
            self.paths,
            channels=1,
            skip_broken=self.broken.skip,
            read=lambda path: self._numbers(path)[:, :, None],
        )

    def _read(self, path: Path) -> Image.Image:
        numbers = self._numbers(path)
        return Image.fromarray(numbers.astype(np.uint8) if numbers.max() < 256 else numbers)

    def _numbers(self, path: Path) -> np.ndarray:
        """The file's classes, checked, or its instances: (H, W) uint16."""
        numbers, classes = read_indices(path), self.label_classes
        if classes is None:
            return numbers
        ignored = _DONT_CARE if classes <= _DONT_CARE else _DONT_CARE_16
        if self.dont_care:
            numbers[numbers == ignored] = classes
        highest = int(numbers.max())
        if highest < classes + self.dont_care:
            return numbers
        fix = f"Use label_classes={highest + 1}, or write the file with other numbers."
        if highest == ignored and not self.dont_care:
            fix = f'If {ignored} stands for "no class" use dont_care.'
        raise UnfitFile(
            f"{path}: holds the label {highest}, and with label_classes={classes} labels are 0 to {classes - 1}"
            f"{f', and {ignored} for pixels without a class' if self.dont_care else ''}. {fix}"
        )


class LabelMaps(FileStream):
    """Label maps and their photographs, as an endless stream of samples.

    A sample is {"label": (H, W) int64, "edges": (1, H, W) float32, "B": (C, H, W) float32 in [-1, 1]}, "edges" only with
    `instances`: see `one_hot`. Crop and mirroring are drawn for each sample, the same for all of it. Sample i, for any i >= 0, is
    a pure function of (seed, i) and the arguments: see `Stream`. Every `len(self)` samples are an epoch: all pairs, in an order
    drawn for it.

    The layouts, of which `PART` is `label`, `img` or, for instances, `inst`; a file's partners have its name but for the extension:

    - "folders" and "facades": `root/train_PART`, and `test_PART` or `val_PART`.
    - "coco": the same, and for training also `root/train_PART_portrait` where there is one.
    - "cityscapes": as distributed, `root/gtFine/train/*/*_labelIds.png`, `*_instanceIds.png` and `root/leftImg8bit/train/*/*.png`,
      partners by the first three parts of the name; "test" is `val`, as the test images have no labels.
    - "ade20k": images (`.jpg`) and label maps (`.png`) anywhere below `root`, with `_train_` or `_val_` in their names.

    Args:
        root: folder of the data; or, for "folders", the folders by their names (`train_label` and so on), wherever they are.
        split: "train", or "test" or "val", each of which stands in for the other.
        layout: see above.
        label_classes: C: the files hold the labels 0 to C - 1.
        dont_care: the files hold 255 where a pixel has no class; it becomes the label C, and there are C + 1 channels. (65535 in the
            place of 255 if C is above 255.)
        instances: reads maps of instances too, for "edges".
        images: reads the photographs; without them a sample has no "B".
        preprocess: "fixed" scales to `crop_size` x round(`crop_size` / `aspect_ratio`). "resize_and_crop" scales to a square of
            `load_size` and cuts a random square of `crop_size`; "scale_width" and "scale_shortside" scale that side to `load_size`,
            alone or with "_and_crop"; "crop" only cuts. "none" rounds the sides to multiples of 32.
        load_size, crop_size: in pixels.
        aspect_ratio: width over height, of "fixed" alone.
        flip: mirrors each sample with probability 0.5.
        channels: of the photographs, 3 for RGB, 1 for greyscale.
        serial: takes the pairs in order, without shuffling.
        seed: seed of the stream.
        cache_bytes: memory for decoded images, shared out among the workers.
        broken_files: "error" stops at the first file that cannot be read. "skip" takes the next readable pair in its place and
            names the file in the log, once.

    Attributes:
        channels: of `one_hot`'s labels: C, and one more with `dont_care`.

    Raises:
        UserError: no such folder, a file without a partner or of another size than it, a label beyond the classes, a label map with
            colours, a file that is no image, an image smaller than the crop, or an argument out of range. What only the pixels
            tell of a set too large for decoding it all at once is found by `describe`, or when a file is first read.
    """

    def __init__(
        self,
        root: Path | str | Mapping[str, Path],
        split: str = "train",
        *,
        layout: str = "folders",
        label_classes: int,
        dont_care: bool = False,
        instances: bool = False,
        images: bool = True,
        preprocess: str = "resize_and_crop",
        load_size: int = 286,
        crop_size: int = 256,
        aspect_ratio: float = 1.0,
        flip: bool = True,
        channels: int = 3,
        serial: bool = False,
        seed: int = 0,
        cache_bytes: int = 2 * 2**30,
        broken_files: str = "error",
    ) -> None:
        super().__init__(seed, serial, broken_files)
        if not 1 <= label_classes <= _DONT_CARE_16:
            raise UserError(
                f"label_classes={label_classes}: expected 1 to {_DONT_CARE_16}, one more than the greatest label."
            )
        names = ["label", *(["img"] if images else []), *(["inst"] if instances else [])]
        sides = find_label_maps(root, split, layout, names)
        self.label_classes, self.dont_care = label_classes, dont_care
        self.channels = label_classes + dont_care
        how = _preprocess(preprocess, load_size, crop_size, aspect_ratio, flip)
        nearest = _preprocess(preprocess, load_size, crop_size, aspect_ratio, flip, nearest=True)
        label = sides["label"]
        broken = BrokenFiles(label.folder, label.paths, broken_files == "skip")
        share = cache_bytes // len(names)
        self._parts: dict[str, CachedImages] = {
            "label": CachedIndices(label, broken, nearest, share, label_classes, dont_care)
        }
        if images:
            self._parts["B"] = CachedImages(sides["img"], broken, [how], (channels, 8, None), share)
        if instances:
            self._parts["inst"] = CachedIndices(sides["inst"], broken, nearest, share)
        self.expect_partners_of_one_size()

    @property
    def parts(self) -> Mapping[str, CachedImages]:
        """The files of "label", "B" and "inst", as far as they are read."""
        return self._parts

    def __len__(self) -> int:
        """Pairs."""
        return len(self._parts["label"].paths)

    def sample(self, index: int) -> dict[str, Tensor]:
        sample = self.partners(index)
        if "inst" in sample:
            sample["edges"] = instance_edges(sample.pop("inst"))[None]
        return sample


def find_label_maps(
    root: Path | str | Mapping[str, Path],
    split: str = "train",
    layout: str = "folders",
    parts: Sequence[str] = ("label", "img"),
) -> dict[str, Side]:
    """The files of a set in one of the layouts of `LabelMaps`, by part, those of one name at one index.

    Args:
        parts: of "label", "img" and "inst".

    Raises:
        UserError: no such folder, or a file without a partner.
    """
    expect_one_of("layout", layout, tuple(_LAYOUTS))
    if isinstance(root, Mapping):
        if layout != "folders":
            raise UserError(f'layout="{layout}": folders by name are for layout="folders".')
        found = [_named_folder(root, split, part) for part in parts]
    else:
        root = Path(root)
        expect_folder(root, f'a folder of the layout "{layout}"')
        found = [_LAYOUTS[layout](root, split, part) for part in parts]
    sides = match([part.folder for part in found], [part.named for part in found])
    return dict(zip(parts, sides, strict=True))


def _preprocess(
    mode: str,
    load_size: int,
    crop_size: int,
    aspect_ratio: float,
    flip: bool,
    nearest: bool = False,
) -> Preprocess:
    expect_one_of("preprocess", mode, tuple(PREPROCESS))
    if not aspect_ratio > 0:
        raise UserError(f"aspect_ratio={aspect_ratio}: expected width over height, above 0.")
    return Preprocess(
        PREPROCESS[mode],
        load_size,
        crop_size,
        flip,
        fixed_size=(crop_size, max(1, round(crop_size / aspect_ratio))),
        multiple=WHOLE_MULTIPLE if mode == "none" else 1,
        nearest=nearest,
    )


def _splits(split: str) -> tuple[str, ...]:
    """The names of a split, in order of preference."""
    return {"test": ("test", "val"), "val": ("val", "test")}.get(split, (split,))


def _named_folder(root: Mapping[str, Path], split: str, part: str) -> _Part:
    for name in _splits(split):
        if f"{name}_{part}" in root:
            folder = Path(root[f"{name}_{part}"])
            return _Part(folder, by_name(folder))
    raise UserError(
        f"{split}_{part} is missing. Give it beside {', '.join(root) or 'the other folders'}."
    )


def _split_of(root: Path, split: str) -> str:
    """The split's name in the folder's names."""
    names = _splits(split)
    for name in names:
        if (root / f"{name}_label").is_dir():
            return name
    expected = " or ".join(f"{name}_label" for name in names)
    raise UserError(
        f"{root}: holds no folder {expected}. Expected train_label and train_img (for testing, test_label and test_img, or val_label and "
        f"val_img), and _inst of instances; found {contents(root)}. Name the folder that holds these, another layout, or rename yours."
    )


def _in_folders(root: Path, split: str, part: str) -> _Part:
    folder = root / f"{_split_of(root, split)}_{part}"
    return _Part(folder, by_name(folder))


def _coco(root: Path, split: str, part: str) -> _Part:
    found = _in_folders(root, split, part)
    portrait = root / f"train_{part}_portrait"
    if split != "train" or not (root / "train_label_portrait").is_dir():
        return found
    more = {Path("portrait") / name: path for name, path in by_name(portrait).items()}
    return _Part(root, found.named | more)


def _cityscapes(root: Path, split: str, part: str) -> _Part:
    top, ending = _CITYSCAPES[part]
    folder = root / top / ("val" if split == "test" else split)
    files = [path for path in list_images(folder) if path.stem.endswith(ending)]
    if not files:
        raise UserError(
            f"{folder}: holds no file *{ending}.png. Unpack Cityscapes' {top} archive here."
        )
    return _Part(folder, {Path(*path.stem.split("_")[:3]): path for path in files})


def _ade20k(root: Path, split: str, part: str) -> _Part:
    if part == "inst":
        raise UserError(
            'layout="ade20k" has no instances. Turn instances off, or use another layout.'
        )
    suffix = {"label": ".png", "img": ".jpg"}[part]
    name = "val" if split == "test" else split
    files = [path for path in list_images(root) if f"_{name}_" in path.name]
    files = [path for path in files if path.suffix.lower() == suffix]
    if not files:
        raise UserError(
            f"{root}: holds no {suffix} file with _{name}_ in its name, as ADE20K's have. Name the folder that holds them, or use "
            'layout="folders".'
        )
    return _Part(root, {Path(path.stem): path for path in files})


_LAYOUTS: dict[str, Callable[[Path, str, str], _Part]] = {
    "folders": _in_folders,
    "cityscapes": _cityscapes,
    "ade20k": _ade20k,
    "coco": _coco,
    "facades": _in_folders,
}
