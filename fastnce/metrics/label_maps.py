"""Cityscapes' label maps: the 19 classes that are evaluated, and reading maps of ids and of colours."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastnce.data.folders import list_images
from fastnce.errors import UserError

LabelKind = Literal["train-ids", "ids", "colours"]

IGNORED = 255

# By train id, 0 to 18: name, id, colour. The numbers and colours of the data set's documentation.
_CLASSES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
CLASSES = tuple(name for name, _, _ in _CLASSES)

# Unlabelled and the like, dynamic, ground, parking, rail track, guard rail, bridge, tunnel, caravan, trailer.
_VOID_COLOURS = (
    (0, 0, 0),
    (111, 74, 0),
    (81, 0, 81),
    (250, 170, 160),
    (230, 150, 140),
    (180, 165, 180),
    (150, 100, 100),
    (150, 120, 90),
    (0, 0, 90),
    (0, 0, 110),
)
_COLOURS = np.array([colour for _, _, colour in _CLASSES] + list(_VOID_COLOURS), dtype=np.int32)
_ID_OF_COLOUR = np.array([*range(len(CLASSES)), *(IGNORED for _ in _VOID_COLOURS)], dtype=np.uint8)
_TRAIN_ID_OF_ID = np.full(256, IGNORED, dtype=np.uint8)
_TRAIN_ID_OF_ID[[number for _, number, _ in _CLASSES]] = np.arange(len(CLASSES))

# An image of which most pixels are further than this from every colour is a photograph, not a label map.
_FAR = 40

# What Cityscapes appends to the name of a scene, for each kind of label map and for the photograph.
_SUFFIX = {
    "train-ids": "_labelTrainIds",
    "ids": "_labelIds",
    "colours": "_color",
}
_ENDINGS = (
    *(f"_{grain}{suffix}" for grain in ("gtFine", "gtCoarse") for suffix in _SUFFIX.values()),
    "_gtFine_instanceIds",
    "_gtFine_instanceTrainIds",
    "_gtCoarse_instanceIds",
    "_leftImg8bit",
)


def label_key(path: Path) -> str:
    """What an image and its label map have in common: the name without Cityscapes' endings and the extension.

    Also without the `_A` and `_B` of the published preparation, where `1_A.jpg` and `1_B.jpg` belong together.

    Example:
        >>> label_key(Path("ulm_000001_000019_gtFine_color.png")), label_key(Path("7_B.jpg"))
        ('ulm_000001_000019', '7')
    """
    stem = path.stem
    for ending in _ENDINGS:
        stem = stem.removesuffix(ending)
    return stem[:-2] if stem[:-2].isdigit() and stem.endswith(("_A", "_B")) else stem


def label_files(folder: Path | str, kind: LabelKind) -> dict[str, Path]:
    """The label maps in a folder and those below it, by `label_key`.

    Of a folder with several kinds of maps for a scene, as Cityscapes' own, those of `kind` are taken.

    Raises:
        UserError: no folder, no image, or two maps of one scene.
    """
    paths = [path for path in list_images(folder) if path.suffix.lower() != ".npy"]
    of_kind = [path for path in paths if path.stem.endswith(_SUFFIX[kind])]
    files: dict[str, Path] = {}
    for path in of_kind or paths:
        other = files.setdefault(label_key(path), path)
        if other != path:
            raise UserError(
                f"{path} and {other} are label maps of one scene. Leave one of them, or name a folder of one kind of maps."
            )
    return files


def read_label_map(path: Path, kind: LabelKind) -> Tensor:
    """A label map as train ids, 0 to 18, and 255 for what is not evaluated.

    Args:
        path: "train-ids" and "ids": an 8-bit greyscale or palette image whose pixels are the numbers; "colours": an RGB image.
            Each pixel of it counts as the nearest of the data set's colours, void ones included, so that it may be a JPEG.
        kind: What the file holds.

    Returns:
        (H, W) int64.

    Raises:
        UserError: the file is no image, of another kind, or has numbers that are none of the kind.
    """
    try:
        with Image.open(path) as image:
            if kind == "colours":
                return torch.from_numpy(
                    _from_colours(path, np.asarray(image.convert("RGB")))
                ).long()
            if image.mode not in ("L", "P"):
                raise UserError(
                    f"{path}: is of mode {image.mode}, but label maps of {kind} have one 8-bit channel. "
                    "Use --label-kind colours for colours."
                )
            ids = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: is not a readable image ({error}).") from error
    if kind == "ids":
        return torch.from_numpy(_TRAIN_ID_OF_ID[ids]).long()
    wrong = ids[(ids >= len(CLASSES)) & (ids != IGNORED)]
    if wrong.size:
        raise UserError(
            f"{path}: {wrong[0]} is no train id; those are 0 to {len(CLASSES) - 1}, and {IGNORED} for the rest. "
            "Use --label-kind ids if the maps hold Cityscapes' own ids."
        )
    return torch.from_numpy(ids).long()


def _from_colours(path: Path, pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 to train ids (H, W) uint8."""
    packed = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    colours, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
    unpacked = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], 1)
    nearest, squared = np.empty(len(colours), dtype=np.int64), np.empty(len(colours))
    for start in range(0, len(colours), 4096):
        part = slice(start, start + 4096)
        distances = np.square(unpacked[part, None] - _COLOURS).sum(2)
        nearest[part], squared[part] = distances.argmin(1), distances.min(1)
    if counts[squared > _FAR**2].sum() > packed.size / 2:
        raise UserError(
            f"{path}: most of its pixels have none of Cityscapes' colours. Name a folder of label maps, or use "
            "--label-kind ids or train-ids."
        )
    return _ID_OF_COLOUR[nearest][inverse].reshape(packed.shape)
