"""Tiny data sets of every kind, and tiny runs on them."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import config_of
from torch import Tensor, nn

from fastnce.training import train

CLASSES = ("ant", "bee", "cat")


class Colours(nn.Module):
    """Mean colours and their products: features (N, 6) of uint8 images."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.float().mean((2, 3)) / 255
        return torch.cat([mean, mean * mean.roll(1, 1)], 1)


@pytest.fixture(scope="session")
def extractor(tmp_path_factory) -> Path:
    """A TorchScript file of `Colours`."""
    path = tmp_path_factory.mktemp("extractor") / "colours.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Colours()).save(str(path))
    return path


def noise(path: Path, size=(20, 20), low=0, high=256, seed=0) -> Path:
    """Writes a random RGB image of (width, height)."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(low, high, (*size[::-1], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """trainA (5), trainB (3), testA (2) and testB (2): random 20x20 RGB images."""
    root = tmp_path_factory.mktemp("data")
    for seed, (folder, count) in enumerate(
        zip(("trainA", "trainB", "testA", "testB"), (5, 3, 2, 2), strict=True)
    ):
        for index in range(count):
            noise(root / folder / f"{index}.png", seed=10 * seed + index)
    return root


@pytest.fixture(scope="session")
def single(tmp_path_factory) -> Path:
    """trainA: one image of 44x30; trainB: one of 25x50."""
    root = tmp_path_factory.mktemp("single")
    noise(root / "trainA" / "photo.png", (44, 30), seed=1)
    noise(root / "trainB" / "photo.png", (25, 50), seed=2)
    return root


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Smooth images and their negatives, side by side: 24 to train, 4 to test."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 4)):
        (root / split).mkdir()
        for index in range(count):
            small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            a = np.asarray(small.resize((16, 16), Image.Resampling.BICUBIC))
            both = np.concatenate([a, 255 - a], axis=1)
            Image.fromarray(both).save(root / split / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def classes(tmp_path_factory) -> Path:
    """Five training and four test images of each of three classes, 16x16, darker and lighter."""
    root = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 5), ("test", 4)):
        for shade, name in enumerate(CLASSES):
            for index in range(count):
                path, seed = root / split / name / f"{index}.png", 100 * shade + 10 * count + index
                noise(path, (16, 16), 80 * shade, 80 * shade + 80, seed)
    return root


@pytest.fixture(scope="session")
def made(data, single, pairs, classes) -> dict[str, Path]:
    return {"data": data, "single": single, "pairs": pairs, "classes": classes}


@pytest.fixture
def tiny(made, tmp_path):
    """Makes the tiny configuration of a variant, with changes; `out` is tmp_path/run unless given."""

    def make(variant="cut", **changes):
        return config_of(variant, made, changes.pop("out", tmp_path / "run"), **changes)

    return make


@pytest.fixture(scope="session")
def whole(made, tmp_path_factory):
    """The tiny run of a variant, trained once, without a stop."""
    runs = {}

    def run(variant="cut"):
        if variant not in runs:
            out = tmp_path_factory.mktemp(variant) / "run"
            runs[variant] = train(config_of(variant, made, out))
        return runs[variant]

    return run
