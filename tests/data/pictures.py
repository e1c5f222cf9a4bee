"""Image files and samples for the tests of this folder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, array, **options) -> Path:
    """An array as a file of the kind that its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(array)
    if path.suffix == ".npy":
        np.save(path, array)
    elif array.dtype == np.int16:  # as unsigned, with the tag that says that there is a sign
        Image.fromarray(array.view(np.uint16)).save(path, tiffinfo={339: (2,)})
    else:
        Image.fromarray(array).save(path, **options)
    return path


def write_noise(root: Path, **counts: int) -> Path:
    """So many images of noise, 28x24, in each folder: 0.png, 1.png, ..., no two alike."""
    for number, (folder, count) in enumerate(counts.items()):
        for index, pixels in enumerate(noise(count, 24, 28, 3, seed=number)):
            write(root / folder / f"{index}.png", pixels)
    return root


def equal(one: dict, other: dict) -> bool:
    """Whether two samples are the same."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
