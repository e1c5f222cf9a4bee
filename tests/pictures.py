"""Files that tests read: images, and modules in TorchScript; and samples made of images."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def levels(*shape, low=0, high=256, dtype=np.uint8, seed=0) -> np.ndarray:
    """Random ones, low <= level < high."""
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def write(path, array, **options) -> Path:
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


def noise(path, size=(20, 20), channels=3, **how) -> Path:
    """Writes random levels of (width, height)."""
    shape = (*size[::-1], channels) if channels > 1 else size[::-1]
    return write(path, levels(*shape, **how))


def folders(root, counts, suffix=".png", **how) -> Path:
    """`noise` in 0.png, 1.png and so on in each folder; `counts` says how many."""
    for seed, (name, count) in enumerate(counts.items()):
        for index in range(count):
            noise(root / name / f"{index}{suffix}", seed=100 * seed + index, **how)
    return root


def cut_short(path, size=200) -> Path:
    """Leaves the first bytes of a file only."""
    path.write_bytes(path.read_bytes()[:size])
    return path


def scripted(module: torch.nn.Module, path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


def equal(one: dict, other: dict) -> bool:
    """Whether two samples are the same."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
