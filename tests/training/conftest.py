"""Tiny data sets of every kind, and tiny runs on them."""

import itertools
import signal

import numpy as np
import pytest
from pictures import folders, levels, noise, scripted, write
from PIL import Image
from tiny import CLASSES, config_of
from torch import Tensor, cat, nn

from fastnce.networks.style_generator import StyleGenerator, save_rosinality
from fastnce.systems import SYSTEMS
from fastnce.training import Interrupted, train


class Colours(nn.Module):
    """Mean colours and their products: features (N, 6) of uint8 images."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.float().mean((2, 3)) / 255
        return cat([mean, mean * mean.roll(1, 1)], 1)


@pytest.fixture(scope="session")
def extractor(tmp_path_factory):
    """A TorchScript file of `Colours`."""
    return scripted(Colours(), tmp_path_factory.mktemp("extractor") / "colours.pt")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """trainA (5), trainB (3), testA (2) and testB (2): random 20x20 RGB images."""
    counts = {"trainA": 5, "trainB": 3, "testA": 2, "testB": 2}
    return folders(tmp_path_factory.mktemp("data"), counts)


@pytest.fixture(scope="session")
def single(tmp_path_factory):
    """trainA: one image of 44x30; trainB: one of 25x50."""
    root = tmp_path_factory.mktemp("single")
    noise(root / "trainA" / "photo.png", (44, 30), seed=1)
    noise(root / "trainB" / "photo.png", (25, 50), seed=2)
    return root


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Smooth images and their negatives, side by side: 24 to train, 4 to test."""
    root = folders(tmp_path_factory.mktemp("pairs"), {"train": 24, "test": 4}, size=(4, 4))
    for path in root.rglob("*.png"):
        with Image.open(path) as small:
            a = np.asarray(small.resize((16, 16), Image.Resampling.BICUBIC))
        Image.fromarray(np.concatenate([a, 255 - a], axis=1)).save(path)
    return root


@pytest.fixture(scope="session")
def classes(tmp_path_factory):
    """Five training and four test images of each of three classes, 16x16, darker and lighter."""
    root = tmp_path_factory.mktemp("classes")
    for shade, name in enumerate(CLASSES):
        counts = {f"train/{name}": 5, f"test/{name}": 4}
        folders(root, counts, size=(16, 16), low=80 * shade, high=80 * shade + 80)
    return root


@pytest.fixture(scope="session")
def labels(tmp_path_factory):
    """Label maps of three classes and "don't care", instances and photographs of 40x36: five to train, two to test."""
    root = tmp_path_factory.mktemp("labels")
    counts = {"train": 5, "test": 2}
    folders(root, {f"{name}_img": n for name, n in counts.items()}, size=(40, 36))
    for name, count in counts.items():
        for index in range(count):
            regions = levels(9, 10, high=4, seed=index).repeat(4, 0).repeat(4, 1)
            write(root / f"{name}_label" / f"{index}.png", np.where(regions == 3, 255, regions))
            write(root / f"{name}_inst" / f"{index}.png", regions // 2)
    return root


@pytest.fixture(scope="session")
def style_file(tmp_path_factory):
    """A file of a generator of 16x16 pixels in rosinality's layout, with a mean latent."""
    generator = StyleGenerator(16, 6, 2, [6, 5, 4])
    generator.latent_avg.normal_()
    path = tmp_path_factory.mktemp("generator") / "generator.pt"
    save_rosinality(path, generator)
    return path


@pytest.fixture(scope="session")
def made(data, single, pairs, classes, labels, style_file):
    sets = {"data": data, "single": single, "pairs": pairs, "classes": classes}
    return sets | {"labels": labels, "generator": style_file}


@pytest.fixture
def tiny(made, tmp_path):
    """Makes the tiny configuration of a variant, with changes; `out` is tmp_path/run unless given."""

    def make(variant="cut", **changes):
        return config_of(variant, made, changes.pop("out", tmp_path / "run"), **changes)

    return make


@pytest.fixture(scope="session")
def whole(made, tmp_path_factory):
    """The tiny run of a variant, with changes, trained once without a stop; tests leave it as it is."""
    runs = {}

    def run(variant="cut", **changes):
        key = f"{variant} {changes}"
        if key not in runs:
            out = tmp_path_factory.mktemp(variant) / "run"
            runs[key] = train(config_of(variant, made, out, **changes))
        return runs[key]

    return run


@pytest.fixture
def stopped(monkeypatch):
    """Trains until this process gets a signal at the end of that training step, counted from now."""

    def train_until(config, step, number=signal.SIGINT):
        system, model_of = SYSTEMS[config.system], SYSTEMS[config.system].model

        def model(config, dataset):
            built = model_of(config, dataset)
            training_step, steps = built.training_step, itertools.count(1)

            def counted(batch):
                losses = training_step(batch)
                if next(steps) == step:
                    signal.raise_signal(number)
                return losses

            built.training_step = counted
            return built

        with monkeypatch.context() as patch, pytest.raises(Interrupted) as stop:
            patch.setattr(system, "model", model)
            train(config)
        assert stop.value.code == 130

    return train_until
