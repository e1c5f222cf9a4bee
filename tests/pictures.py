"""Files that tests read: images of random levels, and modules in TorchScript."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def noise(path, size=(20, 20), channels=3, low=0, high=256, dtype=np.uint8, seed=0) -> Path:
    """Writes random levels of low <= level < high, of (width, height), as an image or as .npy."""
    shape = (*size[::-1], channels) if channels > 1 else size[::-1]
    levels = np.random.default_rng(seed).integers(low, high, shape).astype(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, levels)
    else:
        Image.fromarray(levels).save(path)
    return path


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
