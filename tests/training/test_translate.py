"""Trained generators: loading, and translating tensors and folders."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.data import load_image
from fastnce.errors import UserError
from fastnce.networks import ResnetGenerator
from fastnce.training import load_config, load_generator, train, translate, translate_folder
from fastnce.training.checkpoint import load_checkpoint


@pytest.fixture
def run(tiny):
    return train(tiny(steps=3))


def test_load_generator(run, tiny):
    state = load_checkpoint(run / "checkpoints" / "last.pt")
    raw, config = load_generator(run, which="raw")
    average, _ = load_generator(run)
    assert config == tiny(steps=3)
    assert torch.equal(raw.model[1].weight, state["model"]["generator.model.1.weight"])
    assert torch.equal(average.model[1].weight, state["average"]["module"]["model.1.weight"])
    assert not raw.training
    assert not any(parameter.requires_grad for parameter in raw.parameters())
    again, _ = load_generator(run, checkpoint=run / "checkpoints" / "last.pt")
    assert torch.equal(again.model[1].weight, average.model[1].weight)


def test_load_generator_mistakes(run, tmp_path):
    with pytest.raises(UserError, match="is no training run: it has no config.json"):
        load_generator(tmp_path)
    with pytest.raises(UserError, match="no such checkpoint"):
        load_generator(run, checkpoint=tmp_path / "none.pt")
    with pytest.raises(UserError, match="which=mean is unknown"):
        load_generator(run, which="mean")
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: is damaged"):
        load_config(run)


def test_a_checkpoint_of_another_generator(run, tiny, tmp_path):
    other = train(tiny(steps=1, base_channels=4, out=tmp_path / "other"))
    with pytest.raises(UserError, match="is not a checkpoint of the run"):
        load_generator(run, checkpoint=other / "checkpoints" / "last.pt")


def test_translate_equals_the_generator():
    torch.manual_seed(0)
    generator = ResnetGenerator(base_channels=2, num_blocks=1)
    images = torch.rand(5, 3, 16, 12) * 2 - 1
    result = translate(generator, images, batch_size=2)
    assert not result.requires_grad
    torch.testing.assert_close(result, generator(images).detach())
    assert translate(generator, images[:0]).shape == (0, 3, 16, 12)


def test_translate_takes_any_size():
    torch.manual_seed(0)
    generator = ResnetGenerator(base_channels=2, num_blocks=1)
    images = torch.rand(1, 3, 18, 13) * 2 - 1
    assert translate(generator, images).shape == (1, 3, 18, 13)


def save(path, size, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size[::-1], 3), value, dtype=np.uint8)).save(path)


def test_translate_folder(run, tmp_path):
    generator, config = load_generator(run)
    folder, out = tmp_path / "in", tmp_path / "out"
    for index in range(3):
        save(folder / f"{index}.png", (16, 16), 80 * index)
    save(folder / "sub" / "wide.jpg", (40, 20))
    assert translate_folder(generator, config, folder, out, batch_size=2) == 4
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    assert names == ["0.png", "1.png", "2.png", "sub/wide.png"]
    expected = translate(generator, load_image(folder / "2.png")[None])[0]
    result = load_image(out / "2.png")
    assert result.shape == (3, 16, 16)
    assert (result - expected).abs().max() <= 2 / 255


def test_translate_folder_mistakes(run, tmp_path):
    generator, config = load_generator(run)
    folder = tmp_path / "in"
    save(folder / "a.png", (16, 16))
    with pytest.raises(UserError, match=r"would overwrite .*a\.png. Name another folder"):
        translate_folder(generator, config, folder, folder)
    save(folder / "a.jpg", (16, 16))
    with pytest.raises(UserError, match="would both be written to"):
        translate_folder(generator, config, folder, tmp_path / "out")
