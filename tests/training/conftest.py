"""A tiny unpaired data set and a tiny CUT that takes milliseconds per step."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY
from torch import Tensor, nn

from fastnce.training import CUTTrainConfig, build_config


class Colours(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3)) / 255


@pytest.fixture(scope="session")
def extractor(tmp_path_factory) -> Path:
    """A TorchScript file whose features are the mean colours."""
    path = tmp_path_factory.mktemp("extractor") / "colours.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Colours()).save(str(path))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """trainA (5), trainB (3), testA (2) and testB (2): random 20x20 RGB images."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for folder, count in (("trainA", 5), ("trainB", 3), ("testA", 2), ("testB", 2)):
        (root / folder).mkdir()
        for index in range(count):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{index}.png")
    return root


@pytest.fixture
def tiny(data, tmp_path) -> Callable[..., CUTTrainConfig]:
    """Makes the tiny configuration, with changes; `out` is tmp_path/run unless given."""

    def make(variant: str = "cut", **changes: object) -> CUTTrainConfig:
        paths = {"data": data, "out": tmp_path / "run"}
        return build_config(variant, overrides=paths | TINY | changes)

    return make
