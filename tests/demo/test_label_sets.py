"""The built-in sets of label maps: made of what they say, parts that share nothing, and networks that read textures."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce import cli
from fastnce.data import LabelMaps
from fastnce.demo import TextureRecipe, read_labels, write_posterised_photos, write_texture_mosaics
from fastnce.demo.label_sets import TEXTURES, load_texture, posterise
from fastnce.demo.mosaics import three_parts
from fastnce.demo.texture_networks import write_networks
from fastnce.metrics.extractors import ScriptedExtractor, load_scripted

COUNTS = {"train_count": 8, "test_count": 8}
WRITERS = {"mosaics": write_texture_mosaics, "posterised": write_posterised_photos}


@pytest.fixture(scope="module", params=WRITERS)
def written(request, tmp_path_factory):
    write = WRITERS[request.param]
    return write, write(tmp_path_factory.mktemp("sets") / "set", networks=None, **COUNTS)


@pytest.fixture(scope="module")
def parts():
    return [three_parts(name, load_texture(name), 32) for name in ("petals", "wood", "gravel")]


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_set_depends_on_the_seed_alone_and_is_read_as_label_maps(written, tmp_path):
    write, root = written
    again = write(tmp_path / "again", networks=None, **COUNTS)
    files = sorted(path.relative_to(root) for path in root.rglob("*.*"))
    assert all((root / name).read_bytes() == (again / name).read_bytes() for name in files)
    other = write(tmp_path / "other", networks=None, seed=1, **COUNTS)
    assert read_labels(other)["images"] != read_labels(root)["images"]
    for split in ("train", "test"):
        dataset = LabelMaps(root, split, label_classes=8, preprocess="crop", crop_size=32)
        assert len(dataset) == 8
        seen = torch.stack([sample["label"] for sample in dataset])
        assert len(seen.unique()) > 4
        photographs = torch.stack([sample["B"] for sample in dataset])
        assert photographs.std(dim=(1, 2, 3)).min() > 0.005


def test_a_cell_shows_the_crop_that_the_labels_name(tmp_path):
    root = write_texture_mosaics(tmp_path / "set", networks=None, **COUNTS)
    labels = read_labels(root)
    textures = [load_texture(name) for name in labels["recipe"]["textures"]]
    of_split = [three_parts("", texture, 32) for texture in textures]
    for split in ("train", "test"):
        for number in range(8):
            name = f"{number:04d}.png"
            image, label, cell = (
                pixels(root / f"{split}_{part}" / name) for part in ("img", "label", "inst")
            )
            cells = labels["images"][f"{split}_label/{name}"]["cells"]
            assert set(np.unique(cell)) <= set(range(len(cells)))
            for index, told in enumerate(cells):
                (y, x), here = told["corner"], cell == index
                part = getattr(of_split[told["texture"]], split)
                assert (label[here] == told["texture"]).all()
                assert (image[here] == part[y : y + 32, x : x + 32][here]).all()


@pytest.mark.parametrize("name", TEXTURES)
def test_the_parts_of_a_texture_share_no_pixel(name):
    height, width = load_texture(name).shape[:2]
    numbers = np.arange(height * width).reshape(height, width)
    parts = three_parts(name, numbers, 64)
    assert min(side for part in parts for side in part.shape) >= 64
    assert sorted(np.concatenate([part.ravel() for part in parts])) == list(range(height * width))


def test_posterised_is_quantised_luminance():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 32, axis=0).repeat(3, 2)
    levels = posterise(ramp, 16)
    assert (np.abs(levels * 32.0 + 15.5 - ramp[:, :, 0]) <= 17).all()
    assert set(np.unique(levels)) == set(range(8))


def test_networks_read_textures(parts, tmp_path):
    recipe = TextureRecipe(critic_steps=40, judge_steps=40, critic_batch=32, judge_batch=8)
    notes = write_networks(tmp_path, parts, 32, recipe, progress=False)["networks"]
    assert notes["critic.pt"]["test_accuracy"] > 0.6  # of three; by chance 0.33
    assert notes["segmenter.pt"]["test_accuracy"] > 0.6
    images = torch.rand(2, 3, 64, 32) * 2 - 1
    critic = load_scripted("critic", tmp_path / "critic.pt")[0]
    shapes = [tuple(x.shape[1:]) for x in critic(images)]
    assert shapes == [(16, 64, 32), (32, 32, 16), (64, 16, 8), (96, 8, 4)]
    images.requires_grad_()
    critic(images)[-1].sum().backward()
    assert images.grad.abs().sum() > 0
    assert ScriptedExtractor(tmp_path / "judge.pt")(images).shape == (2, 96)
    segmenter = load_scripted("segmenter", tmp_path / "segmenter.pt")[0]
    assert segmenter(torch.zeros(2, 3, 64, 32, dtype=torch.uint8)).shape == (2, 3, 64, 32)


def test_the_judge_sees_its_own_parts_alone(parts, tmp_path):
    recipe = TextureRecipe(critic_steps=2, judge_steps=2, critic_batch=2, judge_batch=2)
    other = [part._replace(train=255 - part.train, test=255 - part.test) for part in parts]
    weights = []
    for name, given in (("one", parts), ("other", other)):
        (tmp_path / name).mkdir()
        write_networks(tmp_path / name, given, 32, recipe, progress=False)
        files = (load_scripted(x, tmp_path / name / f"{x}.pt")[0] for x in ("critic", "judge"))
        weights.append([torch.cat([x.flatten() for x in file.parameters()]) for file in files])
    (critic, judge), (other_critic, other_judge) = weights
    assert torch.equal(judge, other_judge)
    assert not torch.equal(critic, other_critic)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "67"], 'size=67: does not fit the texture "foliage" .* Use a size of at most 66'),
        (["--textures", "10"], "textures=10: expected 2 to 9"),
        (["--cells", "0"], "cells=0: expected 1 to 255"),
        (["--test-count", "0"], "test_count=0: expected at least 1"),
    ],
)  # fmt: skip
def test_mistakes(options, message, tmp_path, capsys):
    out = str(tmp_path / "set")
    assert cli.main(["data", "texture-mosaics", "--out", out, "--no-networks", *options]) == 2
    assert not (tmp_path / "set").exists()
    assert re.search(message, capsys.readouterr().err)
