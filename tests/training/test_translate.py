"""Trained generators: loading, and translating tensors and folders."""

import numpy as np
import pytest
import torch

from fastnce.errors import UserError
from fastnce.networks import ResnetGenerator
from fastnce.systems.cyclegan import TwoWayGenerators
from fastnce.training import (
    Run,
    build_config,
    load_generator,
    train,
    translate,
    translate_folder,
)
from fastnce.training.checkpoint import load_checkpoint

TWO_WAY = {"data": "data", "out": "run", "base_channels": 2, "num_blocks": 1}


def test_load_generator(whole, tiny):
    run = whole("cut")
    state = load_checkpoint(run / "checkpoints" / "last.pt")
    raw, config = load_generator(run, which="raw")
    average, _ = load_generator(run)
    assert config == tiny(out=run)
    assert torch.equal(raw.model[1].weight, state["model"]["generator.model.1.weight"])
    assert torch.equal(average.model[1].weight, state["average"]["module"]["model.1.weight"])
    assert not raw.training
    assert not any(parameter.requires_grad for parameter in raw.parameters())
    again, _ = load_generator(run, checkpoint=run / "checkpoints" / "last.pt")
    assert torch.equal(again.model[1].weight, average.model[1].weight)


def test_load_generator_mistakes(tiny, tmp_path):
    run = train(tiny(steps=1))
    with pytest.raises(UserError, match="direction=BtoA: .*translates AtoB alone"):
        translate_folder(*load_generator(run), tiny().data / "testA", run, direction="BtoA")
    with pytest.raises(UserError, match="is no training run: it has no config.json"):
        load_generator(tmp_path)
    with pytest.raises(UserError, match="no such checkpoint"):
        load_generator(run, checkpoint=tmp_path / "none.pt")
    with pytest.raises(UserError, match="which=mean is unknown"):
        load_generator(run, which="mean")
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: is damaged"):
        Run(run)


def test_a_checkpoint_of_another_generator(whole, tiny, tmp_path):
    other = train(tiny(steps=1, base_channels=4, out=tmp_path / "other"))
    with pytest.raises(UserError, match="is not a checkpoint of the run"):
        load_generator(whole("cut"), checkpoint=other / "checkpoints" / "last.pt")


@pytest.fixture
def generator():
    torch.manual_seed(0)
    return ResnetGenerator(base_channels=2, num_blocks=1).eval()


def test_translate_gives_back_the_rank_and_the_type(generator):
    levels = torch.randint(256, (2, 3, 12, 16), dtype=torch.uint8)
    floats = levels.float() / 127.5 - 1
    expected = generator(floats).detach()
    one, all_of_them = translate(generator, levels[0]), translate(generator, levels, batch_size=1)
    assert translate(generator, levels[:0]).shape == (0, 3, 12, 16)
    assert one.shape == (3, 12, 16) and torch.equal(one, all_of_them[0])
    assert one.dtype == torch.uint8
    # A level is cut off, as files are written.
    off = (expected + 1) * 127.5 - all_of_them
    assert off.min() > -0.01 and off.max() < 1.01
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        result = translate(generator, floats[0].to(dtype))
        assert result.shape == (3, 12, 16) and result.dtype == dtype
        atol = 1e-5 if dtype.itemsize > 2 else 2e-2
        torch.testing.assert_close(result.float(), expected[0], rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(8, 8, 3), ValueError, r"C = 3, got \(8, 8, 3\)"),
        (torch.zeros(8, 8), ValueError, r"C = 3, got \(8, 8\)"),
        (torch.zeros(3, 0, 8), ValueError, r"C = 3, got \(3, 0, 8\)"),
        (torch.tensor([0.0, 255.0]).expand(3, 8, 2), ValueError, r"\[-1, 1\], got 0 to 255"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, "torch.int64"),
        (np.zeros((3, 8, 8)), TypeError, "ndarray"),
    ],
)
def test_what_is_no_image_for_translate(generator, images, error, message):
    with pytest.raises(error, match=message):
        translate(generator, images)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        translate(generator, torch.zeros(3, 8, 8), 0)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 4), (2, 30), (18, 13)])
def test_images_that_are_smaller_than_their_padding(generator, size):
    """They are mirrored to and fro, as `numpy.pad` does."""
    image = torch.rand(3, *size) * 2 - 1
    height, width = (max(8, -(-side // 4) * 4) for side in size)
    padded = np.pad(
        image.numpy(), ((0, 0), (0, height - size[0]), (0, width - size[1])), mode="reflect"
    )
    expected = generator(torch.from_numpy(padded)[None]).detach()[0, :, : size[0], : size[1]]
    torch.testing.assert_close(translate(generator, image), expected, rtol=0, atol=1e-6)


def test_a_system_of_both_directions_translates_a_to_b():
    both = TwoWayGenerators(build_config("cyclegan", overrides=TWO_WAY))
    image = torch.rand(3, 24, 40) * 2 - 1
    expected = translate(both.a_to_b, image)
    torch.testing.assert_close(translate(both, image), expected)
    torch.testing.assert_close(translate(both, image, tile=16), expected, rtol=0, atol=3e-5)
